"""Procedural pictures with captions: one or two flat shapes on a plain or patterned background, 64x64."""

import math
import random

import torch

from .codec import BACKGROUNDS, COLOURS, PATTERNS, SHAPES, SIZES

SIDE = 64
TWO_OBJECTS = 0.2
RADIUS = {"small": 11.0, "big": 16.0}  # pixels
JITTER = 1.5  # pixels, each axis
RGB = {
    "red": (0.90, 0.11, 0.14), "orange": (0.98, 0.52, 0.05), "yellow": (0.99, 0.88, 0.12), "green": (0.10, 0.66, 0.22),
    "cyan": (0.10, 0.80, 0.90), "blue": (0.12, 0.28, 0.92), "purple": (0.52, 0.14, 0.72), "pink": (0.98, 0.45, 0.70),
    "white": (0.97, 0.97, 0.97), "black": (0.08, 0.08, 0.08), "gray": (0.50, 0.50, 0.50), "navy": (0.06, 0.10, 0.32),
    "brown": (0.40, 0.25, 0.14), "cream": (0.97, 0.91, 0.76), "mint": (0.72, 0.94, 0.82), "lilac": (0.82, 0.76, 0.95),
}  # fmt: skip
CELLS = {
    (0, 0): "top left", (1, 0): "top", (2, 0): "top right",
    (0, 1): "left", (1, 1): "center", (2, 1): "right",
    (0, 2): "bottom left", (1, 2): "bottom", (2, 2): "bottom right",
}  # fmt: skip
_MIN_CONTRAST = 0.45  # distance of object and background colour in RGB


def _box(x, y, w, h):
    return torch.maximum(x.abs() - w, y.abs() - h)


def _triangle(x, y):
    y = y - 0.2
    return torch.maximum(0.866 * x.abs() - 0.5 * y, y) - 0.58


def _star(x, y):
    sector = 2 * math.pi / 5
    a = torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2
    r = torch.hypot(x, y)
    tip, dent = 1.1, 0.46
    ex, ey = dent * math.cos(sector / 2) - tip, dent * math.sin(sector / 2)
    return ((r * a.cos() - tip) * ey - r * a.abs().sin() * ex) / math.hypot(ex, ey)


def _heart(x, y):
    x, y = x.abs(), y - 0.08
    return torch.minimum((x + y.abs() - 0.8) / math.sqrt(2), torch.hypot(x - 0.4, y + 0.4) - 0.566)


def _arrow(x, y):
    head = torch.maximum(0.707 * (x.abs() - y) - 0.707, y)
    return torch.minimum(head, _box(x, y - 0.45, 0.34, 0.5))


SDF = {  # signed distance in units of the radius, y down
    "circle": lambda x, y: torch.hypot(x, y) - 0.95,
    "square": lambda x, y: _box(x, y, 0.85, 0.85),
    "triangle": _triangle,
    "star": _star,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.7).abs() - 0.27,
    "heart": _heart,
    "diamond": lambda x, y: (x.abs() / 0.75 + y.abs() - 1) * 0.6,
    "cross": lambda x, y: torch.minimum(_box(x, y, 0.95, 0.32), _box(x, y, 0.32, 0.95)),
    "moon": lambda x, y: torch.maximum(torch.hypot(x, y) - 0.97, 0.78 - torch.hypot(x - 0.45, y + 0.1)),
    "arrow": _arrow,
}


def _background(name, pattern):
    """[3, 64, 64], its pattern aligned to the 8-pixel tokens of the model."""
    base = torch.tensor(RGB[name])
    shade = base * 0.78 if base.mean() > 0.4 else base + 0.16
    i = torch.arange(SIDE)
    col, row = (i // 8 % 2).expand(SIDE, SIDE), (i // 8 % 2).expand(SIDE, SIDE).T
    dots = torch.hypot((i % 16 - 7.5)[None], (i % 16 - 7.5)[:, None]) < 4
    mask = {"plain": torch.zeros(SIDE, SIDE), "stripes": col, "checker": col ^ row, "dots": dots}[pattern].float()
    return base[:, None, None] * (1 - mask) + shade[:, None, None] * mask


_FIELDS = torch.stack([torch.stack([_background(b, p) for p in PATTERNS]) for b in BACKGROUNDS])  # [8, 4, 3, 64, 64]


def scene(rng):
    """A random scene: background, pattern and objects (shape, colour, size, cell, dx, dy)."""
    background, pattern = rng.choice(BACKGROUNDS), rng.choice(PATTERNS)
    colours = [c for c in COLOURS if math.dist(RGB[c], RGB[background]) > _MIN_CONTRAST]
    cells = [rng.choice(tuple(CELLS))]
    if rng.random() < TWO_OBJECTS:
        far = [c for c in CELLS if max(abs(c[0] - cells[0][0]), abs(c[1] - cells[0][1])) == 2]
        cells += [rng.choice(far)] if far else []
    objects = [
        (rng.choice(SHAPES), rng.choice(colours), rng.choice(SIZES), c, *(rng.uniform(-JITTER, JITTER) for _ in "xy"))
        for c in cells
    ]
    return background, pattern, objects


def caption(background, pattern, objects):
    """The sentence that names everything in a scene except the jitter."""
    things = [f"{size} {colour} {shape} {CELLS[cell]}" for shape, colour, size, cell, _, _ in objects]
    return f"{' and '.join(things)} on {background} {pattern}"


def draw(scenes):
    """Anti-aliased pictures of scenes: [B, 3, 64, 64] in [0, 1]."""
    canvas = torch.stack([_FIELDS[BACKGROUNDS.index(b), PATTERNS.index(p)] for b, p, _ in scenes])
    i = torch.arange(SIDE) + 0.5
    for layer in range(max(len(objects) for _, _, objects in scenes)):
        groups = {}
        for n, (_, _, objects) in enumerate(scenes):
            if layer < len(objects):
                groups.setdefault(objects[layer][0], []).append((n, objects[layer]))
        for shape, members in groups.items():
            index = [n for n, _ in members]
            radius = torch.tensor([RADIUS[o[2]] for _, o in members]).view(-1, 1, 1)
            cell = torch.tensor([o[3] for _, o in members]).view(-1, 2, 1, 1)
            jitter = torch.tensor([o[4:] for _, o in members]).view(-1, 2, 1, 1)
            centre = SIDE / 2 + (cell - 1) * (SIDE / 2 - 1 - radius.unsqueeze(1)) + jitter
            distance = SDF[shape]((i[None, :] - centre[:, 0]) / radius, (i[:, None] - centre[:, 1]) / radius)
            alpha = (0.5 - distance * radius).clamp(0, 1).unsqueeze(1)
            colour = torch.tensor([RGB[o[1]] for _, o in members]).view(-1, 3, 1, 1)
            canvas[index] = canvas[index] * (1 - alpha) + colour * alpha
    return canvas


def batch(size, seed):
    """Pictures [size, 3, 64, 64] and their captions; the same seed gives the same batch."""
    rng = random.Random(seed)
    scenes = [scene(rng) for _ in range(size)]
    return draw(scenes), [caption(*s) for s in scenes]
