"""Calibration from a folder of saved layer inputs, for models that run elsewhere than in ComfyUI.

Each safetensors file in the folder holds the inputs of one call of the model, by module path, with or without `.input`
behind it and the model's prefix before it: [tokens, in], or more dimensions before the last. Layers with equal inputs
share their statistics. To save them from PyTorch:

    def save(folder, model, number, *arguments):
        inputs = {}
        hooks = [m.register_forward_pre_hook(lambda m, a, n=n: inputs.update({n: a[0].detach().cpu().clone()}))
                 for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
        model(*arguments)
        for hook in hooks:
            hook.remove()
        safetensors.torch.save_file(inputs, f"{folder}/call_{number:04}.safetensors")
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import PREFIXES, Checkpoint
from .quantization.calibration import Calibration, fingerprint
from .quantization.recorder import DEFAULTS, GB, Forward, Recorder, RecordOptions
from .source import Source

SUFFIX = ".input"
FREE_UNKNOWN = 8 * GB  # assumed where the system does not say


def calibrate(
    source: Source,
    folder: Path,
    options: RecordOptions = DEFAULTS,
    progress: Callable[[str], None] = lambda step: None,
) -> Calibration:
    """Statistics of a model's layers from the files in a folder, in the order of their names.

    Raises ValueError for a tensor that belongs to no 2-D weight of the model, has another width or no floating point
    dtype, for an input without a finite token, and for a folder without files.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: holds no .safetensors files; save inputs there, one file per call of the model")
    widths = {key.removesuffix(".weight"): shape[1] for key, shape in source.shapes().items()
              if key.endswith(".weight") and len(shape) == 2}  # fmt: skip
    opened = [Checkpoint(path) for path in files]
    found = {name for file in opened for name in _layers(file, widths, source.name).values()}
    limit = int(options.memory * GB or _free() / 2)
    recorder = Recorder(fingerprint(source), {name: widths[name] for name in found}, options, limit)
    forward = Forward()
    for index, file in enumerate(opened):
        progress(f"{index}/{len(opened)} {file.name}")
        recorder.begin(forward)
        same: dict[tuple, Tensor] = {}  # equal tensors as one, which is what a Recorder goes by
        for key, name in _layers(file, widths, source.name).items():
            tensor = file.read(key)
            identity = (tensor.shape, tensor.dtype, zlib.crc32(tensor.view(torch.uint8).numpy()))
            known = same.get(identity)
            x = same[identity] = known if known is not None and torch.equal(known, tensor) else tensor
            recorder.add(name, x, forward)
    calibration = recorder.calibration()
    empty = sorted(found - calibration.layers.keys())
    if empty:
        raise ValueError(f"{folder}: {empty[0]}: every token has NaN or infinity; save its inputs again")
    return calibration


def _layers(file: Checkpoint, widths: dict[str, int], model: str) -> dict[str, str]:
    """Key in the file -> module path."""
    layers = {}
    for key, spec in file.tensors.items():
        name = key.removesuffix(SUFFIX)
        prefix = next((p for p in PREFIXES if name.startswith(p)), "")
        name = name if name in widths else name.removeprefix(prefix)
        if name not in widths:
            raise ValueError(f"{file.name}: {key}: {model} has no such linear layer; name tensors by module path")
        if len(spec.shape) < 2 or spec.shape[-1] != widths[name]:
            raise ValueError(f"{file.name}: {key}: is {spec}, the layer reads [tokens, {widths[name]}]; these are the "
                             "inputs of another model")  # fmt: skip
        if not spec.dtype.is_floating_point or spec.dtype.itemsize < 2:
            raise ValueError(f"{file.name}: {key}: is {spec}; save inputs in a floating point dtype of 16 bits or more")
        layers[key] = name
    return layers


def _free() -> float:
    """Bytes of RAM that are free."""
    names = getattr(os, "sysconf_names", {})
    if "SC_AVPHYS_PAGES" not in names:
        return FREE_UNKNOWN
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
