"""LoRA files on models: each key to its layer, beside it where it is linear, patched the host's way where it is not."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import comfy.model_patcher
import folder_paths
from torch import Tensor, nn

from .. import lora
from ..adapters import Change, Form, LoRA
from ..checkpoint import BRANCH, read_header
from ..injection import module_at
from ..output import pair_problem
from ..quantization.lowrank import LowRank
from ..schedule import Schedule
from ..words import first_of
from . import stacking
from .adapters import row_order
from .carrying import names_only
from .stacking import Entry, Placed

TRUNK = "diffusion_model."
TEXT_KEYS = ("lora_te", "text_encoder", "lora_prior_te", "lycoris_text_encoder")  # of LoRAs for both
OTHER = "it was made for another model"
UNREACHED = "ComfyUI does not patch parameters that stand beside modules"


class NothingFits(ValueError):
    """A LoRA file names nothing that a model has: it may be for the text encoder, or for another model."""


@dataclass(frozen=True)
class Target:
    """Where the host puts what a LoRA names."""

    key: str  # of the parameter
    layer: str | None  # path of the module, if it is the weight of a linear layer
    rows: tuple[int, int] | None
    host: object  # what ComfyUI's own map says
    order: Tensor | None = None


@dataclass(frozen=True)
class Attached:
    """What became of a LoRA file: told in the node."""

    name: str
    forms: list[tuple[Placed, Form]] = field(default_factory=list)
    patched: tuple[str, ...] = ()  # keys that the host patches itself
    unmatched: tuple[str, ...] = ()  # names that fit nothing here
    ignored: tuple[tuple[str, str], ...] = ()  # (key, why)
    notes: tuple[str, ...] = ()

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(placed.layer for placed, _ in self.forms))

    @property
    def text(self) -> str:
        """Per file: applied, reduced, patched by the host, ignored and why."""
        kinds = Counter(found.kind for _, found in self.forms)
        said = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
        lines = [f"{self.name}: {len(self.layers)} layers, unmerged ({said})" if self.forms else f"{self.name}:"]
        for start, what in (("reduced", "reduced"), ("as a full", "multiplied in full, which is slow")):
            some = [(placed, found) for placed, found in self.forms if found.how.startswith(start)]
            if some:
                placed, worst = max(some, key=lambda pair: pair[1].loss)
                lines.append(f"{len(some)} {what}: {placed.layer} {worst.how}")
        if self.patched:
            lines.append(f"{len(self.patched)} patched by ComfyUI, not being linear layers ({first_of(self.patched)})")
        if self.unmatched:
            lines.append(f"{len(self.unmatched)} keys fit no layer ({first_of(self.unmatched)})")
        reasons: dict[str, list[str]] = {}
        for key, why in self.ignored:
            reasons.setdefault(why, []).append(key)
        lines += [f"{len(keys)} ignored: {why} ({first_of(keys)})" for why, keys in reasons.items()]
        return "; ".join([*lines, *self.notes])


def attach_file(patcher, path: str, strength: float, schedule: Schedule | None = None, tolerance: float = 0.02,
                correction: bool = False):  # fmt: skip
    """(clone with a LoRA file of any kind beside its layers, Attached). No quantized weight changes.

    Works on the patcher of a MODEL or of a CLIP. Raises ValueError, with the model as it was, if the file is damaged,
    fits nothing here, or does not fit a layer that it names.
    """
    file = Path(path)
    entry = _entry(patcher, file, tolerance, correction)
    clone = patcher.clone()
    clone.is_injected = False  # as it is by itself; the host copies it, and would inject the clone into a running model
    if entry.changes:
        stacking.attach(clone, entry, strength, schedule)
    notes, patched, ignored = [], (), entry.ignored
    if entry.raw and strength != 0:
        keys = _patch(clone, entry, strength)
        patched = tuple(key for key in keys if _reached(clone, key))
        ignored += tuple((key, UNREACHED) for key in keys if key not in patched)
        notes += ["what ComfyUI patches has its full strength all the time"] if schedule is not None else []
    notes += [f"strength moves: {schedule}"] if schedule is not None else []
    forms = stacking.summary(patcher, entry) if entry.changes else []
    return clone, Attached(file.name, forms, patched, entry.unmatched, ignored, tuple(notes))


@dataclass(frozen=True, eq=False)
class _Read(Entry):
    """The entry of a file, and what of the file does not ride beside a layer."""

    raw: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # for the host to patch
    spots: dict[str, object] = field(default_factory=dict)  # where
    unmatched: tuple[str, ...] = ()
    ignored: tuple[tuple[str, str], ...] = ()


def _entry(patcher, path: Path, tolerance: float, correction: bool) -> _Read:
    """Read from disk once per model and file, so that moving a slider reads nothing."""
    stat = path.stat()
    identity = (str(path), stat.st_mtime_ns, stat.st_size, tolerance, correction)
    known = stacking.kept(patcher).entry(identity)
    if known is not None:
        return known
    where = targets(patcher)
    file = lora.read_adapters(path, comfy.lora_convert.convert_lora)
    placed, raw, unmatched, ignored = [], {}, [], list(file.ignored.items())
    for base, change in file.changes.items():
        target = where.get(base)
        if target is None:
            unmatched.append(base)
        elif target.layer is None or _reshapes(change, module_at(patcher.model, target.layer)):
            raw[base] = file.raw[base]
        else:
            _check(path.name, base, change, module_at(patcher.model, target.layer), target.rows)
            placed.append(Placed(target.layer, target.rows, change, target.order))
    if not placed and not raw:
        first = f"; first unmatched key {unmatched[0]}" if unmatched else ""
        raise NothingFits(f"{path.name}: 0 of {len(file.changes)} LoRA layers match this model{first}; {OTHER}")
    return _Read(identity, path.name, placed, correction, tolerance=tolerance, raw=raw,
                 spots={base: where[base].host for base in raw}, unmatched=tuple(unmatched),
                 ignored=tuple(ignored))  # fmt: skip


def _reshapes(change: Change, module: nn.Module) -> bool:
    """Whether it makes another shape of a layer that is not quantized: the host can."""
    return getattr(module, "layout_type", None) is None and change.reshapes(stacking.shape_of(module))


def _check(file: str, base: str, change: Change, module: nn.Module, rows) -> None:
    out, columns = stacking.shape_of(module)
    try:
        change.check_beside((rows[1] if rows else out, columns))
    except ValueError as problem:
        raise ValueError(f"{file}: {base}: {problem}; {OTHER}") from None


def _patch(clone, entry: _Read, strength: float) -> list[str]:
    """Has the host merge what is no linear layer: norms, convolutions, embeddings, plain parameters."""
    tensors = {key: tensor for found in entry.raw.values() for key, tensor in found.items()}
    loaded = comfy.lora.load_lora(tensors, entry.spots, log_missing=False)
    return [str(key) for key in clone.add_patches(loaded, strength)]


def _reached(patcher, key: str) -> bool:
    """Whether the host applies patches of a parameter: without dynamic VRAM it passes those by that stand beside
    modules with parameters (`_load_list`, 0.27 to 0.33), as Z-Image's pad tokens do."""
    owner = module_at(patcher.model, key.rpartition(".")[0])
    inner = any(True for child in owner.children() for _ in child.parameters())
    return not inner or (hasattr(patcher, "is_dynamic") and patcher.is_dynamic())


def targets(patcher) -> dict[str, Target]:
    """LoRA base name -> Target, in every spelling that the host knows."""
    text = stacking.is_text_encoder(patcher)
    known = comfy.lora.model_lora_keys_clip if text else comfy.lora.model_lora_keys_unet
    found = {}
    with names_only():
        spots = known(patcher.model, {})
    for name, said in spots.items():
        found[name] = target = _target(patcher.model, said)
        if not text:
            found.setdefault(name.removeprefix(TRUNK), target)  # bare keys
    return found


def _target(model: nn.Module, said) -> Target:
    """What an entry of the host's map means: a key, or (key, (dim, start, length) or None, function of the rows)."""
    key, offset, function = (said, None, None) if isinstance(said, str) else (*said, None, None)[:3]
    path = key.removesuffix(".weight")
    rows = None if offset is None else (offset[1], offset[2])
    if not key.endswith(".weight") or not _is_linear(model, path) or (offset is not None and offset[0] != 0):
        return Target(key, None, rows, said)
    order = None if function is None else row_order(function, rows[1] if rows else module_at(model, path).out_features)
    return Target(key, path if function is None or order is not None else None, rows, said, order)


def _is_linear(model: nn.Module, path: str) -> bool:
    try:
        module = module_at(model, path)
    except AttributeError:
        return False
    return all(isinstance(getattr(module, name, None), int) for name in ("in_features", "out_features"))


def attach_lora(patcher, path: str, strength: float) -> tuple[comfy.model_patcher.ModelPatcher, Attached]:
    """(clone with a correction LoRA's branches beside its layers, what was attached). No weight of the model changes.

    Raises ValueError if no key of the file fits the model, or a pair does not fit its layer.
    """
    try:
        return attach_file(patcher, path, strength, correction=True)
    except NothingFits as problem:  # ComfyUI shows the path of any type that is not Python's own
        raise ValueError(str(problem)) from None


def attach_own(patcher, file: str, pairs: dict[str, LowRank]) -> None:
    """Puts the branches that are part of a model, by module path, beside its layers: at strength 1 for good."""
    placed = [Placed(name, None, Change(LoRA(pair))) for name, pair in pairs.items()]
    for one in placed:
        _check(file, one.layer, one.change, module_at(patcher.model, one.layer), None)
    stacking.attach(patcher, Entry(("", file), file, placed, absorbed=True), 1.0)


def _absorbed(patcher) -> list[Entry]:
    return [entry for entry, _, _ in stacking.entries(patcher) if entry.absorbed]


def absorbed_layers(patcher) -> int:
    """How many layers of a MODEL have a branch that is part of it; 0 for all but absorb models from our loader."""
    return sum(len(entry.changes) for entry in _absorbed(patcher))


def absorbed_text(patcher) -> list[str]:
    """What to tell about a model's own branches; nothing if it has none."""
    found = _absorbed(patcher)
    if not found:
        return []
    nbytes = sum(tensor.nbytes for entry in found for placed in entry.changes for tensor in placed.change.tensors())
    return [f"{absorbed_layers(patcher)} layers with a low-rank branch inside the file (absorb mode): always on, "
            f"{nbytes / 1e6:.1f} MB"]  # fmt: skip


def lacks_branch(patcher) -> bool:
    """Whether a MODEL is an absorb file from another loader, which has dropped the branches that are part of it."""
    path = file_of(patcher)
    if absorbed_layers(patcher) or path is None or path.suffix not in (".safetensors", ".sft"):
        return False
    return any(key.rpartition(".")[2] in BRANCH for key in read_header(path)[1])


def coverage(patcher, attached: Attached) -> str:
    """How many of the model's quantized layers a LoRA covers, in words."""
    quantized = quantized_layers(patcher)
    covered = len(quantized & set(attached.layers))
    text = f"corrects {len(attached.layers)} layers, {covered} of {len(quantized)} quantized ones"
    if attached.unmatched:
        text += f"; {len(attached.unmatched)} keys fit no layer ({first_of(attached.unmatched)})"
    return text


def quantized_layers(patcher) -> frozenset[str]:
    """Module paths of the layers whose weight is quantized, from any loader."""
    memory = stacking.kept(patcher)
    if memory.quantized is None:
        modules = patcher.model.named_modules()
        memory.quantized = frozenset(n for n, module in modules if getattr(module, "layout_type", None) is not None)
    return memory.quantized


def lora_beside(patcher) -> str | None:
    """The `<checkpoint>_lora.safetensors` of a MODEL: in the checkpoint's folder, or among the loras."""
    path = file_of(patcher)
    if path is None:
        return None
    name = f"{path.stem}_lora.safetensors"
    beside = path.with_name(name)
    return str(beside) if beside.is_file() else folder_paths.get_full_path("loras", name)


def mismatch(patcher, lora_path: str) -> str | None:
    """Why a correction LoRA is not that of a MODEL's file; None if it is, or if the files do not say."""
    path = file_of(patcher)
    return pair_problem(path, Path(lora_path)) if path is not None and path.suffix == ".safetensors" else None


def file_of(patcher) -> Path | None:
    """The file a MODEL was loaded from, where its loader says so."""
    made = getattr(patcher, "cached_patcher_init", None)
    return Path(made[1][0]) if made and isinstance(made[1][0], str) else None
