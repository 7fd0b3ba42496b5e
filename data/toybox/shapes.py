"""The toys: one signed-distance function per class.

A shape takes the coordinates of points (tensors of equal length; y is up, the toy stands on y = 0, faces +z and is
about one unit tall) and its free parameters (each 0 to 1, tensors of the same length). It returns the distances to its
three parts: the body (with the pattern), the accents (in the second colour) and the details (in a neutral colour).
"""

import torch
from torch import Tensor

from data.toybox.sdf import blend, box, capsule, carve, cone, disc, ellipsoid, length, sphere, torus, union

SHAPE_PARAMETERS = 4
CENTRE, RADIUS = 0.58, 0.98
"""Height of the centre and radius of a sphere that encloses every toy."""

Parts = tuple[Tensor, Tensor, Tensor]


def mug(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    radius, half, flare = 0.36 + 0.12 * s[0], 0.38 + 0.16 * s[1], 0.25 * (s[2] - 0.5)
    across = length(x, z) - flare * (y - half)
    body = disc(across, y - half, radius, half, 0.05)
    body = carve(body, disc(across, y - half - 0.12, radius - 0.07, half))
    tall = 0.20 + 0.12 * s[3]
    handle = length(torch.sqrt(((x - radius) / 0.85) ** 2 + (y - half) ** 2 + 1e-12) - tall, z) * 0.85 - 0.065
    handle = carve(handle, disc(across, y - half, radius - 0.03, half + 0.3))
    return body, handle, torch.maximum(across - radius + 0.06, (y - half * 1.7).abs() - 0.01)


def teapot(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    wide, tall = 0.44 + 0.1 * s[0], 0.36 + 0.12 * s[1]
    body = torch.maximum(ellipsoid(x, y - tall, z, wide, tall, wide), 0.03 - y)
    tip = 0.55 + 0.3 * s[2]
    spout = capsule(x, y, z, (-wide * 0.7, tall * 0.75, 0.0), (-wide - 0.27, tall + tip * 0.5, 0.0), 0.13, 0.055)
    handle = torus(x - wide - 0.02, y - tall, z, 0.19 + 0.08 * s[3], 0.055)
    handle = carve(handle, ellipsoid(x, y - tall, z, wide * 0.97, tall * 0.97, wide * 0.97))
    lid = ellipsoid(x, y - 1.9 * tall, z, wide * 0.5, 0.09, wide * 0.5)
    return body, union(spout, handle, lid), sphere(x, y - 1.9 * tall - 0.14, z, 0.085)


def vase(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    height = 0.95 + 0.25 * s[0]
    belly, middle = 0.16 + 0.2 * s[1], (0.25 + 0.35 * s[2]) * height
    profile = 0.19 + belly * torch.exp(-(((y - middle) / (0.3 * height)) ** 2))
    lip = (0.05 + 0.16 * s[3]) * torch.sigmoid((y - 0.88 * height) * 14)
    across = length(x, z)
    outer = torch.maximum(across - profile - lip, torch.maximum(y - height, -y)) * 0.72
    body = carve(outer, torch.maximum(across - profile - lip + 0.06, 0.12 - y) * 0.72)
    ring = torus(x, z, y - height, 0.19 + belly * 0.1 + lip * 0.85, 0.045)
    return body, ring, disc(across, y - 0.03, 0.24, 0.03, 0.02)


def ball(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    radius = 0.46 + 0.12 * s[0]
    long = 1 + 0.45 * (s[1] - 0.35).clamp(min=0)
    body = ellipsoid(x, y - radius, z, radius * long, radius, radius)
    tilt = 0.9 * (s[2] - 0.5)
    knob = sphere(x - radius * tilt, y - radius * (1 + torch.sqrt(1 - tilt * tilt)), z, 0.1)
    return body, knob, knob + 1.0


def car(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    half, wide = 0.62 + 0.14 * s[0], 0.30 + 0.08 * s[1]
    low, front = 0.16, 0.10 + 0.08 * s[2]
    body = box(x, y - low - 0.17, z, half, 0.19, wide, 0.09)
    cabin_half, cabin_tall = 0.26 + 0.16 * s[3], 0.20 + 0.12 * s[2]
    lean = 1 - 0.35 * (y - 0.5).clamp(0, 1)
    cabin = box((x + front) / lean, y - 0.48, z / lean, cabin_half, cabin_tall, wide - 0.05, 0.07) * 0.8
    wheel_x = x.abs() - half * 0.58
    wheels = disc(length(wheel_x, y - 0.19), z.abs() - wide, 0.19, 0.075, 0.03)
    lights = sphere(x - half, y - 0.36, z.abs() - wide * 0.6, 0.07)
    return body, cabin, union(wheels, lights)


def duck(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    long, tall = 0.50 + 0.12 * s[0], 0.30 + 0.08 * s[1]
    body = ellipsoid(x, y - tall, z, long, tall, 0.34)
    tail = ellipsoid(x * 0.8 - y * 0.6 + 0.62 * long, y * 0.8 + x * 0.6 - tall + 0.36 * long, z, 0.24, 0.11, 0.15)
    neck, head = 2 * tall + 0.10 + 0.16 * s[2], 0.23 + 0.05 * s[3]
    body = blend(blend(body, tail, 0.12), sphere(x - long * 0.55, y - neck, z, head), 0.14)
    beak = ellipsoid(x - long * 0.55 - head - 0.07, y - neck + 0.05, z, 0.16, 0.06, 0.13)
    eyes = sphere(x - long * 0.55 - head * 0.72, y - neck - head * 0.32, z.abs() - head * 0.55, 0.055)
    return body, beak, eyes


def boat(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    long, wide = 0.66 + 0.14 * s[0], 0.27 + 0.07 * s[1]
    deck = 0.34
    hull = torch.maximum(ellipsoid(x, y - deck, z, long, deck, wide), y - deck)
    hull = carve(hull, ellipsoid(x, y - deck, z, long - 0.08, deck - 0.14, wide - 0.07))
    top = 1.1 + 0.3 * s[2]
    mast = disc(length(x, z), y - top / 2 - 0.1, 0.03, top / 2 - 0.1)
    reach = 0.34 + 0.2 * s[3]
    edge = reach * (top - 0.04 - y) / (top - 0.5)
    sail = torch.maximum(torch.maximum(x - 0.05 - edge, 0.05 - x), torch.maximum(0.46 - y, y - top + 0.04))
    front = torch.maximum(torch.maximum(-x - 0.05 - 0.6 * edge, 0.05 + x), torch.maximum(0.5 - y, y - top + 0.1))
    sails = torch.maximum(union(sail, front), z.abs() - 0.025) * 0.8
    return hull, sails, mast


def robot(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    wide, tall = 0.26 + 0.1 * s[0], 0.24 + 0.1 * s[1]
    leg = 0.16 + 0.1 * s[2]
    middle = leg + tall
    body = box(x, y - middle, z, wide, tall, 0.20, 0.06)
    head_y, head = leg + 2 * tall + 0.06 + 0.16, 0.17 + 0.06 * s[3]
    skull = box(x, y - head_y, z, head, 0.16, 0.16, 0.05)
    swing = 0.12 * (s[3] - 0.5)
    arms = capsule(
        x.abs(), y, z, (wide + 0.07, middle + tall * 0.7, 0.0), (wide + 0.13, middle - tall * 0.6, swing), 0.06, 0.06
    )
    legs = box(x.abs() - wide * 0.55, y - leg / 2, z, 0.085, leg / 2 + 0.03, 0.11, 0.03)
    eyes = sphere(x.abs() - head * 0.45, y - head_y - 0.02, z - 0.16, 0.05)
    antenna = union(disc(length(x, z), y - head_y - 0.2, 0.02, 0.08), sphere(x, y - head_y - 0.3, z, 0.055))
    return body, union(skull, legs), union(arms, eyes, antenna)


def house(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    wide, deep, tall = 0.38 + 0.12 * s[0], 0.32 + 0.1 * s[1], 0.28 + 0.12 * s[2]
    walls = box(x, y - tall, z, wide, tall, deep, 0.02)
    rise = 0.34 + 0.22 * s[3]
    slope = rise / (deep + 0.08)
    roof = ((y - 2 * tall - rise) + z.abs() * slope) * torch.rsqrt(1 + slope * slope)
    roof = torch.maximum(torch.maximum(roof, 2 * tall - 0.01 - y), x.abs() - wide - 0.06)
    chimney = box(x - wide * 0.5, y - 2 * tall - rise * 0.6, z + deep * 0.45, 0.07, 0.24, 0.07)
    door = box(x + wide * 0.45, y - 0.17, z - deep, 0.09, 0.17, 0.02)
    pane = box(x - wide * 0.4, y - tall * 1.05, z - deep, 0.12, 0.11, 0.02)
    side = box(x.abs() - wide, y - tall * 1.05, z, 0.02, 0.11, 0.11)
    return walls, roof, union(chimney, door, pane, side)


def tree(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    trunk_top, top = 0.22 + 0.12 * s[0], 1.15 + 0.2 * s[1]
    wide = 0.38 + 0.16 * s[2]
    across = length(x, z)
    step = (top - trunk_top) / 3
    tiers = []
    for tier in range(3):
        low = trunk_top + tier * step * 0.82
        radius = wide * (1 - 0.26 * tier)
        tiers.append(cone(across, y, low, low + step * 1.35, radius, 0.03) - 0.02)
    round_crown = sphere(x, (y - trunk_top - wide * 1.0) * 0.9, z, wide)
    is_round = s[3] > 0.6
    crown = torch.where(is_round, round_crown, union(*tiers) * 0.9)
    tip = torch.where(is_round, trunk_top + wide * 2.12, trunk_top + step * (1.64 + 1.35))
    star = sphere(x, y - tip - 0.05, z, 0.09)
    trunk = disc(across, y - trunk_top / 2, 0.09, trunk_top / 2 + 0.05)
    return crown, star, trunk


def hat(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    brim, radius, height = 0.58 + 0.18 * s[0], 0.30 + 0.08 * s[1], 0.45 + 0.4 * s[2]
    across = length(x, z)
    point = 0.06 + 0.9 * (s[3] - 0.3).clamp(min=0)  # narrow like a wizard's hat, or wide like a top hat
    top_radius = radius * point.clamp(max=1.0) + 0.02
    crown = cone(across, y, 0.04, height + 0.15, radius, top_radius) * 0.9 - 0.02
    lift = 0.06 + 0.09 * (across / brim) ** 2
    plate = torch.maximum((y - lift).abs() - 0.03, across - brim) * 0.9
    body = blend(crown, plate, 0.05)
    fraction = 0.2 / (height + 0.11)
    band = torch.maximum(across - radius - 0.045 + (radius - top_radius) * fraction, (y - 0.2).abs() - 0.075) * 0.9
    return body, band, band + 1.0


def lamp(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    height = 1.0 + 0.22 * s[0]
    tall, low, high = 0.40 + 0.1 * s[1], 0.42 + 0.1 * s[2], 0.14 + 0.24 * s[3]
    across = length(x, z)
    shade = cone(across, y, height - tall, height, low, high) - 0.02
    shade = carve(shade, cone(across, y, height - tall - 0.2, height - 0.05, low - 0.03, high - 0.03))
    foot = ellipsoid(x, y - 0.04, z, 0.34, 0.13, 0.34)
    gourd = ellipsoid(x, y - 0.26, z, 0.12 + 0.09 * s[1], 0.2, 0.12 + 0.09 * s[1])
    pole = disc(across, y - height / 2, 0.04, height / 2 - 0.02)
    return shade, torch.maximum(blend(foot, gourd, 0.08), -y), pole


def rocket(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    low, top = 0.16, 1.25 + 0.2 * s[0]
    thick = 0.24 + 0.1 * s[1]
    t = ((y - low) / (top - low)).clamp(0, 1)
    lean = 0.25 + 0.35 * s[2]
    profile = thick * torch.sqrt((1 - t).clamp(min=0)) * (0.75 + lean * torch.sin(3.14159 * t) * 0.9)
    across = length(x, z)
    body = torch.maximum(across - profile - 0.02, torch.maximum(low - y, y - top)) * 0.7
    u, v = (x + z) * 0.70711, (x - z) * 0.70711
    fin_edge = thick + 0.26 + 0.1 * s[3] - (y - 0.05) * 0.62
    fins = (
        torch.maximum(
            torch.minimum(
                torch.maximum(u.abs() - fin_edge, v.abs() - 0.03), torch.maximum(v.abs() - fin_edge, u.abs() - 0.03)
            ),
            torch.maximum(0.0 - y, y - 0.62),
        )
        * 0.8
    )
    window = sphere(x, y - low - (top - low) * 0.52, z - thick * 0.72, 0.13)
    nozzle = cone(across, y, 0.05, 0.2, 0.17, 0.12)
    return body, fins, union(window, nozzle)


def mushroom(x: Tensor, y: Tensor, z: Tensor, s: list[Tensor]) -> Parts:
    stem_tall = 0.42 + 0.2 * s[0]
    wide, tall = 0.46 + 0.16 * s[1], 0.34 + 0.22 * s[2]
    cap = ellipsoid(x, y - stem_tall, z, wide, tall, wide)
    cap = torch.maximum(cap, stem_tall - 0.05 - y) - 0.03
    across = length(x, z)
    thick = 0.13 + 0.06 * s[3]
    stem = cone(across, y, 0.0, stem_tall, thick + 0.06, thick) - 0.01
    skirt = cone(across, y, stem_tall * 0.55, stem_tall * 0.7, thick + 0.1, thick)
    return cap, stem, skirt


SHAPES = {
    shape.__name__: shape
    for shape in (mug, teapot, vase, ball, car, duck, boat, robot, house, tree, hat, lamp, rocket, mushroom)
}
CLASSES = tuple(SHAPES)
