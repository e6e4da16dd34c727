"""A node pack for the soak: one node says what a ComfyUI process holds, one loads a small text encoder with ours.

Stands in custom_nodes as it is; never part of Tessera.
"""

import ctypes
import gc
import importlib.util
import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path

import torch


def pack():
    """Tessera's `host` package, whatever ComfyUI named it."""
    return next(module for name, module in sys.modules.items() if name.endswith("tessera.host"))


def facts():
    """Counts of what a leak would be made of, after everything that can go has gone."""
    for _ in range(3):
        gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    from comfy.model_patcher import ModelPatcher

    found = Counter()
    files = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)]
    found["files"] = sum(file.startswith("/") and not file.startswith("/dev/") for file in files)
    found["sockets"] = sum(file.startswith("socket:") for file in files)
    found["descriptors"] = len(files) - found["sockets"]
    found["threads"] = threading.active_count()
    classes = Counter()
    for item in gc.get_objects():
        kind = type(item)
        if isinstance(item, torch.nn.Module):
            found["modules"] += 1
            found["hooks"] += len(item._forward_hooks) + len(item._forward_pre_hooks)
        elif isinstance(item, ModelPatcher):
            found["patchers"] += 1
            for name in ("injections", "additional_models", "callbacks", "wrappers", "attachments", "patches"):
                found[name] += len(getattr(item, name))
        elif issubclass(kind, torch.Tensor):
            found["tensors"] += 1
        where = getattr(kind, "__module__", None)
        if isinstance(where, str) and "custom_nodes" in where and "tessera." in where:
            classes[kind.__qualname__] += 1
    found["maps"] = Path("/proc/self/maps").read_text().count("\n")
    found["objects"] = len(gc.get_objects())
    found["rss"] = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {**found, "classes": dict(classes)}


class Probe:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "probe", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"number": ("INT", {})}}

    def probe(self, number):
        return {"ui": {"facts": [json.dumps(facts())]}}


class LoadEncoder:
    CATEGORY, FUNCTION, RETURN_TYPES = "test", "load", ("CLIP",)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"name": ("STRING", {})}}

    def load(self, name):
        import comfy.sd
        import folder_paths

        path = folder_paths.get_full_path_or_raise("text_encoders", name)
        return (pack().load_clip(path, comfy.sd.CLIPType.LUMINA2, small_clip().OPTIONS),)


class Encode:
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "encode", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",)}}

    def encode(self, clip):
        return {"ui": {"embedding": small_clip().encode(clip)[0, -1, :8].tolist()}}


def small_clip():
    name = "tessera_soak_small_clip"
    if name not in sys.modules:
        path = Path(os.environ["TESSERA_SOAK_TESTS"]) / "small_clip.py"
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


NODE_CLASS_MAPPINGS = {"SoakProbe": Probe, "SoakCLIP": LoadEncoder, "SoakEncode": Encode}
