"""The truth that LoRA tests compare with: decoded weights, changed in fp32 by ComfyUI's own arithmetic."""

import copy
import json

import torch
from torch.nn.functional import linear

from tessera.formats import TensorSpec, from_record


def weights(patcher):
    """Every tensor of a MODEL in fp32 by its key; quantized weights decoded, their scales left out."""
    stored = patcher.model.state_dict()
    marked = {key.removesuffix(".comfy_quant") for key in stored if key.endswith(".comfy_quant")}
    found = {}
    for key, value in stored.items():
        base, _, suffix = key.rpartition(".")
        if base not in marked or suffix == "bias":
            found[key] = value.float()
        elif suffix == "weight":
            found[key] = _decoded(base, stored, patcher.model.get_submodule(base))
    return found


def _decoded(base, stored, layer):
    entries = {key.removeprefix(f"{base}."): value for key, value in stored.items() if key.startswith(f"{base}.")}
    record = json.loads(entries.pop("comfy_quant").numpy().tobytes())
    smoothing = entries.pop("pre_quant_scale", None)
    entries.pop("bias", None), entries.pop("input_scale", None)
    format = from_record(record, {suffix: TensorSpec(t.dtype, tuple(t.shape)) for suffix, t in entries.items()})
    weight = format.decode(format.unpack(entries, layer.out_features, layer.in_features))
    return weight if smoothing is None else weight * smoothing.float()


def changes(patcher, path, strength, base):
    """What one file adds to each tensor of `base` by key, as ComfyUI would add it to that tensor alone."""
    import comfy.lora
    import comfy.lora_convert
    import comfy.model_patcher
    import comfy.utils

    tensors = comfy.lora_convert.convert_lora(comfy.utils.load_torch_file(str(path)))
    names = comfy.lora.model_lora_keys_unet(patcher.model, {})
    bare = comfy.model_patcher.ModelPatcher(patcher.model, patcher.load_device, patcher.offload_device)
    bare.add_patches(comfy.lora.load_lora(tensors, names, log_missing=False), strength)  # past the pack's guard
    return {
        key: comfy.lora.calculate_weight(patches, base[key].clone(), key) - base[key]
        for key, patches in bare.patches.items()
    }


def changed(patcher, files, base=None):
    """`base` with the sum of what (path, strength) files add to it."""
    base = weights(patcher) if base is None else base
    found = dict(base)
    for path, strength in files:
        for key, delta in changes(patcher, path, strength, base).items():
            found[key] = found[key] + delta
    return found


def product(tensors, layer, x):
    """x W^T + b in fp32."""
    return linear(x.float(), tensors[f"{layer}.weight"], tensors.get(f"{layer}.bias"))


def load(patcher):
    """Loads a MODEL with everything that belongs to it, as sampling does."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher, *patcher.get_nested_additional_models()])
    patcher.pre_run()


def outputs(patcher, inputs):
    """{layer: its output for inputs[layer]} of the MODEL, loaded and injected."""
    load(patcher)
    found = {layer: patcher.model.get_submodule(layer)(x).float() for layer, x in inputs.items()}
    patcher.cleanup()
    return found


def answer(patcher, call):
    """The whole model's answer to arguments of apply_model."""
    load(patcher)
    found = patcher.model.apply_model(**copy.deepcopy(call)).float()
    patcher.cleanup()
    return found


class Swapped:
    """A MODEL that is not quantized, with other tensors in the place of its own for a while."""

    def __init__(self, patcher, tensors):
        self.patcher, self.tensors = patcher, tensors

    def __enter__(self):
        load(self.patcher)
        self.own = {key: self._put(key, value) for key, value in self.tensors.items()}
        return self.patcher

    def __exit__(self, *_):
        for key, value in self.own.items():
            self._put(key, value)

    def _put(self, key, value):
        base, _, name = key.rpartition(".")
        module = self.patcher.model.get_submodule(base)
        own = getattr(module, name)
        if isinstance(own, torch.nn.Parameter):
            setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
        else:
            setattr(module, name, value)
        return own
