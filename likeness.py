"""Two batches of pictures or latents side by side: their numbers in words, and pictures of where they differ."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import pictures
from .quantization import similarity
from .quantization.similarity import Similarity

HEAD = "| {} | PSNR | SSIM | relative L2 | cosine |\n|---|---|---|---|---|"


@dataclass(frozen=True)
class Likeness:
    """What there is to say and show; b is measured against a, picture by picture."""

    labels: tuple[str, str]
    all: Similarity
    each: list[Similarity]
    shown: tuple[Tensor, Tensor]  # [n, h, w, c] in 0..1 each
    difference: Tensor  # [n, h, w]
    largest: float  # of any channel
    what: str  # the difference is, in words
    latent: bool

    def line(self) -> str:
        """The numbers in a line."""
        return _line(self.all)

    def markdown(self) -> str:
        """The numbers as a table, a row for each pair."""
        rows = [HEAD.format("pair"), *(f"| {i} | {' | '.join(one.words())} |" for i, one in enumerate(self.each, 1))]
        if len(self.each) > 1:
            rows.append(f"| all | {' | '.join(self.all.words())} |")
        kind = "latents; PSNR and SSIM by the range of the numbers in the reference" if self.latent else "pictures"
        said = [f"**{self.labels[1]}** against **{self.labels[0]}** ({kind})", "", *rows, ""]
        return "\n".join([*said, f"Largest difference: {self.largest:.4g}. Heat map: {self.what}."])

    def heat_maps(self) -> Tensor:
        """[n, h, w, 3], all on one scale."""
        top, label = pictures.top_of(self.difference), f"{self.labels[1]} - {self.labels[0]}: {self.what}"
        return pictures.tensor([pictures.heat_map(one, top, label) for one in self.difference])

    def side_by_side(self) -> Tensor:
        """[n, h, w, 3]: a, b and the difference, on one scale for all."""
        top, made = pictures.top_of(self.difference), []
        for a, b, difference, one in zip(*self.shown, self.difference, self.each, strict=True):
            three = [pictures.image(a), pictures.image(b), pictures.coloured(difference, top)]
            columns = zip((*self.labels, "difference"), map(pictures.enlarged, three), strict=True)
            made.append(pictures.side_by_side([*columns], top, _line(one)))
        return pictures.tensor(made)


def _line(one: Similarity) -> str:
    psnr, ssim, relative, cosine = one.words()
    return f"PSNR {psnr}, SSIM {ssim}, relative L2 {relative}, cosine {cosine}"


def of_pictures(a: Tensor, b: Tensor, labels: tuple[str, str]) -> Likeness:
    """Pictures [n, h, w, c]. Raises ValueError if sizes differ or a number is none."""
    whole, each = similarity.of_pictures(a, b, labels)
    a, b = (x.float().cpu() for x in similarity.paired(a, b, labels))
    distance = (b - a).abs()
    return Likeness(
        labels, whole, each, (a, b), distance.mean(-1), distance.max().item(), "mean of the channels", False
    )


def of_latents(a: Tensor, b: Tensor, labels: tuple[str, str]) -> Likeness:
    """Latents [n, c, ..., h, w]; of more than one frame the first is shown. Raises ValueError likewise."""
    whole, each = similarity.of_latents(a, b, labels)
    a, b = (x.float().cpu() for x in similarity.paired(a, b, labels))
    distance = (b - a).abs()
    means = [x.mean(1).reshape(len(x), -1, *x.shape[-2:])[:, 0] for x in (a, b)]
    low, high = (limit(torch.stack(means)).item() for limit in (torch.min, torch.max))
    shown = tuple(((mean - low) / ((high - low) or 1.0)).unsqueeze(-1) for mean in means)
    spread = distance.mean(1).reshape(len(a), -1, *a.shape[-2:])[:, 0]
    return Likeness(labels, whole, each, shown, spread, distance.max().item(), "mean of the channels", True)
