"""The models of LoRA tests: the tiny Z-Image and a mini Flux in every format; for each a file with every kind."""

import shutil

import torch
from safetensors.torch import load_file, save_file

import comfy_host
import lora_files
import mini_flux

MODELS = ("zimage", "flux")
FORMATS = ("nvfp4", "mxfp8", "int8_convrot", "bf16")
LOADERS = ("ours", "ours, exact", "stock")
BLOCKS = {
    "zimage": [
        f"{block}.{layer}" for block in ("layers.0", "layers.1", "layers.2", "context_refiner.0", "context_refiner.1",
                                         "noise_refiner.0", "noise_refiner.1")
        for layer in ("attention.qkv", "attention.out", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    ],
    "flux": [
        f"{block}.{layer}" for block, layers in (
            *((f"double_blocks.{i}", [f"{s}_{part}" for s in ("img", "txt")
                                      for part in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")])
              for i in range(2)),
            *((f"single_blocks.{i}", ("linear1", "linear2", "modulation.lin")) for i in range(3)),
        ) for layer in layers
    ],
}  # fmt: skip
"""Quantized layers by module path."""
SLICES = {  # name in the file: (kind, module path, first row, rows)
    "zimage": {
        "transformer.layers.2.attention.to_q": ("lora without alpha", "layers.2.attention.qkv", 0, 256),
        "transformer.layers.2.attention.to_k": ("dora", "layers.2.attention.qkv", 256, 256),
        "transformer.layers.2.attention.to_v": ("glora", "layers.2.attention.qkv", 512, 256),
        "transformer.context_refiner.1.attention.to_q": ("oft", "context_refiner.1.attention.qkv", 0, 256),
        "transformer.context_refiner.1.attention.to_k": ("set", "context_refiner.1.attention.qkv", 256, 256),
        "transformer.context_refiner.1.attention.to_v": ("lokr", "context_refiner.1.attention.qkv", 512, 256),
    },
    "flux": {
        "transformer.transformer_blocks.1.attn.to_q": ("lora", "double_blocks.1.img_attn.qkv", 0, 256),
        "transformer.transformer_blocks.1.attn.to_k": ("loha", "double_blocks.1.img_attn.qkv", 256, 256),
        "transformer.transformer_blocks.1.attn.to_v": ("diff", "double_blocks.1.img_attn.qkv", 512, 256),
        "transformer.single_transformer_blocks.1.attn.to_v": ("boft", "single_blocks.1.linear1", 512, 256),
        "transformer.single_transformer_blocks.1.proj_mlp": ("dora", "single_blocks.1.linear1", 768, 1024),
        "diffusion_model.single_blocks.2.linear1_qkv": ("lora", "single_blocks.2.linear1", 0, 768),
    },
}  # fmt: skip
KEPT = {  # layers that no recipe quantizes
    "zimage": {"x_embedder": "lora", "t_embedder.mlp.0": "dora", "cap_embedder.1": "glora",
               "layers.0.adaLN_modulation.0": "lora and diff_b", "layers.1.adaLN_modulation.0": "diff and diff_b",
               "layers.2.adaLN_modulation.0": "diff_b"},
    "flux": {"txt_in": "lora and diff_b", "time_in.out_layer": "lokr", "vector_in.in_layer": "diff_b",
             "guidance_in.out_layer": "oft", "final_layer.linear": "loha"},
}  # fmt: skip
TURNED = {"flux": {"transformer.norm_out.linear": "lora"}}  # diffusers keeps scale and shift the other way round


def file_of(models, name, format):
    """The model's file among diffusion_models, made at first use; blocks in that format."""
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe

    folder = models / "diffusion_models"
    path = folder / f"lora_{name}_{format}.safetensors"
    if path.exists():
        return path
    if format == "nvfp4, smoothed":
        save_file(_smoothed(load_file(file_of(models, name, "bf16")), name), path)
    elif format != "bf16":
        everything = recipe.loads(f'architecture = "auto"\ndefault = "{format}"', format)
        Job(Checkpoint(file_of(models, name, "bf16")), path, everything).run()
    elif name == "flux":
        mini_flux.save(path, single=3)
    else:
        shutil.copy(comfy_host.TINY, path)
    return path


def _smoothed(tensors, name):
    """Block layers divided by a scale of each input before they are packed; it meets the input again."""
    from tessera import formats

    generator = torch.Generator().manual_seed(4)
    for layer in BLOCKS[name]:
        weight = tensors.pop(f"{layer}.weight").float()
        format = formats.parse("nvfp4").for_shape(*weight.shape)
        scale = torch.randn(weight.shape[1], generator=generator).div(2).exp()
        entries = format.pack(format.encode(weight / scale)) | {"pre_quant_scale": scale}
        entries |= {"comfy_quant": formats.marker(format.record())}
        tensors |= {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in entries.items()}
    return tensors


def load(loader, path):
    if loader == "stock":
        import nodes

        return nodes.UNETLoader().load_unet(path.name, "default")[0]
    speed = "exact" if loader == "ours, exact" else "auto"
    return comfy_host.node("TesseraDiffusionModelLoader").execute(path.name, speed=speed).args[0]


def call(name):
    """Arguments of apply_model: enough rows for the integer kernels of a CPU."""
    if name == "flux":
        return mini_flux.call()
    text = comfy_host.prompt(comfy_host.PROMPTS[0])[0][0]
    latent = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"x": latent, "t": torch.tensor([0.7]), "c_crossattn": text, "num_tokens": text.shape[1]}


def layers_by_kind(name):
    """{kind: module paths}: which layer of the model gets which kind, each kind at least one in a block."""
    sliced = {layer for _, layer, _, _ in SLICES[name].values()}
    kinds = [*lora_files.KINDS, *(lora_files.WITH_BIAS if name == "flux" else ())]
    found = {kind: [] for kind in kinds}
    for number, layer in enumerate(layer for layer in BLOCKS[name] if layer not in sliced):
        found[kinds[number % len(kinds)]].append(layer)
    for layer, kind in KEPT[name].items():
        found.setdefault(kind, []).append(layer)
    return found


def every_kind(models, name):
    """A LoRA file that holds every kind for the model, slices, norms and a token among its targets."""
    path = models / "loras" / f"every_kind_{name}.safetensors"
    if path.exists():
        return path
    own = load_file(file_of(models, name, "bf16"))
    layers = {
        f"diffusion_model.{layer}": (kind, own[f"{layer}.weight"])
        for kind, found in layers_by_kind(name).items() for layer in found
    }  # fmt: skip
    for base, (kind, layer, start, rows) in SLICES[name].items():
        layers[base] = kind, own[f"{layer}.weight"][start : start + rows]
    for base, kind in TURNED.get(name, {}).items():
        layers[base] = kind, own["final_layer.adaLN_modulation.1.weight"]
    return lora_files.save(path, layers, others=_others(name, own))


def _others(name, own):
    """What is no matrix: norms changed, set and in the spelling w_norm, a token."""
    if name == "flux":
        return {"diffusion_model.double_blocks.0.img_attn.norm.query_norm.diff": torch.full((128,), 0.25),
                "diffusion_model.double_blocks.1.txt_attn.norm.key_norm.w_norm": torch.full((128,), -0.25),
                "diffusion_model.single_blocks.0.norm.key_norm.set_weight": torch.linspace(0.5, 1.5, 128)}  # fmt: skip
    return {"diffusion_model.layers.0.attention_norm1.diff": 0.25 * own["layers.0.attention_norm1.weight"].float(),
            "diffusion_model.layers.1.ffn_norm1.w_norm": 0.25 * own["layers.1.ffn_norm1.weight"].float(),
            "diffusion_model.layers.2.attention.q_norm.set_weight": torch.linspace(0.5, 1.5, 64),
            "diffusion_model.x_pad_token.diff": torch.full((1, 256), 0.1)}  # fmt: skip
