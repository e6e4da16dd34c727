"""Pictures to latents and words to vectors, both by fixed orthogonal transforms: there is no file to load.

Latent: each 4x4 block of pixels becomes 16 numbers, the lowest DCT coefficients of one luma and two chroma axes.
Text: word i of the vocabulary is row i of a 64x64 Hadamard matrix; the empty caption is row 0.
"""

import math
import re

import torch
import torch.nn.functional as F

BLOCK = 4
CHANNELS = 16
TEXT_DIM = 64

SHAPES = ("circle", "square", "triangle", "star", "ring", "heart", "diamond", "cross", "moon", "arrow")
COLOURS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
BACKGROUNDS = ("white", "black", "gray", "navy", "brown", "cream", "mint", "lilac")
PATTERNS = ("plain", "stripes", "checker", "dots")
SIZES = ("small", "big")
PLACES = ("top", "bottom", "left", "right", "center")
VOCABULARY = (*SHAPES, *COLOURS, *BACKGROUNDS, *PATTERNS, *SIZES, *PLACES, "and", "on")
IGNORED = frozenset(("a", "an", "the", "at", "in", "of"))

_LUMA = ((0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (2, 0), (1, 2), (2, 1))
_CHROMA = ((0, 0), (0, 1), (1, 0), (1, 1))
_AXES = ((1, 1, 1), (1, 0, -1), (1, -2, 1))
_GAIN_LUMA, _GAIN_CHROMA, _GAIN_AC = 0.35, 0.55, 2.0  # channels near unit variance, edges weighted up


def _basis():
    """Rows of the orthonormal block transform and their gains: [16, 3, 4, 4], [16]."""
    n = torch.arange(BLOCK, dtype=torch.float64)
    dct = torch.cos(math.pi / BLOCK * (n + 0.5) * n[:, None]) * math.sqrt(2 / BLOCK)
    dct[0] /= math.sqrt(2)
    axes = F.normalize(torch.tensor(_AXES, dtype=torch.float64), dim=1)
    rows, gains = [], []
    plan = (_LUMA, _GAIN_LUMA), (_CHROMA, _GAIN_CHROMA), (_CHROMA, _GAIN_CHROMA)
    for axis, (frequencies, gain) in zip(axes, plan, strict=True):
        for u, v in frequencies:
            rows.append(axis[:, None, None] * dct[u][:, None] * dct[v])
            gains.append(_GAIN_AC if u or v else gain)
    return torch.stack(rows).float(), torch.tensor(gains)


def _hadamard():
    h = torch.ones(1, 1)
    while len(h) < TEXT_DIM:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)))
    return h


BASIS, GAINS = _basis()
WORDS = _hadamard()
ROW = {word: i + 1 for i, word in enumerate(VOCABULARY)}


def encode(pictures):
    """Latents of pictures in [0, 1]: [B, 3, H, W] -> [B, 16, H/4, W/4]."""
    return F.conv2d(pictures * 2 - 1, BASIS * GAINS[:, None, None, None], stride=BLOCK)


def decode(latents):
    """Pictures in [0, 1] of latents, the best inverse of `encode`: [B, 16, h, w] -> [B, 3, 4h, 4w]."""
    kernel = (BASIS / GAINS[:, None, None, None]).to(latents)
    return (F.conv_transpose2d(latents, kernel, stride=BLOCK) / 2 + 0.5).clamp(0, 1)


def tokens(caption):
    """Vocabulary rows of a caption; articles and punctuation are dropped, nothing left gives [0].

    Raises ValueError for a word outside the vocabulary.
    """
    words = [w for w in re.findall(r"[^\s,.;:!?]+", caption.lower()) if w not in IGNORED]
    unknown = sorted({w for w in words if w not in ROW})
    if unknown:
        raise ValueError(f"caption {caption!r}: unknown words {', '.join(unknown)}; use only {', '.join(VOCABULARY)}")
    return [ROW[w] for w in words] or [0]


def embed(caption):
    """Text features of one caption: [1, words, 64], entries +-1."""
    return WORDS[tokens(caption)].unsqueeze(0)
