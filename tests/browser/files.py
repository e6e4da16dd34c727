"""The files that browser tests name; there before a page opens, which reads the lists of them once."""

import torch
from safetensors.torch import save_file

from frontend_workflow import official

from . import EXAMPLES, example

WIDE = 119  # layers to quantize; a layer takes a fifth of a second or more, a reload of the page some seconds
LAYER = "<img src=x onerror=hacked=1>.0.w"  # no reader takes a file with such a name
STRANGE = ('"onmouseover="hacked=1', "&lt;img src=x onerror=hacked=1&gt;", "${hacked=1}{{hacked}}")
NAMES = [f"layers.{i}.{STRANGE[i % 3]}" for i in range(6)]
LORAS = ("<img src=x onerror=hacked=1>.safetensors", "a\"'><b>b<i>.safetensors", "${hacked=1}{{hacked}}.safetensors")


def make(studio):
    """All of them, in the folders of the studio's host."""
    studio.files.named_by(example("tessera_z_image_nvfp4"), real=True)
    for workflow in [official("image_z_image_turbo"), *(example(path.stem) for path in EXAMPLES)]:
        studio.files.named_by(workflow)
    studio.files.quantized()
    for name in (*LORAS, "a.safetensors", "b.safetensors"):
        studio.files.lora(name)
    folder = studio.host.models("diffusion_models")
    wide = {f"layers.{i}.w.weight": torch.randn(512, 1536).bfloat16() for i in range(WIDE + 1)}
    save_file(wide, folder / "wide.safetensors")
    for file, layers in (("strange", NAMES), ("hostile", [LAYER])):
        weights = {f"{name}.weight": torch.randn(256, 256).bfloat16() for name in layers}
        save_file(weights, folder / f"{file}.safetensors")
