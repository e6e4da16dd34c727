"""Inside the real ComfyUI: files that it does not load, by our loader; and their repaired twins, by its own."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_host import TINY, node, relative, sample
from tessera import formats, repairing
from tessera.checkpoint import Checkpoint

pytestmark = pytest.mark.host
E4M3, STEPS = torch.float8_e4m3fn, 3


def block_scaled(weight, dtype, largest, rows, columns):
    """(codes, scales) of one scale for each of rows x columns pieces."""
    grid = weight.reshape(rows, weight.shape[0] // rows, columns, weight.shape[1] // columns)
    scale = grid.abs().amax((1, 3), keepdim=True) / largest
    codes = (grid / scale).reshape(weight.shape)
    return codes.round().to(dtype) if dtype == torch.int8 else codes.to(dtype), scale.reshape(rows, columns)


def foreign(weight, kind):
    """(entries, record) of a layer as another tool writes it."""
    if kind == "modelopt":
        quantized = formats.NVFP4().encode(weight)
        packed = (quantized.qdata[:, 1::2] << 4) | quantized.qdata[:, 0::2]
        return {"weight": packed, "weight_scale": quantized.block_scale, "weight_scale_2": quantized.scale}, None
    if kind == "hybrid_mxfp8":
        format = formats.MXFP8()
        return format.pack(format.encode(weight)) | {"weight_scalar": torch.tensor(0.5)}, {"format": kind}
    rows, columns = weight.shape
    grid = (rows, 1) if kind.endswith("rowwise") else (rows // 16, columns // 16)
    dtype, largest = (torch.int8, 127) if kind == "int8_blockwise" else (E4M3, 448)
    codes, scale = block_scaled(weight, dtype, largest, *grid)
    return {"weight": codes, "weight_scale": scale}, {"format": kind}


@pytest.fixture(scope="module")
def expected(models):
    """What the model paints that the foreign files were made from."""
    import nodes

    save_file(load_file(TINY), models / "diffusion_models" / "foreign_plain.safetensors")
    return sample(nodes.UNETLoader().load_unet("foreign_plain.safetensors", "default")[0], steps=STEPS)


@pytest.mark.parametrize(("kind", "most"), [
    ("modelopt", 0.12), ("hybrid_mxfp8", 0.05), ("int8_blockwise", 0.05), ("float8_e4m3fn_rowwise", 0.05),
    ("float8_e4m3fn_blockwise", 0.05),
])  # fmt: skip
def test_foreign_files_and_their_repaired_twins_paint_the_picture(models, expected, kind, most):
    import nodes

    folder, tensors = models / "diffusion_models", load_file(TINY)
    for key in [key for key in tensors if ".feed_forward.w" in key]:
        base = key.removesuffix(".weight")
        entries, record = foreign(tensors.pop(key).float(), kind)
        tensors |= {f"{base}.{suffix}": tensor.contiguous().clone() for suffix, tensor in entries.items()}
        tensors |= {} if record is None else {f"{base}.comfy_quant": formats.marker(record)}
    path = folder / f"foreign_{kind}.safetensors"
    save_file(tensors, path)
    assert Checkpoint(path).repairs
    twin = repairing.repair(path, folder / f"twin_{kind}.safetensors").path
    ours = sample(node("TesseraDiffusionModelLoader").execute(path.name, speed="exact").args[0], steps=STEPS)
    stock = sample(nodes.UNETLoader().load_unet(twin.name, "default")[0], steps=STEPS)
    assert relative(ours, expected) < most and relative(stock, expected) < most
