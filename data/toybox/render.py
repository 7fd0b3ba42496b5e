"""Render scenes by ray marching the toys' signed distances: batched, on any device, in plain torch."""

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from data.toybox.places import PLACES, SKY, Place, paint
from data.toybox.scenes import SEMANTIC_CLASSES, Scene
from data.toybox.shapes import CENTRE, RADIUS, SHAPES
from data.toybox.surfaces import pattern_weight

SIZE, SUPERSAMPLING = 128, 2
TAN_HALF_VIEW = 0.335
MARCH_STEPS, SHADOW_STEPS = 48, 16
HIT = 1.5e-3


@dataclasses.dataclass
class Rays:
    """Rays of a batch of scenes: origins (batch, 3) and unit directions (batch, rays, 3)."""

    origin: Tensor
    direction: Tensor

    def at(self, distance: Tensor) -> Tensor:
        return self.origin[:, None] + self.direction * distance[..., None]


def column(values: Sequence[float], device: torch.device | str) -> Tensor:
    """(batch, 1), converted from float64 on the CPU so that every device starts from the same numbers."""
    return torch.tensor(values, dtype=torch.float64).to(torch.float32).to(device)[:, None]


def camera_rays(scenes: Sequence[Scene], width: int, height: int, device: torch.device | str) -> Rays:
    """Rays through the centres of width x height samples, row by row.

    The shorter side always has the same field of view, so the centre of a rectangle is what a square shows.
    """
    short = min(width, height)
    down, right = (
        (torch.arange(side, dtype=torch.float32, device=device) + 0.5 - (side - short) / 2) / short * 2 - 1
        for side in (height, width)
    )
    down, right = (grid.reshape(-1) for grid in torch.meshgrid(down, right, indexing="ij"))
    origins, directions = [], []
    for view in (scene.view for scene in scenes):
        cos_e, sin_e = math.cos(view.elevation), math.sin(view.elevation)
        cos_a, sin_a = math.cos(view.azimuth), math.sin(view.azimuth)
        back = (sin_a * cos_e, sin_e, cos_a * cos_e)
        side_axis, up = (cos_a, 0.0, -sin_a), (-sin_a * sin_e, cos_e, -cos_a * sin_e)
        origins.append([back[0] * view.distance, back[1] * view.distance + CENTRE, back[2] * view.distance])
        across, upward = (right - view.shift[0]) * TAN_HALF_VIEW, (-down - view.shift[1]) * TAN_HALF_VIEW
        parts = [across * side_axis[i] + upward * up[i] - back[i] for i in range(3)]
        direction = torch.stack(parts, -1)
        directions.append(direction / torch.sqrt((direction * direction).sum(-1, keepdim=True)))
    return Rays(torch.tensor(origins, dtype=torch.float32, device=device), torch.stack(directions))


class Toys:
    """For a set of rays, the toys of their scenes, all of one class; computes distances in world coordinates.

    Args:
        kind: the class.
        scenes: the scenes of the batch.
        index: the scene that each ray belongs to, (rays,).
    """

    def __init__(self, kind: str, scenes: Sequence[Scene], index: Tensor):
        device = index.device
        self.shape = SHAPES[kind]
        rows = [[math.cos(s.view.yaw), math.sin(s.view.yaw), *s.subject.shape] for s in scenes]
        table = torch.tensor(rows, dtype=torch.float32, device=device)
        self.columns = [table[index, i] for i in range(table.shape[1])]

    def select(self, keep: Tensor) -> "Toys":
        selected = object.__new__(Toys)
        selected.shape, selected.columns = self.shape, [c[keep] for c in self.columns]
        return selected

    def local(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """World points (rays, 3) in the toys' coordinates."""
        cos, sin = self.columns[:2]
        return p[:, 0] * cos - p[:, 2] * sin, p[:, 1], p[:, 0] * sin + p[:, 2] * cos

    def parts(self, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.shape(*self.local(p), self.columns[2:])

    def distance(self, p: Tensor) -> Tensor:
        body, accent, detail = self.parts(p)
        return torch.minimum(torch.minimum(body, accent), detail)

    def normal(self, p: Tensor) -> Tensor:
        """Unit normals, by finite differences over a tetrahedron."""
        total = torch.zeros_like(p)
        for signs in ((1, -1, -1), (-1, -1, 1), (-1, 1, -1), (1, 1, 1)):
            corner = torch.tensor(signs, dtype=p.dtype, device=p.device)
            total = total + corner * self.distance(p + 2e-3 * corner)[:, None]
        return total / torch.sqrt((total * total).sum(-1, keepdim=True) + 1e-12)


def sphere_span(origin: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Distances at which rays (rays, 3) enter and leave the sphere around the toys; entry > exit for a miss."""
    centred = origin - torch.tensor([0.0, CENTRE, 0.0], device=origin.device)
    b = (centred * direction).sum(-1)
    c = (centred * centred).sum(-1) - RADIUS * RADIUS
    inside = b * b - c
    half = torch.sqrt(inside.clamp(min=0))
    return torch.where(inside > 0, (-b - half).clamp(min=0), 1.0), torch.where(inside > 0, -b + half, -1.0)


def march(toys: Toys, origin: Tensor, direction: Tensor, near: Tensor, far: Tensor) -> Tensor:
    """Distance along each ray (rays,) to the toy's surface; infinity if the ray misses it."""
    result = torch.full_like(near, math.inf)
    active, along = torch.arange(len(near), device=near.device), near
    for step in range(MARCH_STEPS):
        distance = toys.distance(origin + direction * along[:, None])
        hit = distance < HIT
        if step % 6 == 5 or step == MARCH_STEPS - 1:
            if step == MARCH_STEPS - 1:  # accept grazing rays that are almost at the surface
                hit = distance < 8 * HIT
            result[active[hit]] = along[hit]
            going = ~hit & (along < far)
            active, along, far, distance = active[going], along[going], far[going], distance[going]
            origin, direction, toys = origin[going], direction[going], toys.select(going)
            if not len(active):
                break
        along = along + torch.where(distance < HIT, 0.0, distance)
    return result


def shadow(toys: Toys, origin: Tensor, light: Tensor) -> Tensor:
    """The share of light that reaches points (rays, 3), 0 to 1, with soft edges.

    Args:
        light: direction towards the light, (rays, 3).
    """
    near, far = sphere_span(origin, light)
    near = near.clamp(min=0.02)
    lit = torch.ones_like(near)
    keep = torch.nonzero(far > near)[:, 0]
    toys, origin, light, along, far = toys.select(keep), origin[keep], light[keep], near[keep], far[keep]
    visible = torch.ones_like(along)
    for _ in range(SHADOW_STEPS):
        distance = toys.distance(origin + light * along[:, None])
        visible = torch.minimum(visible, torch.where(along < far, 0.5 + 7.0 * distance / along, 1.0))
        along = along + distance.clamp(0.02, 0.25)
    lit[keep] = visible.clamp(0, 1)
    return lit * lit * (3 - 2 * lit)


def light_directions(scenes: Sequence[Scene], device: torch.device | str) -> Tensor:
    """Unit vectors (batch, 3) towards the light, which is on the camera's side."""
    rows = [
        (math.cos(e) * math.sin(a), math.sin(e), math.cos(e) * math.cos(a)) for a, e in (s.view.sun for s in scenes)
    ]
    return torch.tensor(rows, dtype=torch.float32, device=device)


def render_place(place: Place, scenes: Sequence[Scene], rays: Rays) -> tuple[Tensor, Tensor, Tensor]:
    """Render scenes that share a place, without their toys.

    Returns:
        Colour (batch, rays, 3), lit but without the toys' shadows; semantic class (batch, rays); distance to the ground
        (batch, rays), infinite where the ground is not visible.
    """
    origin, d = rays.origin, rays.direction
    device = d.device
    v = tuple(column([s.view.variation[i] for s in scenes], device) for i in range(4))
    sky = place.sky(d[..., 0], d[..., 1], d[..., 2], v)
    colour, semantic = sky, torch.full(d.shape[:-1], SKY, dtype=torch.uint8, device=device)
    sun, ambient = paint(place.sun, d[..., 0]), paint(place.ambient, d[..., 0])
    upright = 0.42 * sun + ambient
    depth = torch.full_like(d[..., 0], math.inf)
    for distance, backdrop in place.backdrops:
        t = (-distance - origin[:, None, 2]) / d[..., 2].clamp(max=-1e-3)
        p = rays.at(t)
        surface, covered, kind = backdrop(p[..., 0], p[..., 1], v)
        covered = covered & (p[..., 1] > 0)
        colour = torch.where(covered[..., None], surface * upright, colour)
        semantic = torch.where(covered, kind, semantic)
        depth = torch.where(covered, t, depth)
    t = -origin[:, None, 1] / d[..., 1].clamp(max=-1e-3)
    t = torch.where(d[..., 1] < -1e-3, t, math.inf)
    p = rays.at(t.clamp(max=200.0))
    surface, kind = place.ground(p[..., 0], p[..., 2], v)
    slant = light_directions(scenes, device)[:, 1, None, None]
    lit = surface * (sun * slant + ambient)
    haze, thickness = place.haze
    fade = 1 - torch.exp(-thickness * t.clamp(max=200.0))
    lit = lit + (paint(haze, fade) - lit) * fade[..., None]
    visible = t < depth
    colour = torch.where(visible[..., None], lit, colour)
    return colour, torch.where(visible, kind, semantic), torch.where(visible, t, math.inf)


def render_toys(
    kind: str, scenes: Sequence[Scene], rays: Rays, colour: Tensor, semantic: Tensor, ground: Tensor
) -> None:
    """Add the toys, all of one class, and their shadows to the outputs of ``render_place``, in place."""
    device = colour.device
    batch, count = ground.shape
    index = torch.arange(batch, device=device).repeat_interleave(count)
    origin, direction = rays.origin[index], rays.direction.reshape(-1, 3)
    light = light_directions(scenes, device)
    flat_colour, flat_semantic = colour.reshape(-1, 3), semantic.reshape(-1)
    flat_ground = ground.reshape(-1)

    near, far = sphere_span(origin, direction)
    chosen = torch.nonzero(far > near)[:, 0]
    toys = Toys(kind, scenes, index[chosen])
    # Rays end at the ground.
    far = torch.minimum(far, flat_ground)[chosen]
    toy_distance = march(toys, origin[chosen], direction[chosen], near[chosen], far)
    on_toy = torch.isfinite(toy_distance)
    hit = chosen[on_toy]

    # Shadows and ambient occlusion on the ground near the toy.
    open_ground = torch.isfinite(flat_ground)
    open_ground[hit] = False
    floor = torch.nonzero(open_ground)[:, 0]
    points = origin[floor] + direction[floor] * flat_ground[floor, None]
    close = points[:, 0] ** 2 + points[:, 2] ** 2 < 9.0
    floor, points = floor[close], points[close]
    below = Toys(kind, scenes, index[floor])
    reach = shadow(below, points, light[index[floor]])
    contact = (0.35 + 2.2 * below.distance(points)).clamp(0, 1)
    suns = torch.tensor([PLACES[s.view.place].sun for s in scenes], device=device)
    ambients = torch.tensor([PLACES[s.view.place].ambient for s in scenes], device=device)
    slant = light[:, 1, None]
    share = (suns * slant / (suns * slant + ambients)).mean(-1)[index[floor]]
    flat_colour[floor] *= ((1 - share * (1 - reach)) * (0.45 + 0.55 * contact))[:, None]

    # The toys themselves.
    toys = toys.select(on_toy)
    scene = index[hit]
    p = origin[hit] + direction[hit] * toy_distance[on_toy, None]
    normal = toys.normal(p)
    parts = torch.stack(toys.parts(p), -1)
    part = parts.argmin(-1)
    x, y, z = toys.local(p)
    weight = torch.zeros_like(x)
    numbers = [[s.subject.scale, s.subject.phase] for s in scenes]
    scale, phase = torch.tensor(numbers, dtype=torch.float32, device=device)[scene].unbind(-1)
    patterns = sorted({s.subject.pattern for s in scenes})
    which = torch.tensor([patterns.index(s.subject.pattern) for s in scenes], device=device)[scene]
    for number, pattern in enumerate(patterns):
        weight = torch.where(which == number, pattern_weight(pattern, x, y, z, scale, phase), weight)
    paints = torch.tensor([[*s.subject.rgb, s.subject.neutral] for s in scenes], device=device)[scene]
    body = paints[:, 0] + (paints[:, 1] - paints[:, 0]) * weight[:, None]
    albedo = torch.where((part == 0)[:, None], body, torch.where((part == 1)[:, None], paints[:, 1], paints[:, 2]))

    towards = light[scene]
    facing = (normal * towards).sum(-1).clamp(min=0)
    start = p + normal * 0.02
    reach = shadow(toys, start, towards)
    crevice = (toys.distance(p + normal * 0.12) / 0.12).clamp(0.3, 1)
    sky_share = 0.5 + 0.5 * normal[:, 1]
    bounce = 0.35 * (1 - sky_share)
    light_in = suns[scene] * (facing * reach)[:, None] + ambients[scene] * ((sky_share + bounce) * crevice)[:, None]
    halfway = towards - direction[hit]
    halfway = halfway / torch.sqrt((halfway * halfway).sum(-1, keepdim=True))
    gloss = (normal * halfway).sum(-1).clamp(min=0) ** 40 * 0.45 * reach
    rim = (1 + (normal * direction[hit]).sum(-1)).clamp(0, 1) ** 3 * 0.22 * crevice
    flat_colour[hit] = albedo * light_in + suns[scene] * gloss[:, None] + ambients[scene] * rim[:, None]
    flat_semantic[hit] = SEMANTIC_CLASSES.index(kind)


def tone(linear: Tensor) -> Tensor:
    """Linear light to display values 0 to 1: compressed highlights, then sRGB's gamma."""
    compressed = linear * (1 + linear / 6.0) / (1 + 0.75 * linear)
    return compressed.clamp(1e-6, 1) ** (1 / 2.2)


@torch.no_grad()
def render(
    scenes: Sequence[Scene],
    size: int | tuple[int, int] = SIZE,
    device: torch.device | str = "cpu",
    batch_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Render scenes.

    Args:
        scenes: the scenes to render.
        size: (width, height) of the images in pixels, or the side length of squares. A rectangle shows more of the
            scene along its longer side than a square; the toy keeps its size relative to the shorter side.
        device: where to render.
        batch_size: scenes rendered at a time; 8 on the CPU and 64 elsewhere by default.

    Returns:
        Images (scenes, 3, height, width) and semantic maps (scenes, height, width) with indices into
        ``SEMANTIC_CLASSES``, both uint8 on ``device``.
    """
    width, height = (size, size) if isinstance(size, int) else size
    batch_size = batch_size or (8 if torch.device(device).type == "cpu" else 64)
    images = torch.empty((len(scenes), 3, height, width), dtype=torch.uint8, device=device)
    maps = torch.empty((len(scenes), height, width), dtype=torch.uint8, device=device)
    order = sorted(range(len(scenes)), key=lambda i: (scenes[i].subject.kind, scenes[i].view.place, i))
    by_kind: dict[str, list[int]] = {}
    for i in order:
        by_kind.setdefault(scenes[i].subject.kind, []).append(i)
    for kind, members in by_kind.items():
        for first in range(0, len(members), batch_size):
            chosen = members[first : first + batch_size]
            rays = camera_rays([scenes[i] for i in chosen], width * SUPERSAMPLING, height * SUPERSAMPLING, device)
            colour, semantic = _render_samples(kind, [scenes[i] for i in chosen], rays)
            rows = torch.tensor(chosen, device=device)
            images[rows], maps[rows] = _pixels(colour, semantic, width, height)
    return images, maps


def _render_samples(kind: str, scenes: list[Scene], rays: Rays) -> tuple[Tensor, Tensor]:
    """Colour (batch, rays, 3) and semantic class (batch, rays) of scenes with toys of one class."""
    count, device = rays.direction.shape[1], rays.direction.device
    colour = torch.empty((len(scenes), count, 3), device=device)
    semantic = torch.empty((len(scenes), count), dtype=torch.uint8, device=device)
    ground = torch.empty((len(scenes), count), device=device)
    for place in dict.fromkeys(scene.view.place for scene in scenes):
        numbers = [i for i, scene in enumerate(scenes) if scene.view.place == place]
        rows = torch.tensor(numbers, device=device)
        part = Rays(rays.origin[rows], rays.direction[rows])
        colour[rows], semantic[rows], ground[rows] = render_place(PLACES[place], [scenes[i] for i in numbers], part)
    render_toys(kind, scenes, rays, colour, semantic, ground)
    colour *= column([scene.view.exposure for scene in scenes], device)[..., None]
    return colour, semantic


def _pixels(colour: Tensor, semantic: Tensor, width: int, height: int) -> tuple[Tensor, Tensor]:
    """Average the samples of each pixel; its class is the most frequent class of its samples."""
    batch, s = len(colour), SUPERSAMPLING
    averaged = tone(colour).reshape(batch, height, s, width, s, 3).mean(dim=(2, 4)).permute(0, 3, 1, 2)
    samples = semantic.reshape(batch, height, s, width, s).permute(0, 1, 3, 2, 4).reshape(batch, height, width, s * s)
    return (averaged * 255 + 0.5).clamp(0, 255).to(torch.uint8), samples.mode(dim=-1).values
