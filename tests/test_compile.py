"""torch.compile: our `Linear` is one graph in every format, with its branch, and a slider move starts nothing over."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from comfy_host import node
from test_host_kernels import DEVICES, device, inputs, layer_of, loaded, ours, quantized  # noqa: F401 fixtures

pytestmark = pytest.mark.host
CASES = [
    ("CPU", "nvfp4"), ("CPU", "int8_convrot_64"), ("CPU without oneDNN", "mxfp8"), ("SM 12.0", "nvfp4"),
    ("SM 12.0", "mxfp8"), ("SM 9.0", "mxfp8"), ("SM 8.6, CUDA 12", "int8_convrot_64"), ("SM 8.6, no room", "nvfp4"),
    ("SM 8.6", "int8_convrot_256"),
]  # fmt: skip
assert {name for name, _ in CASES} <= set(DEVICES)


def strength_of(model):
    """The strengths of the model's stack, as the node that made it holds them."""
    from tessera.host import stacking

    return model.get_attachment(stacking.STACK).strengths


@pytest.mark.parametrize("backend", ["eager", "inductor"])
@pytest.mark.parametrize(("name", "label"), CASES)
def test_a_layer_with_its_branch_is_one_graph_and_strength_recompiles_nothing(device, quantized, name, label, backend):  # noqa: F811
    if backend == "inductor" and (name, label) not in CASES[:2]:
        return  # on CPU inductor adds nothing to a graph of one custom operation; two of them run it
    device(name)
    model = ours(quantized(label))
    corrected = loaded(node("TesseraCorrectionLoRA").execute(model, f"kernels_{label}_lora.safetensors", 1.0).args[0])
    layer, x = layer_of(model), inputs(2, 77)
    eager = {}
    for strength in (1.0, 0.25, 1.5):
        strength_of(corrected).set([strength])
        eager[strength] = layer(x)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for strength, wanted in eager.items():
        strength_of(corrected).set([strength])
        torch.testing.assert_close(compiled(x), wanted, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    corrected.detach()
    model.detach()


def test_every_operation_has_a_fake_that_agrees_with_it():
    """What torch.library checks: schema, fake shapes and dtypes, no hidden mutation or aliasing."""
    from tessera.kernels import ops
    from tessera.kernels import reference as ref

    x, gate = torch.randn(5, 96), torch.randn(5, 96)
    down, strength, t, up = (
        torch.randn(4, 96),
        torch.tensor([1.0, 0.5, 0.0, 2.0]),
        torch.randn(5, 4),
        torch.randn(48, 4),
    )
    q, sx = ref.quantize_rows(x)
    w, sw = ref.quantize_rows(torch.randn(48, 96))
    nv, nvs, _ = ops.quantize_blocks("nvfp4", torch.randn(48, 96), None, torch.tensor(0.01), None, None, 0)
    mx, mxs, _ = ops.quantize_blocks("mxfp8", torch.randn(48, 96), None, torch.tensor(1.0), None, None, 0)
    xq, xs, _ = ops.quantize_blocks("nvfp4", x, None, torch.tensor(0.01), None, None, 0)
    one = torch.tensor(0.01)
    samples = [
        (ops.int8_linear_cpu, (x, w, sw, 16, torch.randn(48), down, strength, up, 127)),
        (ops.decoded_linear_cpu, (x, "nvfp4", nv, one, nvs, 48, 0, None, down, strength, up)),
        (ops.rotate_quantize_int8, (x, None, 16, down, strength)),
        (ops.rotate_quantize_int8, (x, gate, 16, None, None)),
        (ops.kitchen_int8, (x, w, sw, 16, torch.randn(48), None)),
        (ops.int8_gemm, (q, sx, w, sw, None, t, up, torch.bfloat16)),
        (ops.weight_only_gemm, (x, "mxfp8", mx, mxs, None, 48, None, None, None)),
        (ops.dequantize, ("nvfp4", nv, one, nvs, 48, 96, 0, torch.float32)),
        (ops.block_product, ("nvfp4", xq, xs, one, nv, nvs, one, torch.randn(48), 5, 48, torch.float32)),
        (ops.dual_quantize, (x, one, down, strength, 64, 64)),
    ]
    for kind in ("nvfp4", "mxfp8", "fp8_row"):
        scale = torch.full((5, 1), 0.01) if kind == "fp8_row" else one
        for extension in (0, 64):
            samples.append((ops.quantize_blocks, (kind, x, None, scale, down, strength, extension)))
        samples.append((ops.quantize_blocks, (kind, x, gate, scale, None, None, 64)))
    for operation, arguments in samples:
        found = operation(*arguments)
        tensors = [*arguments, *(found if isinstance(found, tuple) else (found,))]
        eight = any(isinstance(v, torch.Tensor) and v.dtype == torch.float8_e4m3fn for v in tensors)
        checks = ("test_faketensor",) if eight else ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
        checked = torch.library.opcheck(operation, arguments, test_utils=checks)  # the others cannot compare fp8
        assert set(checked.values()) == {"SUCCESS"}, (operation, checked)
    names = {name for name, value in vars(ops).items() if isinstance(value, torch.library.CustomOpDef)}
    assert names == {operation._name for operation, _ in samples}
