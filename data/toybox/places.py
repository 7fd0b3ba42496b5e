"""The places that toys stand in: ground, backdrops and sky as functions of where a ray hits them, and the lighting.

A place is a ground plane y = 0, upright backdrops across the view behind the toy (walls, houses, trees, mountains), and
a sky. Colours are linear RGB in the last dimension; ``v`` contains a scene's four free parameters, each 0 to 1 and
shaped to broadcast against the points.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from data.toybox.surfaces import edge, hashed, noise

STUFF = ("sky", "ground", "water", "wall", "rug", "building", "foliage", "mountain")
"""Semantic classes of everything that is not a toy."""

SKY, GROUND, WATER, WALL, RUG, BUILDING, FOLIAGE, MOUNTAIN = range(len(STUFF))

Colour = tuple[float, float, float]
Variation = tuple[Tensor, ...]
Ground = Callable[[Tensor, Tensor, Variation], tuple[Tensor, Tensor]]
Backdrop = Callable[[Tensor, Tensor, Variation], tuple[Tensor, Tensor, Tensor]]


def paint(colour: Colour | Tensor, like: Tensor) -> Tensor:
    colour = torch.as_tensor(colour, dtype=like.dtype, device=like.device)
    return colour.expand(*like.shape, 3) if colour.dim() == 1 else colour


def mix(a: Colour | Tensor, b: Colour | Tensor, t: Tensor) -> Tensor:
    """Colour a where t is 0, b where t is 1."""
    a, b = paint(a, t), paint(b, t)
    return a + (b - a) * t[..., None]


def label(index: int, like: Tensor) -> Tensor:
    return torch.full(like.shape, index, dtype=torch.uint8, device=like.device)


def cells(x: Tensor, y: Tensor, width: float, height: float) -> tuple[Tensor, Tensor, Tensor]:
    """A point's position inside its grid cell (each coordinate 0 to 1) and the cell's random number."""
    u, w = x / width, y / height
    i, j = torch.floor(u), torch.floor(w)
    return u - i, w - j, hashed(i.to(torch.int64), j.to(torch.int64))


# --- grounds -------------------------------------------------------------------------------------------------------


def sand(x: Tensor, z: Tensor, v: Variation):
    ripples = 0.5 + 0.5 * torch.sin(5 * z + 2.5 * noise(x * 1.2 + 40 * v[0], z * 1.2) * 3)
    grain = noise(x * 2 + 9, z * 2) * 0.6 + ripples * 0.4
    return mix((0.62, 0.45, 0.24), (0.80, 0.62, 0.36), grain), label(GROUND, x)


def beach(x: Tensor, z: Tensor, v: Variation):
    dry, _ = sand(x, z, v)
    shore = -z - 1.0 - 1.2 * v[1] - 0.35 * torch.sin(x * 0.9 + 6 * v[0]) - 0.15 * torch.sin(x * 2.3 + 9 * v[2])
    damp = mix(dry, (0.36, 0.25, 0.13), edge(shore + 0.25, 0.5))
    sea = mix((0.10, 0.52, 0.56), (0.02, 0.16, 0.38), (shore / 5).clamp(0, 1))
    sea = mix(sea, (0.55, 0.75, 0.80), edge(noise(x * 1.1, z * 3.5 + 30 * v[3]) - 0.74, 0.3) * 0.5)
    sea = mix((0.95, 0.96, 0.96), sea, edge(shore - 0.16 - 0.08 * noise(x * 3, z * 3), 0.1))
    wet = shore > 0
    return torch.where(wet[..., None], sea, damp), torch.where(wet, label(WATER, x), label(GROUND, x))


def snow(x: Tensor, z: Tensor, v: Variation):
    drift = noise(x * 0.8 + 30 * v[0], z * 1.3)
    return mix((0.68, 0.77, 0.90), (0.93, 0.95, 0.98), drift), label(GROUND, x)


def leaves(x: Tensor, z: Tensor, v: Variation):
    mottle = noise(x * 3 + 20 * v[0], z * 3) * 0.6 + noise(x * 7, z * 7 + 5) * 0.4
    return mix((0.05, 0.075, 0.02), (0.16, 0.21, 0.05), mottle), label(GROUND, x)


def street(x: Tensor, z: Tensor, v: Variation):
    asphalt = mix((0.10, 0.10, 0.11), (0.15, 0.15, 0.16), noise(x * 4, z * 4))
    along = (z + 1.1 + 0.5 * v[0]).abs()
    dash = torch.where((x * 0.55 + v[1]) % 1 < 0.6, edge(0.07 - along, 0.03), torch.zeros_like(x))
    asphalt = mix(asphalt, (0.80, 0.78, 0.70), dash)
    curb = edge(-z - 2.3, 0.06)
    u, w, number = cells(x, z, 0.8, 0.8)
    joint = edge(torch.minimum(torch.minimum(u, 1 - u), torch.minimum(w, 1 - w)) - 0.03, 0.05)
    pavement = mix((0.22, 0.22, 0.22), (0.42, 0.41, 0.40), joint * (0.8 + 0.2 * number))
    return mix(asphalt, pavement, curb), label(GROUND, x)


def planks(x: Tensor, z: Tensor, v: Variation):
    shift = hashed(torch.floor(z / 0.42).to(torch.int64), torch.floor(z * 0).to(torch.int64) + 3)
    u, w, number = cells(x + shift * 1.7 + 5 * v[0], z, 1.7, 0.42)
    grain = noise(x * 0.9 + number * 40, z * 9) * 0.7
    wood = mix((0.27, 0.125, 0.05), (0.46, 0.25, 0.11), (0.25 + 0.5 * number + 0.5 * grain).clamp(0, 1))
    gap = edge(torch.minimum(w, 1 - w) - 0.035, 0.05) * edge(torch.minimum(u, 1 - u) - 0.008, 0.012)
    return mix((0.08, 0.04, 0.02), wood, gap), label(GROUND, x)


def rug(x: Tensor, z: Tensor, v: Variation):
    floor = mix((0.16, 0.105, 0.075), (0.22, 0.15, 0.11), noise(x * 1.2, z * 6))
    radius = 1.25 + 0.35 * v[1]
    across = torch.sqrt((x / 1.25) ** 2 + z * z + 1e-9)
    pile = 0.85 + 0.15 * noise(x * 9, z * 9)
    white = paint((0.86, 0.84, 0.80), x) * pile[..., None]
    white = mix(white, (0.55, 0.50, 0.46), edge(0.04 - (across - radius + 0.2).abs(), 0.03))
    on = across < radius
    return torch.where(on[..., None], white, floor), torch.where(on, label(RUG, x), label(GROUND, x))


def field(x: Tensor, z: Tensor, v: Variation):
    tint = noise(x * 1.1 + 30 * v[0], z * 1.1) * 0.5 + noise(x * 5, z * 4) * 0.5
    return mix((0.018, 0.045, 0.025), (0.05, 0.10, 0.045), tint), label(GROUND, x)


def meadow(x: Tensor, z: Tensor, v: Variation):
    tint = noise(x * 1.3 + 30 * v[0], z * 1.3) * 0.6 + noise(x * 6, z * 5) * 0.4
    grass = mix((0.09, 0.27, 0.03), (0.30, 0.50, 0.07), tint)
    u, w, number = cells(x, z, 0.34, 0.34)
    away = torch.sqrt((u - 0.3 - 0.4 * number) ** 2 + (w - 0.7 + 0.4 * number) ** 2 + 1e-9)
    petals = torch.where((number > 0.62), edge(0.17 - away, 0.08), torch.zeros_like(x))
    hue = mix((0.95, 0.90, 0.85), (0.95, 0.75, 0.10), edge(number - 0.82, 0.02))
    return mix(grass, hue, petals), label(GROUND, x)


def counter(x: Tensor, z: Tensor, v: Variation):
    veins = edge(0.06 - (noise(x * 1.1 + 20 * v[0], z * 1.6) + 0.35 * noise(x * 4, z * 4) - 0.68).abs(), 0.1)
    return mix((0.60, 0.58, 0.55), (0.38, 0.37, 0.36), veins), label(GROUND, x)


def rocks(x: Tensor, z: Tensor, v: Variation):
    lump = noise(x * 1.4 + 20 * v[0], z * 1.8) * 0.6 + noise(x * 4, z * 4) * 0.4
    stone = mix((0.15, 0.145, 0.14), (0.36, 0.34, 0.31), lump)
    moss = edge(noise(x * 0.9, z * 0.9 + 20 * v[1]) - 0.62, 0.2)
    return mix(stone, (0.13, 0.19, 0.06), moss * 0.7), label(GROUND, x)


def water(x: Tensor, z: Tensor, v: Variation):
    swell = torch.sin(3.1 * z + 1.8 * noise(x * 0.9 + 20 * v[0], z * 0.9) * 4) * 0.5 + 0.5
    glint = edge(noise(x * 1.6, z * 4.2 + 30 * v[1]) - 0.70, 0.25)
    sea = mix((0.015, 0.15, 0.28), (0.06, 0.36, 0.47), swell * 0.7)
    return mix(sea, (0.62, 0.82, 0.88), glint * 0.6), label(WATER, x)


def fabric(x: Tensor, z: Tensor, v: Variation):
    folds = torch.sin(2.4 * x + 1.9 * z + 6 * v[0] + 2.2 * noise(x * 0.9, z * 0.9 + 9 * v[1])) * 0.5 + 0.5
    return mix((0.62, 0.17, 0.30), (0.92, 0.45, 0.58), folds), label(GROUND, x)


def cobbles(x: Tensor, z: Tensor, v: Variation):
    row = torch.floor(z / 0.30)
    u, w, number = cells(x + 0.17 * (row % 2) + 3 * v[0], z, 0.36, 0.30)
    away = torch.sqrt(((u - 0.5) * 1.05) ** 2 + (w - 0.5) ** 2 + 1e-9)
    stone = mix((0.17, 0.155, 0.145), (0.38, 0.35, 0.32), (0.15 + number * 0.7).clamp(0, 1))
    return mix((0.055, 0.05, 0.045), stone, edge(0.47 - away, 0.12)), label(GROUND, x)


# --- backdrops: colour, whether the backdrop covers the point, semantic class --------------------------------------


def hills(x: Tensor, y: Tensor, v: Variation):
    top = 0.9 + 0.7 * torch.sin(x * 0.45 + 6 * v[0]) + 0.4 * torch.sin(x * 1.1 + 6 * v[1])
    return mix((0.05, 0.20, 0.05), (0.14, 0.34, 0.09), (y / 1.6).clamp(0, 1)), y < top, label(FOLIAGE, x)


def snowy_pines(x: Tensor, y: Tensor, v: Variation):
    u, _, number = cells(x + 3 * v[0], x * 0, 0.9, 1.0)
    tall = 1.3 + 1.6 * number
    tooth = (y * 2.2) % 1
    half = 0.46 * (1 - y / tall).clamp(min=0) * (0.75 + 0.25 * (1 - tooth))
    tree = (u - 0.5).abs() < half
    frost = edge(tooth - 0.55, 0.3) * edge(noise(x * 5, y * 5) - 0.35, 0.3)
    return mix((0.03, 0.10, 0.08), (0.80, 0.86, 0.93), frost), tree, label(FOLIAGE, x)


def jungle(x: Tensor, y: Tensor, v: Variation):
    clump = noise(x * 1.2 + 30 * v[0], y * 1.2) * 0.55 + noise(x * 3.1, y * 2.2 + 9 * v[1]) * 0.45
    green = mix((0.008, 0.045, 0.012), (0.10, 0.34, 0.05), (clump * 1.5 - 0.25).clamp(0, 1))
    u, _, number = cells(x + 5 * v[2], x * 0, 1.5, 1.0)
    trunk = edge(0.07 - (u - 0.5 + 0.10 * torch.sin(y * 1.2 + 6 * number)).abs(), 0.03)
    return mix(green, (0.13, 0.075, 0.035), trunk * (number > 0.3)), y < 99.0, label(FOLIAGE, x)


def skyline(x: Tensor, y: Tensor, v: Variation):
    u, _, number = cells(x + 4 * v[0], x * 0, 1.7, 1.0)
    tall = 2.2 + 4.0 * number
    wall = mix((0.33, 0.17, 0.12), (0.42, 0.39, 0.36), edge((number * 7.3) % 1 - 0.5, 0.02))
    wall = mix(wall, (0.20, 0.24, 0.31), edge((number * 3.1) % 1 - 0.6, 0.02))
    a, b, lit = cells(u * 4, y, 1.0, 0.62)
    pane = edge(0.27 - (a - 0.5).abs(), 0.06) * edge(0.3 - (b - 0.5).abs(), 0.06)
    glass = mix((0.05, 0.08, 0.13), (0.75, 0.62, 0.34), edge(lit - 0.75, 0.02))
    return mix(wall, glass, pane), (y < tall) & ((u - 0.5).abs() < 0.47), label(BUILDING, x)


def dunes(x: Tensor, y: Tensor, v: Variation):
    top = 1.1 + 0.55 * torch.sin(x * 0.5 + 6 * v[0]) + 0.25 * torch.sin(x * 1.3 + 6 * v[1])
    return mix((0.50, 0.27, 0.11), (0.74, 0.45, 0.20), (y / top).clamp(0, 1)), y < top, label(GROUND, x)


def cacti(x: Tensor, y: Tensor, v: Variation):
    u, _, number = cells(x + 3 * v[2], x * 0, 2.6, 1.0)
    side = (u - 0.5) * 2.6
    tall = 1.2 + 1.1 * number
    stem = (side.abs() < 0.17) & (y < tall)
    arm = ((side - 0.42).abs() < 0.11) & (y > 0.6) & (y < tall * 0.85)
    bridge = (side > 0) & (side < 0.42) & ((y - 0.68).abs() < 0.11)
    green = mix((0.05, 0.17, 0.06), (0.14, 0.32, 0.12), (side * 2.5 + 0.5).clamp(0, 1))
    return green, (stem | arm | bridge) & (number > 0.35), label(FOLIAGE, x)


def plain_wall(x: Tensor, y: Tensor, v: Variation):
    warm = mix((0.60, 0.52, 0.40), (0.42, 0.50, 0.52), v[0].expand_as(x))
    board = edge(0.28 - y, 0.02)
    return mix(warm, (0.80, 0.78, 0.74), board), y < 99.0, label(WALL, x)


def panelled_wall(x: Tensor, y: Tensor, v: Variation):
    base = mix((0.16, 0.22, 0.33), (0.33, 0.18, 0.20), v[0].expand_as(x))
    stripe = edge(torch.sin(x * 6.5 + 6 * v[1]), 0.4)
    wall = mix(base, base * 1.35, stripe)
    return mix(wall, (0.62, 0.60, 0.56), edge(0.3 - y, 0.02)), y < 99.0, label(WALL, x)


def tiled_wall(x: Tensor, y: Tensor, v: Variation):
    u, w, number = cells(x + v[0], y, 0.62, 0.42)
    joint = edge(torch.minimum(u * 0.62, (1 - u) * 0.62) - 0.02, 0.02)
    joint = joint * edge(torch.minimum(w * 0.42, (1 - w) * 0.42) - 0.02, 0.02)
    glaze = mix((0.66, 0.74, 0.72), (0.76, 0.82, 0.80), number)
    glaze = mix(glaze, (0.10, 0.36, 0.42), ((number > 0.83) & (v[1] > 0.35)).float())
    return mix((0.36, 0.38, 0.37), glaze, joint), y < 99.0, label(WALL, x)


def brick_wall(x: Tensor, y: Tensor, v: Variation):
    row = torch.floor(y / 0.26)
    u, w, number = cells(x + 0.29 * (row % 2) + v[0], y, 0.58, 0.26)
    joint = edge(torch.minimum(u * 0.58, (1 - u) * 0.58) - 0.02, 0.02)
    joint = joint * edge(torch.minimum(w * 0.26, (1 - w) * 0.26) - 0.02, 0.02)
    brick = mix((0.28, 0.075, 0.045), (0.45, 0.16, 0.09), number)
    return mix((0.46, 0.43, 0.39), brick, joint), y < 99.0, label(BUILDING, x)


def peaks(x: Tensor, y: Tensor, v: Variation):
    def ridge(t: Tensor) -> Tensor:
        return 1 - (2 * (t - torch.floor(t)) - 1).abs()

    top = 0.3 + 2.3 * ridge(x * 0.13 + v[0]) + 0.9 * ridge(x * 0.37 + v[1]) + 0.2 * ridge(x * 1.3 + v[2])
    shade = noise(x * 0.9, y * 0.7) * 0.6 + 0.4 * noise(x * 2.5, y * 2.5)
    rock = mix((0.09, 0.12, 0.20), (0.24, 0.26, 0.34), shade)
    cap = edge(y - 1.35 - 0.8 * noise(x * 1.6, y * 0.4), 0.2)
    return mix(rock, (0.90, 0.93, 0.97), cap), y < top, label(MOUNTAIN, x)


def dark_trees(x: Tensor, y: Tensor, v: Variation):
    top = 0.9 + 0.9 * noise(x * 0.9 + 20 * v[0], x * 0) + 0.35 * noise(x * 3.0, x * 0 + 4)
    return paint((0.004, 0.010, 0.014), x), y < top, label(FOLIAGE, x)


# --- skies ---------------------------------------------------------------------------------------------------------


def day_sky(low: Colour, high: Colour, clouds: float):
    def sky(dx: Tensor, dy: Tensor, dz: Tensor, v: Variation) -> Tensor:
        colour = mix(low, high, (dy * 2.6).clamp(0, 1))
        if clouds:
            cover = noise(dx * 4 + 9 * v[2], dy * 11) * 0.65 + noise(dx * 9, dy * 22 + 9 * v[3]) * 0.35
            colour = mix(colour, (0.93, 0.94, 0.96), edge(cover - 0.56, 0.35) * clouds)
        return colour

    return sky


def sunset_sky(dx: Tensor, dy: Tensor, dz: Tensor, v: Variation) -> Tensor:
    colour = mix((0.98, 0.62, 0.30), (0.36, 0.48, 0.72), (dy * 3.0).clamp(0, 1))
    away = torch.sqrt((dx - 0.5 * (v[2] - 0.5)) ** 2 + (dy - 0.16) ** 2 + 1e-9)
    return mix(colour, (1.0, 0.93, 0.72), edge(0.055 - away, 0.03))


def starry_sky(dx: Tensor, dy: Tensor, dz: Tensor, v: Variation) -> Tensor:
    colour = mix((0.030, 0.045, 0.11), (0.006, 0.010, 0.035), (dy * 2.5).clamp(0, 1))
    u, w, number = cells(dx + v[1], dy, 0.036, 0.036)
    away = torch.sqrt((u - 0.5) ** 2 + (w - 0.5) ** 2 + 1e-9)
    stars = torch.where(number > 0.80, edge(0.26 - away, 0.2), torch.zeros_like(dx))
    colour = mix(colour, (0.85, 0.87, 0.95), stars)
    moon = torch.sqrt((dx - 0.5 * (v[2] - 0.5)) ** 2 + (dy - 0.16 - 0.04 * v[3]) ** 2 + 1e-9)
    return mix(colour, (0.93, 0.90, 0.76), edge(0.058 - moon, 0.012))


# --- the places ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Place:
    """The surroundings of a toy.

    Attributes:
        phrases: the place's wordings in captions.
        ground: colour and semantic class of a ground point (x, z).
        backdrops: distance behind the toy, and a function from a point (x, y) to its colour, whether the backdrop
            covers it, and its semantic class; the farthest first.
        sky: colour of the sky in a direction.
        sun, ambient: directional and ambient light, linear RGB.
        haze: the colour that distant ground fades to, and how fast (per unit of distance).
    """

    phrases: tuple[str, ...]
    ground: Ground
    backdrops: tuple[tuple[float, Backdrop], ...]
    sky: Callable[[Tensor, Tensor, Tensor, Variation], Tensor]
    sun: Colour = (1.75, 1.66, 1.5)
    ambient: Colour = (0.34, 0.38, 0.45)
    haze: tuple[Colour, float] = ((0.62, 0.74, 0.88), 0.012)


BLUE_SKY = day_sky((0.62, 0.76, 0.90), (0.16, 0.38, 0.80), 0.9)
GREY_SKY = day_sky((0.74, 0.79, 0.86), (0.50, 0.60, 0.76), 0.3)
INDOORS = {"sun": (1.55, 1.42, 1.22), "ambient": (0.46, 0.45, 0.44), "haze": ((0.4, 0.4, 0.4), 0.0)}

PLACES = {
    "beach": Place(("on a beach", "on the beach", "on the sand by the sea"), beach, (), BLUE_SKY),
    "snow": Place(("in the snow", "on the snow", "in a snowy forest"), snow, ((4.5, snowy_pines),), GREY_SKY,
                  sun=(1.35, 1.35, 1.40), ambient=(0.50, 0.55, 0.66)),
    "jungle": Place(("in the jungle", "in a green jungle"), leaves, ((2.8, jungle),), BLUE_SKY,
                    sun=(1.7, 1.75, 1.35), ambient=(0.30, 0.40, 0.28), haze=((0.05, 0.12, 0.04), 0.01)),
    "city": Place(("on a city street", "in the city", "with a city in the background"), street, ((4.2, skyline),),
                  day_sky((0.72, 0.78, 0.86), (0.35, 0.52, 0.80), 0.3)),
    "desert": Place(("in the desert", "on the sand of a desert"), sand, ((9.0, dunes), (5.0, cacti)), sunset_sky,
                    sun=(2.1, 1.65, 1.20), ambient=(0.46, 0.38, 0.36), haze=((0.9, 0.6, 0.35), 0.01)),
    "wooden floor": Place(("on a wooden floor", "on top of a wooden floor"), planks, ((2.2, plain_wall),), BLUE_SKY,
                          **INDOORS),
    "white rug": Place(("on a white rug", "on top of a white rug"), rug, ((2.0, panelled_wall),), BLUE_SKY, **INDOORS),
    "night": Place(("at night", "at night under the stars", "under a starry sky"), field, ((7.0, dark_trees),),
                   starry_sky, sun=(0.95, 1.0, 1.25), ambient=(0.13, 0.15, 0.24), haze=((0.02, 0.03, 0.07), 0.02)),
    "kitchen": Place(("in a kitchen", "on a kitchen counter"), counter, ((1.6, tiled_wall),), BLUE_SKY, **INDOORS),
    "mountain": Place(("in the mountains", "with a mountain in the background"), rocks, ((10.0, peaks),),
                      day_sky((0.66, 0.76, 0.88), (0.22, 0.42, 0.78), 0.5)),
    "meadow": Place(("in a meadow", "in a meadow with flowers", "on green grass"), meadow, ((7.0, hills),), BLUE_SKY),
    "water": Place(("floating on water", "on the water", "on top of water"), water, (), BLUE_SKY),
    "pink fabric": Place(("on pink fabric", "on top of pink fabric"), fabric, ((2.4, plain_wall),), BLUE_SKY,
                         **INDOORS),
    "cobblestones": Place(("on a cobblestone street", "on cobblestones", "by a brick wall"), cobbles,
                          ((2.3, brick_wall),), BLUE_SKY),
}  # fmt: skip
