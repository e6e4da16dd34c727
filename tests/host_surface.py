"""What the pack leans on in ComfyUI and comfy-kitchen, found in the pack's own source, and what of it a host lacks.

    COMFYUI_PATH=... python tests/host_surface.py [NAME ...]     # JSON {"uses": {name: modules}, "missing": [sentence]}

With names also `lost`: what would be missing were these gone.

Found: names that modules of `host` and `nodes` import or reach by an import, with the arguments they are called with;
attributes of patchers, layers and other objects of the host's, by the names that our code gives to such variables and
by what our mixins ask of `self` and `super()`. What no source shows is in BY_HAND.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOSTS = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "comfyui_version", "comfy_kitchen", "execution",
         "folder_paths", "nodes", "server"}  # fmt: skip
RECEIVERS = {  # what our code calls its variables -> what they are
    "patcher": "ModelPatcher", "_patcher": "ModelPatcher", "side": "ModelPatcher", "executor": "WrapperExecutor",
    "sampling": "ModelSampling", "module": "Linear",
}  # fmt: skip
MIXINS = {"Carrying": "Linear", "Planned": "Linear", "Smoothed": "Linear", "PackedRows": "Embedding"}
BY_HAND = (  # (object of the host's, attributes, the module that leans on them)
    ("ModelPatcher", "clone patches backup patches_uuid is_injected use_ejected add_patches model_options wrappers "
     "callbacks load_device offload_device model_state_dict_for_saving set_injections remove_injections "
     "set_attachments get_attachment set_additional_models cached_patcher_init hook_patches is_dynamic",
     "host/stacking.py"),
    ("CLIP", "patcher cond_stage_model clone load_model", "host/recording.py"),
    ("BaseModel", "diffusion_model apply_model model_sampling manual_cast_dtype get_dtype", "host/stacking.py"),
    ("Linear", "in_features out_features weight bias comfy_cast_weights comfy_force_cast_weights weight_function "
     "bias_function layout_type quant_format pre_quant_scale input_scale _orig_shape _full_precision_mm _forward "
     "set_weight convert_weight forward_comfy_cast_weights", "host/planned.py"),
    ("Embedding", "num_embeddings embedding_dim weight_function quant_format layout_type", "host/embedding.py"),
    ("what patchers ask of layers", "set_{} convert_{} weight_function bias_function "
     "_lowvram_function comfy_cast_weights", "host/smoothed.py"),
    ("QuantizedTensor", "_qdata _params _layout_cls dequantize state_dict", "host/carrying.py"),
    ("WrapperExecutor", "class_obj", "host/scheduling.py"),
    ("ModelSampling", "percent_to_sigma", "host/scheduling.py"),
    ("nvfp4", "comfy_tensor_layout parameters storage_t pre_quant_scale", "host/loading.py"),
    ("mxfp8", "comfy_tensor_layout parameters storage_t", "host/embedding.py"),
    ("int8_tensorwise", "comfy_tensor_layout parameters storage_t", "host/planned.py"),
    ("float8_e4m3fn", "comfy_tensor_layout parameters storage_t", "host/planned.py"),
    ("NVFP4 Params", "scale block_scale orig_dtype orig_shape transposed", "host/rounding.py"),
    ("MXFP8 Params", "scale orig_dtype orig_shape transposed", "host/rounding.py"),
    ("INT8 Params", "scale orig_dtype orig_shape transposed convrot convrot_groupsize", "host/planned.py"),
    ("FP8 Params", "scale orig_dtype orig_shape", "host/layouts.py"),
    ("INT8 layout", "quantize dequantize dequantize_embedding Params", "host/layouts.py"),
    ("stock nodes", "UNETLoader CLIPLoader LoraLoader LoraLoaderModelOnly", "nodes/loaders.py"),
    ("weights of LoRAAdapter", "up down alpha mid dora_scale reshape", "host/adapters.py"),
    ("Z-Image FeedForward", "w1 w2 w3 _forward_silu_gating", "host/wiring.py"),
    ("Llama MLP", "gate_proj up_proj", "host/wiring.py"),
    ("Llama Attention", "q_proj k_proj v_proj", "host/wiring.py"),
    ("comfy.ops", "linear_input_act", "host/patchable.py"),
)  # fmt: skip
UNKNOWN = object()
_removed: set[str] = set()
CLASS_PATH = re.compile(r"comfy(\.\w+)+\.[A-Z]\w*")


@dataclass(frozen=True)
class Use:
    """One name, and where the pack leans on it; `arguments`: (how many, keywords, whether that is all of them)."""

    name: str
    module: str
    arguments: tuple[int, tuple[str, ...], bool] | None = None


# What the pack uses


def uses() -> list[Use]:
    """Everything, each once per module and way to call it."""
    found = [Use(f"{thing}.{name}", where) for thing, names, where in BY_HAND for name in names.split()]
    for path in sorted([*ROOT.glob("host/*.py"), *ROOT.glob("nodes/*.py"), *ROOT.glob("kernels/*.py")]):
        module = path.relative_to(ROOT).as_posix()
        found += [Use(name, module, arguments) for name, arguments in _in_file(ast.parse(path.read_text()))]
    return list(dict.fromkeys(found))


def _in_file(tree: ast.Module):
    bound = dict(_bindings(tree))
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    inner = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    yield from ((name, None) for name in bound.values() if name.split(".")[0] != "comfy" or name.count("."))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute | ast.Name) and id(node) not in inner:
            name = _dotted(node, bound)
            if name and name not in HOSTS:
                yield name, _arguments(calls.get(id(node)))
        yield from _of_receivers(node, calls)
        if isinstance(node, ast.Constant) and CLASS_PATH.fullmatch(str(node.value)):
            yield node.value, None
        if isinstance(node, ast.ClassDef) and node.name in MIXINS:
            yield from _of_mixin(node, calls)


def _bindings(tree: ast.Module):
    """(name in the file, dotted name) of what it imports from the host."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in HOSTS:
                    yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in HOSTS:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.expr, bound: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return bound.get(node.id)
    inner = _dotted(node.value, bound) if isinstance(node, ast.Attribute) else None
    return f"{inner}.{node.attr}" if inner else None


def _arguments(call: ast.Call | None):
    if call is None:
        return None
    plain = [argument for argument in call.args if not isinstance(argument, ast.Starred)]
    keywords = tuple(keyword.arg for keyword in call.keywords if keyword.arg)
    return len(plain), keywords, len(plain) == len(call.args) and len(keywords) == len(call.keywords)


def _of_receivers(node: ast.AST, calls):
    """Attributes of variables that hold something of the host's, also by getattr and hasattr."""
    if isinstance(node, ast.Attribute):
        thing = RECEIVERS.get(getattr(node.value, "id", getattr(node.value, "attr", "")))
        if thing and (thing != "Linear" or not _is_own(node.attr)):
            yield f"{thing}.{node.attr}", _arguments(calls.get(id(node)))
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
        thing, name = RECEIVERS.get(getattr(node.args[0], "id", "")), node.args[1]
        if thing and isinstance(name, ast.Constant) and not _is_own(name.value):
            yield f"{thing}.{name.value}", None


def _of_mixin(cls: ast.ClassDef, calls):
    """What a class that is mixed into one of the host's takes from it."""
    for node in ast.walk(cls):
        if not isinstance(node, ast.Attribute):
            continue
        base = node.value
        parent = isinstance(base, ast.Call) and getattr(base.func, "id", "") == "super"
        if parent or (getattr(base, "id", "") == "self" and not _is_own(node.attr)):
            arguments = _arguments(calls.get(id(node)))
            yield f"{MIXINS[cls.name]}.{node.attr}", None if node.attr.startswith("__") else arguments


def _is_own(attribute: str) -> bool:
    return attribute.startswith("tessera_") or attribute in _own_names()


@functools.cache
def _own_names() -> frozenset[str]:
    """Attributes that the pack's own classes in `host` define."""
    found = set()
    for path in ROOT.glob("host/*.py"):
        for cls in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ClassDef)):
            found |= {node.name for node in cls.body if isinstance(node, ast.FunctionDef)}
            found |= {node.target.id for node in cls.body if isinstance(node, ast.AnnAssign)}
            if cls.name in MIXINS:
                found |= {node.attr for node in ast.walk(cls) if isinstance(node, ast.Attribute)
                          and isinstance(node.ctx, ast.Store) and node.attr.startswith("_")}  # fmt: skip
    return frozenset(found - {"weight", "bias"})


# What a host has


def missing(found: list[Use]) -> list[str]:
    """A sentence for every use that the host does not serve."""
    return [f"{use.name}: {problem} (used in {use.module})" for use in found if (problem := _problem(use))]


def _problem(use: Use) -> str | None:
    value = _find(use.name)
    if value is None:
        return "is not there"
    if use.arguments is None or value is UNKNOWN or not callable(value):
        return None
    count, keywords, all_of_them = use.arguments
    try:
        signature = inspect.signature(value)
        bind = signature.bind if all_of_them else signature.bind_partial
    except (TypeError, ValueError):
        return None
    try:
        bind(*[None] * (count + _takes_self(use.name)), **dict.fromkeys(keywords))
    except TypeError as problem:
        return f"is called with {count} arguments and {', '.join(keywords) or 'no keywords'}: {problem}"
    return None


def _takes_self(name: str) -> bool:
    """Whether a method was found in a class, where our code calls it on an object."""
    thing, _, last = name.partition(".")
    kind = type(inspect.getattr_static(_things()[thing], last, None)) if thing in _things() else None
    return ".instance." in name or (kind is not None and kind not in (classmethod, staticmethod))


def _find(name: str):
    """What a name stands for; UNKNOWN if it is there, but only on instances; None if it is not there."""
    thing, _, rest = name.partition(".")
    if thing in _things():
        kind = _things()[thing]
        if isinstance(kind, set):
            return UNKNOWN if rest in kind else None
        found = getattr(kind, rest, None)
        return found if found is not None else UNKNOWN if rest in _attributes(kind) else None
    return _reach(name)


def _reach(name: str):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        for part in parts[cut:]:
            if not hasattr(value, part):
                return UNKNOWN if inspect.isclass(value) and part in _attributes(value) else None
            value = getattr(value, part)
            if part == "PromptServer":
                value.instance = value  # set when a server starts
        return UNKNOWN if value is None else value
    return None


@functools.cache
def _things() -> dict:
    """The host's classes, or the names that something of it knows, as BY_HAND and RECEIVERS call them."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.model_sampling
    import comfy.ops
    import comfy.patcher_extension
    import comfy.quant_ops
    import comfy.sd
    import nodes
    import torch

    operations = comfy.ops.mixed_precision_ops({}, torch.bfloat16)
    layouts = {name: comfy.quant_ops.get_layout_class(full) for name, full in (
        ("NVFP4", "TensorCoreNVFP4Layout"), ("MXFP8", "TensorCoreMXFP8Layout"), ("INT8", "TensorWiseINT8Layout"),
        ("FP8", "TensorCoreFP8E4M3Layout"))}  # fmt: skip
    algorithms = {name: {*entry, *entry.get("parameters", ())} for name, entry in comfy.quant_ops.QUANT_ALGOS.items()}
    return {
        "ModelPatcher": comfy.model_patcher.ModelPatcher, "WrapperExecutor": comfy.patcher_extension.WrapperExecutor,
        "ModelSampling": comfy.model_sampling.ModelSamplingDiscreteFlow, "Linear": operations.Linear,
        "Embedding": operations.Embedding, "QuantizedTensor": comfy.quant_ops.QuantizedTensor,
        "CLIP": comfy.sd.CLIP, "BaseModel": comfy.model_base.BaseModel, "stock nodes": set(nodes.NODE_CLASS_MAPPINGS),
        "INT8 layout": layouts["INT8"], "weights of LoRAAdapter": _lora_parts(),
        "what patchers ask of layers": _mentioned(inspect.getsource(comfy.model_patcher)),
        **{f"{name} Params": layout.Params for name, layout in layouts.items()}, **algorithms,
        "Z-Image FeedForward": _reach("comfy.ldm.lumina.model.FeedForward"),
        "Llama MLP": _reach("comfy.text_encoders.llama.MLP"),
        "Llama Attention": _reach("comfy.text_encoders.llama.Attention"),
    }  # fmt: skip


def _lora_parts() -> set[str]:
    """Which of a LoRA's parts the host puts where we read them."""
    import comfy.weight_adapter
    import torch

    up, down, mid, scale = torch.ones(4, 2), torch.ones(2, 3), torch.ones(2, 2, 1, 1), torch.ones(4, 1)
    file = {"a.lora_up.weight": up, "a.lora_down.weight": down, "a.lora_mid.weight": mid,
            "a.reshape_weight": torch.tensor([4, 3])}  # fmt: skip
    found = comfy.weight_adapter.LoRAAdapter.load("a", file, 2.0, scale, set()).weights
    expected = {"up": up, "down": down, "alpha": 2.0, "mid": mid, "dora_scale": scale, "reshape": [4, 3]}
    plain = {"alpha", "reshape"}
    return {name for held, (name, value) in zip(found, expected.items(), strict=False)
            if held is value or (name in plain and held == value)}  # fmt: skip


@functools.cache
def _attributes(cls: type) -> frozenset[str]:
    """What instances of a class of the host's have: of its classes, and set by the modules that make such objects."""
    found = {*dir(cls), *getattr(cls, "__dataclass_fields__", ())}
    for base in cls.__mro__:
        found |= {*vars(base).get("__annotations__", {})}
        if base.__module__.split(".")[0] in HOSTS:
            found |= _stored(textwrap.dedent(inspect.getsource(base)), ("self",))
    layer = cls.__qualname__.startswith("mixed_precision_ops")
    if layer:
        import comfy.model_patcher
        import comfy.ops
        import comfy.quant_ops

        for module in (comfy.ops, comfy.model_patcher):
            found |= _stored(inspect.getsource(module), ("module", "self", "m"))
        found |= {name for entry in comfy.quant_ops.QUANT_ALGOS.values() for name in entry.get("parameters", ())}
    return frozenset(found - _removed)


def _stored(source: str, owners: tuple[str, ...]) -> set[str]:
    return {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") in owners}  # fmt: skip


def _mentioned(source: str) -> set[str]:
    """Attributes and words of a source."""
    nodes = list(ast.walk(ast.parse(source)))
    words = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return words | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


def _remove(name: str) -> None:
    """As if the host had lost that name."""
    thing, _, rest = name.partition(".")
    if thing in _things():
        owner, last = _things()[thing], rest
    else:
        path, _, last = name.rpartition(".")
        owner = _reach(path)
    if isinstance(owner, set):
        owner.discard(last)
        return
    for base in getattr(owner, "__mro__", (owner,)):
        if last in vars(base):
            delattr(base, last)
    _removed.add(last)  # for what only instances have


def main(gone: list[str]) -> int:
    sys.argv = [sys.argv[0], "--cpu"]
    sys.path[:] = [os.environ["COMFYUI_PATH"], *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
    import comfy.options

    comfy.options.enable_args_parsing()
    found = uses()
    names = {use.name: sorted({other.module for other in found if other.name == use.name}) for use in found}
    answer = {"uses": names, "missing": missing(found)}
    for name in gone:
        _remove(name)
    _attributes.cache_clear()
    answer |= {"lost": missing(found)} if gone else {}
    print(json.dumps(answer, indent=1))
    return 1 if answer["missing"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
