"""A layer map as a picture, drawn with Pillow: the same as in the browser, for files, graphs and READMEs."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..header import shown
from ..tiles import Mosaic, Tile
from . import mosaic_layout
from .mosaic_colours import STEPS, WAYS, Scheme, scheme
from .mosaic_layout import Band, Panel

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

MOST_TILES, MOST_HEIGHT, LISTED = 6000, 5000, 24  # tiles and pixels of a picture; layers that are named one by one
SPARE = 1000  # pixels below, for what ends a picture
MOST_LEVELS = 6  # of names above each other
MARGIN, GAP, LABELS = 28, 18, 250  # pixels: around, between bands, most for the names of rows
TEXT, SMALL, TITLE = 15, 13, 24  # heights of letters
TILE = {"least": 9, "most": 30, "high": 24, "letter": 12}
TITLES = {
    "format": "colour: format",
    "error": "colour: {measure}{corrected}",
    "sensitivity": "colour: what the coarsest format would do to the model",
    "size": "colour: size",
    "kernel": "colour: kernel",
}


@dataclass(frozen=True)
class Theme:
    """Colours of a page."""

    paper: str
    ink: str
    faint: str
    rule: str
    empty: str  # a tile of which nothing is known


THEMES = {
    "light": Theme("#FFFFFF", "#1F2328", "#59636E", "#D1D9E0", "#EEF0F2"),
    "dark": Theme("#1B1D21", "#E6E8EB", "#9BA3AD", "#3A3F46", "#2C3036"),
}


def draw(mosaic: Mosaic, by: str = "format", theme: str = "light", width: int = 1200) -> Image:
    """The map coloured by format, error, sensitivity, size or kernel. Raises ValueError for another word, RuntimeError
    if Pillow is missing."""
    Image, ImageDraw, _ = _pillow()
    if theme not in THEMES:
        raise ValueError(f"theme {theme!r}: must be one of {', '.join(THEMES)}")
    sheet = Image.new("RGB", (width, MOST_HEIGHT + SPARE), THEMES[theme].paper)
    height = _Page(ImageDraw.Draw(sheet), THEMES[theme], width, scheme(by, mosaic.tiles)).everything(mosaic, by)
    return sheet.crop((0, 0, width, min(height, sheet.height)))


def check_path(path: Path) -> None:
    """Raises ValueError if no picture can be written there, RuntimeError if Pillow is missing."""
    _pillow()
    if path.suffix.lower() != ".png":
        raise ValueError(f"{path}: name it .png, that is what is written")
    if path.exists():
        raise ValueError(f"{path}: already exists; choose another name")


def save(picture: Image, path: Path) -> Path:
    """Writes a PNG. Raises ValueError if the file exists."""
    check_path(path)
    made = io.BytesIO()
    picture.save(made, "PNG", optimize=True)
    with open(path, "xb") as file:
        file.write(made.getvalue())
    return path


class _Page:
    """What is drawn from top to bottom; `y` is where the next thing goes."""

    def __init__(self, pen: ImageDraw, theme: Theme, width: int, scheme: Scheme):
        self.pen, self.theme, self.width, self.scheme = pen, theme, width, scheme
        self.y = MARGIN

    def everything(self, mosaic: Mosaic, by: str) -> int:
        """Height of the whole."""
        self.text(MARGIN, self.y, shown(mosaic.title), TITLE, self.theme.ink, self.width - 2 * MARGIN)
        self.y += TITLE + 16
        self.facts(mosaic.facts)
        corrected = ", with its correction" if any(t.corrected is not None for t in mosaic.tiles) else ""
        self.legend(TITLES[by].format(measure=mosaic.measure, corrected=corrected))
        tiles = mosaic.tiles[:MOST_TILES]
        panels, other = mosaic_layout.arrange([shown(tile.name) for tile in tiles])
        left = len(mosaic.tiles) - len(tiles)
        left += sum(self.panel(panel, tiles) for panel in panels)
        if other:
            left += self.others([tiles[i] for i in other])
        if not tiles:
            self.line("no layers")
        if left:
            self.line(f"{left} more layers are not drawn")
        if any(tile.edited for tile in tiles):
            self.line("framed: edited by hand")
        return self.y + MARGIN - 10

    # Words

    def text(self, x: float, y: float, words: str, size: int, colour: str, room: float, right: bool = False) -> float:
        """Writes words on one line, the end of what is too long replaced by an ellipsis; their width."""
        font = _font(size)
        if self.pen.textlength(words, font) > room:
            fits = max(0, int(len(words) * room / self.pen.textlength(words, font)) + 3)
            words = words[:fits]
            while words and self.pen.textlength(words + "…", font) > room:
                words = words[:-1]
            words += "…"
        wide = self.pen.textlength(words, font)
        self.pen.text((round(x - wide if right else x), round(y)), words, colour, font)
        return wide

    def line(self, words: str) -> None:
        self.text(MARGIN, self.y, words, SMALL, self.theme.faint, self.width - 2 * MARGIN)
        self.y += SMALL + 12

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """Each as a word above its value."""
        x = MARGIN
        for name, value in facts:
            name, value = shown(name), shown(value)
            wide = max(self.pen.textlength(name, _font(SMALL)), self.pen.textlength(value, _font(TEXT + 3)))
            wide = min(wide, 360)
            if x + wide > self.width - MARGIN and x > MARGIN:
                x, self.y = MARGIN, self.y + SMALL + TEXT + 22
            self.text(x, self.y, name, SMALL, self.theme.faint, wide + 1)
            self.text(x, self.y + SMALL + 5, value, TEXT + 3, self.theme.ink, wide + 1)
            x += wide + 34
        self.y += SMALL + TEXT + 28 if facts else 0

    def legend(self, title: str) -> None:
        self.pen.line((MARGIN, self.y, self.width - MARGIN, self.y), self.theme.rule)
        self.y += 14
        x = MARGIN + self.text(MARGIN, self.y + 1, title, SMALL, self.theme.faint, 420) + 22
        if self.scheme.scale is not None:
            self.gradient(x)
        elif not self.scheme.entries:
            self.text(x, self.y, "nothing is known of it here", TEXT, self.theme.ink, 500)
        for entry in self.scheme.entries:
            words, count = shown(entry.label), str(entry.count)
            wide = min(self.pen.textlength(words, _font(TEXT)), 400) + 1
            if x + 70 + wide > self.width - MARGIN:
                x, self.y = MARGIN, self.y + TEXT + 12
            self.tile(x, self.y - 1, 20, 20, entry.colour or None, entry.mark)
            self.text(x + 27, self.y, words, TEXT, self.theme.ink, wide)
            x += 27 + wide + 7
            x += self.text(x, self.y, count, TEXT, self.theme.faint, 80) + 24
        self.y += TEXT + 24

    def gradient(self, x: float) -> None:
        scale = self.scheme.scale
        x += self.text(x, self.y, scale.low, TEXT, self.theme.ink, 200) + 10
        for number, colour in enumerate(STEPS):
            self.pen.rectangle((x + 22 * number, self.y, x + 22 * number + 21, self.y + 17), colour)
        x += 22 * len(STEPS) + 10
        x += self.text(x, self.y, scale.high + ("  (logarithmic)" if scale.log else ""), TEXT, self.theme.ink, 300) + 24
        if scale.none:
            self.tile(x, self.y - 1, 20, 20, None, "")
            self.text(x + 27, self.y, f"{scale.lacking}  {scale.none}", TEXT, self.theme.ink, 300)

    # Tiles

    def tile(self, x: float, y: float, wide: int, high: int, colour: str | None, mark: str, framed=False) -> None:
        """Without a colour it is hatched."""
        box = (round(x), round(y), round(x) + wide - 1, round(y) + high - 1)
        self.pen.rounded_rectangle(box, 2 if wide < 14 else 3, colour or self.theme.empty)
        if colour is None:
            for start in range(box[0] - high, box[2], 6):
                first, last = max(start, box[0]), min(start + high, box[2])
                if first < last:
                    self.pen.line((first, box[3] - (first - start), last, box[3] - (last - start)), self.theme.rule)
        if mark == "·":  # which fonts put too low
            across, down = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            self.pen.ellipse((across - 1.5, down - 1.5, across + 1.5, down + 1.5), _ink(colour))
        elif mark and wide >= TILE["letter"]:
            font = _font(TEXT if wide >= 18 else SMALL - 2)
            middle = ((box[0] + box[2] + 1) / 2, (box[1] + box[3] + 1) / 2)
            self.pen.text(middle, mark, _ink(colour), font, anchor="mm")
        if framed:
            self.pen.rounded_rectangle(box, 3, outline=self.theme.paper, width=4)
            self.pen.rounded_rectangle(box, 3, outline=self.theme.ink, width=2)

    def panel(self, panel: Panel, tiles: Sequence[Tile]) -> int:
        """Bands of blocks with the names of their rows, on as many lines as it takes; how many tiles were left out."""
        left = 0
        longest = max(self.pen.textlength(_readable(row), _font(TEXT)) for row in panel.rows)
        labels = min(LABELS, longest) + 12
        stacks = list(dict.fromkeys(band.stack for band in panel.bands))
        names = dict(zip(stacks, map(_readable, mosaic_layout.short_names(stacks)), strict=True))
        lines, step = self.arranged(panel, names, self.width - 2 * MARGIN - labels)
        high = TILE["high"] if len(panel.rows) < 40 else 16
        for line in lines:
            if self.y < MOST_HEIGHT:
                self.headings(line, names, MARGIN + labels, step)
            for at, row in enumerate(panel.rows):
                count = sum(column.cells[at] is not None for band in line for column in band.columns)
                if count and self.y >= MOST_HEIGHT:
                    left += count
                elif count:
                    self.text(MARGIN + labels - 12, self.y + (high - TEXT) / 2 - 3, _readable(row), TEXT,
                              self.theme.ink, labels - 12, right=True)  # fmt: skip
                    self.row(line, at, tiles, MARGIN + labels, step, high)
                    self.y += high + 2
            self.y += 14
        self.y += 4
        return left

    def arranged(self, panel: Panel, names: dict[str, str], room: float) -> tuple[list[list[Band]], int]:
        """(the panel's lines, pixels from one tile to the next), with room for the name of what ends a line."""
        least, last = TILE["least"] + 2, panel.bands[-1]
        name = self.pen.textlength(names[last.stack], _font(TEXT))
        room -= max(0, name - least * len(last.columns))
        lines = mosaic_layout.lines(panel, room, least, GAP)
        widest = max(sum(len(band.columns) for band in line) for line in lines)
        gaps = GAP * (max(len(line) for line in lines) - 1)
        return lines, max(least, min(TILE["most"], int((room - gaps) / widest)))

    def headings(self, line: Sequence[Band], names: dict[str, str], x: float, step: int) -> None:
        """Name and numbers of the blocks above each band; a name that would cover another stands a level higher."""
        starts, flags = [], []
        for band in line:
            starts.append(x)
            wide = self.pen.textlength(names[band.stack], _font(TEXT))
            flags.append((x, min(x, self.width - MARGIN - wide), wide))
            x += len(band.columns) * step + GAP
        levels = _levels(flags)
        base = self.y + max(levels) * (TEXT + 5)
        for band, (start, left, wide), level in zip(line, flags, levels, strict=True):
            top = base - level * (TEXT + 5)
            self.text(left, top, names[band.stack], TEXT, self.theme.ink, wide + 1)
            if level:  # a leader down to its blocks
                self.pen.line((start - 6, top + 4, start - 6, base + TEXT + 5), self.theme.rule)
        self.y = base + TEXT + 5
        self.numbers(line, starts, step)
        self.y += SMALL + 7

    def numbers(self, line: Sequence[Band], starts: Sequence[float], step: int) -> None:
        for band, start in zip(line, starts, strict=True):
            widest = max(self.pen.textlength(str(c.number), _font(SMALL - 1)) for c in band.columns) + 5
            every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 1000) if n * step >= widest or n == 1000)
            for at, column in enumerate(band.columns):
                if at % every == 0:
                    middle = (start + at * step + (step - 2) / 2, self.y + SMALL / 2)
                    self.pen.text(middle, str(column.number), self.theme.faint, _font(SMALL - 1), anchor="mm")

    def row(self, line: Sequence[Band], at: int, tiles: Sequence[Tile], x: float, step: int, high: int) -> None:
        for band in line:
            for number, column in enumerate(band.columns):
                if (index := column.cells[at]) is not None:
                    tile = tiles[index]
                    self.tile(x + number * step, self.y, step - 2, high, *self.scheme.of(tile), tile.edited)
            x += len(band.columns) * step + GAP

    def others(self, tiles: Sequence[Tile]) -> int:
        """Layers of no block, with their names in columns; how many were left out."""
        self.text(MARGIN, self.y, "other layers", TEXT, self.theme.faint, 300)
        self.y += TEXT + 10
        listed = tiles[:LISTED]
        columns = 3 if len(listed) > 2 else 2
        wide = (self.width - 2 * MARGIN) // columns
        for start in range(0, len(listed), columns):
            for at, tile in enumerate(listed[start : start + columns]):
                x = MARGIN + at * wide
                self.tile(x, self.y, 28, TILE["high"], *self.scheme.of(tile), tile.edited)
                self.text(x + 37, self.y + 2, _readable(tile.name), TEXT, self.theme.ink, wide - 50)
            self.y += TILE["high"] + 4
        rest, step, x = tiles[LISTED:], 22, MARGIN
        for number, tile in enumerate(rest):
            if x + step > self.width - MARGIN:
                x, self.y = MARGIN, self.y + TILE["high"] + 2
            if self.y > MOST_HEIGHT:
                return len(rest) - number
            self.tile(x, self.y, step - 2, TILE["high"], *self.scheme.of(tile), tile.edited)
            x += step
        self.y += TILE["high"] + 10 if rest else 8
        return 0


def _levels(flags: Sequence[tuple[float, float, float]]) -> list[int]:
    """Of (x it points at, left, width), 0 nearest to what they point at, so that none covers another or its leader."""
    placed: list[tuple[float, float, float, int]] = []
    for x, left, wide in reversed(flags):
        level = 0
        while level < MOST_LEVELS and any(_covers((x, left, wide, level), flag) for flag in placed):
            level += 1
        placed.insert(0, (x, left, wide, level))
    return [level for *_, level in placed]


def _covers(mine: tuple[float, float, float, int], other: tuple[float, float, float, int]) -> bool:
    (x, left, wide, level), (to, start, length, at) = mine, other
    if level == at:
        return left < start + length + 10 and start < left + wide + 10
    upper, lower = (x, (start, length)) if level > at else (to, (left, wide))
    return lower[0] - 8 <= upper - 6 <= lower[0] + lower[1] + 4  # the leader of the upper one


def _readable(name: str) -> str:
    """A name from a file, safe to draw; of a long one start and end."""
    name = shown(name)
    return name if len(name) <= 40 else f"{name[:14]}…{name[-24:]}"


@functools.cache
def _font(size: int):
    return _pillow()[2].load_default(size)


def _pillow() -> tuple:
    """(Image, ImageDraw, ImageFont), as ComfyUI has them and others may not."""
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise RuntimeError("Pillow, which draws pictures, is missing; install it: pip install pillow") from None
    return Image, ImageDraw, ImageFont


def _ink(colour: str | None) -> str:
    """Black or white, whichever is easier to read on that colour."""
    if colour is None:
        return "#59636E"
    red, green, blue = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    return "#101214" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.45 else "#FFFFFF"


__all__ = ["THEMES", "WAYS", "check_path", "draw", "save"]
