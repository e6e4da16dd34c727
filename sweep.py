"""One setting tried at several strengths: which, what each is worth against a reference, in a table and in pictures."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from torch import Tensor

from . import pictures
from .pictures import curves
from .quantization import similarity
from .quantization.similarity import Similarity

LIMIT, MOST = 100, 64  # of a strength; of strengths
HELP = "write them as 0, 0.5, 1, 1.5 or as 0..2 step 0.25"
NO_REFERENCE = (
    "Connect reference_image or reference_latent (with latents):\nthe curve shows how far each strength is from it."
)
ERROR_COLOUR, PSNR_COLOUR = "#0072B2", "#D55E00"
_RANGE = re.compile(r"(?P<first>\S+?)\s*\.\.\s*(?P<last>\S+?)(?:\s+step\s+(?P<step>\S+))?")


def parse(text: str) -> list[float]:
    """The strengths of "0, 0.5, 1" or "0..2 step 0.25" or of both, in their order, each once.

    A range without a step goes by quarters. Raises ValueError with the part that is none.
    """
    found: dict[float, None] = {}
    for part in filter(None, (piece.strip() for piece in re.split(r"[,;\n]", text))):
        found |= dict.fromkeys(_strengths(part))
        if len(found) > MOST:
            raise ValueError(f"strengths {text!r}: are more than {MOST}; take a larger step")
    if not found:
        raise ValueError(f"strengths {text!r}: there is none; {HELP}")
    return list(found)


def _strengths(part: str) -> list[float]:
    match = _RANGE.fullmatch(part)
    if match is None:
        return [float(number) for number in map(_number, part.split())]
    first, last, step = (_number(match[name] or "0.25") for name in ("first", "last", "step"))
    if step == 0:
        raise ValueError(f"strengths {part!r}: the step is 0; {HELP}")
    step = abs(step) if last >= first else -abs(step)
    count = int((last - first) / step)
    if count >= MOST:
        raise ValueError(f"strengths {part!r}: are {count + 1}, more than {MOST}; take a larger step")
    return [float(first + n * step) for n in range(count + 1)]


def _number(text: str) -> Decimal:
    """Decimal, so that 0..1 step 0.1 has 0.3 in it."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        raise ValueError(f"strengths: {text!r} is not a number; {HELP}") from None
    if not value.is_finite() or abs(value) > LIMIT:
        raise ValueError(f"strengths: {text} is beyond {LIMIT}; {HELP}")
    return value


@dataclass(frozen=True)
class Sweep:
    """Pictures at several strengths, and how alike each is to a reference where there is one.

    Raises ValueError if counts or sizes do not fit.
    """

    strengths: list[float]
    images: list[Tensor]  # [n, h, w, c] for each strength
    reference_image: Tensor | None = None
    latents: list[Tensor] | None = None
    reference_latent: Tensor | None = None

    def __post_init__(self):
        for name, given in (("images", self.images), ("latents", self.latents)):
            if given is not None and len(given) != len(self.strengths):
                raise ValueError(f"{name} has {len(given)} entries for {len(self.strengths)} strengths; connect both "
                                 "to one Strength Sweep (Tessera), with nothing between that joins lists")  # fmt: skip
        if self.reference_latent is not None and self.latents is None:
            raise ValueError("reference_latent is connected without latents: connect what the sampler makes to "
                             "latents, or leave both")  # fmt: skip

    def measured(self) -> tuple[list[Similarity] | None, list[Similarity] | None]:
        """(of the latents, of the pictures) to their reference; None where there is none."""
        latents = images = None
        if self.latents is not None and self.reference_latent is not None:
            latents = [similarity.of_latents(self.reference_latent, latent, ("reference_latent", f"strength {s:g}"))[0]
                       for s, latent in zip(self.strengths, self.latents, strict=True)]  # fmt: skip
        if self.reference_image is not None:
            images = [similarity.of_pictures(self.reference_image, image, ("reference_image", f"strength {s:g}"))[0]
                      for s, image in zip(self.strengths, self.images, strict=True)]  # fmt: skip
        return latents, images


@dataclass(frozen=True)
class Result:
    """A sweep, measured once."""

    sweep: Sweep
    latents: list[Similarity] | None
    images: list[Similarity] | None

    @classmethod
    def of(cls, sweep: Sweep) -> Result:
        return cls(sweep, *sweep.measured())

    @property
    def best(self) -> int | None:
        """Which strength is nearest to the reference: by its latent where that is known, as its picture is rounded."""
        by = self.latents or self.images
        return None if by is None else min(range(len(by)), key=lambda i: by[i].relative_l2)

    def line(self) -> str:
        """The outcome in a line."""
        if self.best is None:
            return f"{len(self.sweep.strengths)} strengths; no reference is connected, so none is the best"
        by, strengths = self.latents or self.images, self.sweep.strengths
        said = f"best strength {strengths[self.best]:g}: {_of(by[self.best], self.latents is not None)}"
        if 0 in strengths and strengths[self.best] != 0:
            said += f"; at 0 {_of(by[strengths.index(0)], self.latents is not None)}"
        if len(strengths) > 2 and strengths[self.best] in (min(strengths), max(strengths)):
            said += "; it is the last one tried on that side, go further"
        return said

    def markdown(self) -> str:
        """A table, a row for each strength."""
        columns = [(f"{what} {part}", [one.words()[place] for one in found])
                   for what, found in (("latent", self.latents), ("picture", self.images)) if found
                   for part, place in (("error", 2), ("PSNR", 0), ("SSIM", 1))]  # fmt: skip
        head = f"| strength | {' | '.join(title for title, _ in columns)} |" if columns else "| strength |"
        rows = []
        for i, strength in enumerate(self.sweep.strengths):
            name = f"**{strength:g}**, best" if i == self.best else f"{strength:g}"
            rows.append(f"| {' | '.join([name, *(values[i] for _, values in columns)])} |")
        note = ["", "Error: relative L2 distance from the reference."] if columns else []
        return "\n".join([self.line(), "", head, "|---" * (len(columns) + 1) + "|", *rows, *note])

    def grid(self, cell: int = 512, columns: int = 0) -> Tensor:
        """[1, h, w, 3]: a column for each strength, after the reference picture if there is one; a row for each picture
        of a batch."""
        labels = [(f"strength {s:g}", self._small(i)) for i, s in enumerate(self.sweep.strengths)]
        batches, best = list(self.sweep.images), self.best
        if self.sweep.reference_image is not None:
            labels, batches = [("reference", ""), *labels], [self.sweep.reference_image, *batches]
            best = None if best is None else best + 1
        rows = max(map(len, batches))
        pages = [[pictures.image(batch[min(row, len(batch) - 1)]) for batch in batches] for row in range(rows)]
        return pictures.tensor([pictures.grid(pages, labels, best, cell, columns)])

    def _small(self, i: int) -> str:
        said = [f"error {self.latents[i].words()[2]}"] if self.latents else []
        if self.images:
            psnr = self.images[i].words()[0]
            said.append(psnr if self.images[i].identical or self.latents else f"PSNR {psnr}")
        return ", ".join(said)

    def curve(self) -> Tensor:
        """[1, h, w, 3]: error and PSNR over the strength; without a reference, what to connect."""
        if self.best is None:
            return pictures.tensor([pictures.note(NO_REFERENCE, (curves.WIDTH, curves.HEIGHT))])
        by_error, by_ratio = self.latents or self.images, self.images or self.latents
        error = curves.Series(f"{'latent' if self.latents else 'picture'} error", "relative L2, %",
                              [100 * one.relative_l2 for one in by_error], ERROR_COLOUR)  # fmt: skip
        ratio = curves.Series(f"{'picture' if self.images else 'latent'} PSNR", "dB",
                              [one.psnr for one in by_ratio], PSNR_COLOUR)  # fmt: skip
        title = "How near each strength is to the reference"
        return pictures.tensor([curves.curve(title, "strength", self.sweep.strengths, error, ratio, self.best)])


def _of(one: Similarity, latent: bool) -> str:
    psnr, _, relative, _ = one.words()
    return f"{'latent' if latent else 'picture'} error {relative}" + ("" if math.isinf(one.psnr) else f", PSNR {psnr}")
