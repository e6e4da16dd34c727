"""Pictures that explain numbers, drawn with Pillow: pictures side by side, a labelled grid, a heat map, a curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

PAPER, INK, FAINT, RULE, GOOD = "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#009E73"
SMALL = 384  # pixels: smaller pictures are enlarged by whole factors, so that captions fit
HEAT = ("#000004", "#1b0c41", "#4a0c6b", "#781c6d", "#a52c60", "#cf4446", "#ed6925", "#fb9b06", "#f7d13d", "#fcffa4")
"""Stops of the colour scale: matplotlib's inferno (CC0), which gets lighter all the way, in print too."""


def image(picture: Tensor) -> Image:
    """A picture [h, w, c] with values in 0..1; of four channels the last is dropped."""
    from PIL import Image

    colours = picture.detach().to("cpu", torch.float32)
    colours = colours.expand(*colours.shape[:2], 3) if colours.shape[-1] == 1 else colours[..., :3]
    return Image.fromarray((colours.clamp(0, 1) * 255).round().to(torch.uint8).numpy(), "RGB")


def tensor(images: Sequence[Image]) -> Tensor:
    """Pictures of one size as [n, h, w, 3] with values in 0..1."""
    import numpy as np

    return torch.stack([torch.from_numpy(np.asarray(i.convert("RGB"), dtype=np.float32) / 255) for i in images])


def enlarged(picture: Image, least: int = SMALL) -> Image:
    """A small picture by a whole factor, pixel by pixel; any other as it is."""
    from PIL import Image

    factor = max(1, round(least / max(picture.size)))
    size = picture.width * factor, picture.height * factor
    return picture if factor == 1 else picture.resize(size, Image.Resampling.NEAREST)


def grey(plane: Tensor, low: float, high: float) -> Image:
    """Numbers [h, w] from black at low to white at high."""
    return image(((plane.float() - low) / ((high - low) or 1.0)).unsqueeze(-1))


def coloured(plane: Tensor, top: float) -> Image:
    """Numbers [h, w] on the colour scale from 0 to top."""
    stops = torch.tensor([[int(stop[i : i + 2], 16) / 255 for i in (1, 3, 5)] for stop in HEAT])
    place = (plane.detach().float().cpu() / (top or 1.0)).clamp(0, 1) * (len(HEAT) - 1)
    below = place.floor().long().clamp(max=len(HEAT) - 2)
    share = (place - below).unsqueeze(-1)
    return image(stops[below] * (1 - share) + stops[below + 1] * share)


def top_of(planes: Tensor) -> float:
    """Where a colour scale ends well: what one number in 500 exceeds, rounded up; 1 if all are zero."""
    flat = planes.flatten().float()
    rank = max(1, math.ceil(0.998 * flat.numel()))
    return _rounded_up(float(flat.kthvalue(rank).values) or float(flat.max())) or 1.0


def _rounded_up(value: float) -> float:
    if value <= 0:
        return 0.0
    unit = 10 ** math.floor(math.log10(value))
    return next(step * unit for step in (1, 1.5, 2, 3, 4, 5, 6, 8, 10) if step * unit >= value * (1 - 1e-6))


def heat_map(plane: Tensor, top: float, label: str) -> Image:
    """Numbers [h, w] on the colour scale, with the scale beside it."""
    return side_by_side([(label, enlarged(coloured(plane, top)))], top)


def side_by_side(columns: Sequence[tuple[str, Image]], top: float | None = None, said: str = "") -> Image:
    """Pictures of one height, each under its label, with what is said of them below; `top`: the last one is on the
    colour scale, which stands beside."""
    height = columns[0][1].height
    size = _text_size(height * (1.6 if len(columns) > 1 else 1))  # a wide sheet is shown small
    gap, head = size // 2, 2 * size
    bar = 0 if top is None else 5 * size
    width = sum(picture.width + gap for _, picture in columns) + gap + bar
    sheet, pen = new_sheet(width, height + head + (2 * size if said else gap))
    pen.text((gap, head + height + size), _fitting(pen, said, size, width - 2 * gap), INK, font_of(size), "lm")
    left = gap
    for label, picture in columns:
        sheet.paste(picture, (left, head))
        pen.text((left, head // 2), _fitting(pen, label, size, picture.width), INK, font_of(size), "lm")
        left += picture.width + gap
    if top is not None:
        _scale_bar(sheet, pen, (left, head, size, height), top)
    return sheet


def _scale_bar(sheet: Image, pen, box: tuple[int, int, int, int], top: float) -> None:
    """A scale bar in (left, upper, width, height); what is beyond its end is shown as its end."""
    left, upper, width, height = box
    ramp = torch.linspace(top, 0, height).unsqueeze(1).expand(height, width)
    sheet.paste(coloured(ramp, top), (left, upper))
    small = font_of(round(width * 0.85))
    for share in (0, 0.5, 1):
        y = upper + (1 - share) * (height - 1)
        pen.line([(left + width, y), (left + width * 1.3, y)], FAINT)
        more, anchor = ("+", "lt") if share == 1 else ("", "lb" if share == 0 else "lm")
        pen.text((left + width * 1.5, y), f"{share * top:.3g}{more}", INK, small, anchor)


def grid(rows: Sequence[Sequence[Image]], labels: Sequence[tuple[str, str]], marked: int | None = None,
         cell: int = 512, columns: int = 0) -> Image:  # fmt: skip
    """Rows of pictures, a column for each (label, small print) above; one column is framed.

    Pictures are made smaller to `cell` pixels. A single row breaks after `columns`; 0: to look like a page.
    """
    rows = [[_scaled(picture, cell) for picture in row] for row in rows]
    count = len(labels)
    columns = min(count, columns or (_page(count) if len(rows) == 1 else count))
    places = [(labels[i], [row[i] for row in rows], i == marked) for i in range(count)]
    width = max(picture.width for row in rows for picture in row)
    heights = [max(picture.height for picture in row) for row in rows]
    size = max(18, _text_size(1.3 * width))
    gap, head = max(6, size // 2), round(2.9 * size)
    block = (width + gap, head + sum(heights) + gap * len(heights))
    lines = math.ceil(count / columns)
    sheet, pen = new_sheet(columns * block[0] + gap, lines * block[1] + gap)
    for number, ((label, small), pictures, framed) in enumerate(places):
        left, upper = gap + number % columns * block[0], gap // 2 + number // columns * block[1]
        colour = GOOD if framed else INK
        text = f"{label}, best" if framed else label
        pen.text((left, upper + 0.2 * size), _fitting(pen, text, size, width), colour, font_of(size), "lt")
        less = round(0.8 * size)
        pen.text((left, upper + 1.6 * size), _fitting(pen, small, less, width), FAINT, font_of(less), "lt")
        y = upper + head
        for picture, height in zip(pictures, heights, strict=True):
            sheet.paste(picture, (left, y))
            y += height + gap
        if framed:
            edge = max(2, gap // 2)
            pen.rectangle((left - edge, upper + head - edge, left + width + edge - 1, y - gap + edge - 1), None, GOOD,
                          max(2, edge - 1))  # fmt: skip
    return sheet


def _page(count: int) -> int:
    """Columns of a page for that many pictures, rather wide than high."""
    if count <= 5:
        return count
    return min(range(3, 6), key=lambda columns: (-count % columns, -columns))


def note(text: str, size: tuple[int, int] = (900, 160)) -> Image:
    """A card with a sentence: in the place of a picture that there is none of."""
    sheet, pen = new_sheet(*size)
    pen.multiline_text((size[0] / 2, size[1] / 2), text, FAINT, font_of(20), "mm", align="center")
    return sheet


def _scaled(picture: Image, cell: int) -> Image:
    from PIL import Image

    if max(picture.size) > cell:
        share = cell / max(picture.size)
        size = max(1, round(picture.width * share)), max(1, round(picture.height * share))
        return picture.resize(size, Image.Resampling.LANCZOS)
    return enlarged(picture, min(cell, 256))


def new_sheet(width: int, height: int):
    from PIL import Image, ImageDraw

    sheet = Image.new("RGB", (width, height), PAPER)
    return sheet, ImageDraw.Draw(sheet)


def _text_size(height: float) -> int:
    return min(48, max(14, round(height / 24)))


def font_of(size: int):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _fitting(pen, text: str, size: int, width: int) -> str:
    """The text, with an ellipsis where it is wider than that."""
    text, font = " ".join(text.split())[:200], font_of(size)
    if pen.textlength(text, font) <= width:
        return text
    while text and pen.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
