"""One layer by each kernel's name: odd shapes, any rank, empty inputs; the reference stands in for CUDA kernels."""

import pytest
import torch

from tessera.formats import MXFP8, NVFP4
from tessera.kernels import linear
from tessera.kernels import reference as ref
from tessera.kernels.linear import Gated, LowRankBranch, Stored

SHAPE = (48, 96)
ROTATED = {"int8", "int8_residual", "int8_fused", "cpu_int8", "cpu_widened"}


def stored(name):
    """A weight for that kernel, and what its codes stand for [out, in]."""
    w = torch.randn(SHAPE) * 0.1
    if name in ROTATED:
        codes, scale = ref.quantize_rows(ref.rotate(w, 16))
        return Stored("int8", SHAPE, codes, scale, group=16), ref.rotate(codes.float() * scale, 16)
    if name == "fp8_row":
        scale = ref.power_of_2_scale(w.abs().amax(1, keepdim=True), 448.0)
        codes = ref.fp8_codes(w, scale)
        return Stored("fp8_row", SHAPE, codes, scale), codes.float() * scale
    format = MXFP8() if name == "mxfp8" else NVFP4()
    entries = format.pack(format.encode(w))
    decoded = format.decode(format.unpack(entries, *SHAPE))
    if name == "mxfp8":
        return Stored("mxfp8", SHAPE, entries["weight"], entries["weight_scale"]), decoded
    return Stored("nvfp4", SHAPE, entries["weight"], entries["weight_scale_2"], entries["weight_scale"]), decoded


def near(name):
    """What a kernel rounds inputs by, on plain random ones."""
    return {"nvfp4": 0.13, "mxfp8": 0.04, "fp8_row": 0.04}.get(name, 0.02 if name in ROTATED else 1e-3)


@pytest.fixture(autouse=True)
def newer_kitchen(monkeypatch):
    """Stands in for comfy-kitchen 0.2.40 where an older one is installed: a residual is added before rounding."""
    import inspect

    import comfy_kitchen

    real = comfy_kitchen.int8_linear
    if "residual" in inspect.signature(real).parameters:
        return

    def int8_linear(*arguments, residual=None, residual_scale=None):
        y = real(*arguments)
        return y if residual is None else y + residual * residual_scale

    monkeypatch.setattr(comfy_kitchen, "int8_linear", int8_linear)


@pytest.mark.parametrize("rank", [0, 3, 300])
@pytest.mark.parametrize("m", [0, 1, 63])
@pytest.mark.parametrize("name", linear.KERNELS)
def test_each_kernel_is_the_decoded_weight_and_its_branch(name, m, rank):
    torch.manual_seed(0)
    weight, decoded = stored(name)
    x, bias = torch.randn(m, SHAPE[1]), torch.randn(SHAPE[0])
    branch = LowRankBranch(torch.randn(rank, SHAPE[1]) * 0.05, torch.randn(SHAPE[0], rank) * 0.05, torch.tensor(0.5))
    y = linear.run(name, x, weight, bias, branch if rank else None)
    wanted = x @ decoded.T + bias + (0.5 * x @ branch.down.T @ branch.up.T if rank else 0.0)
    assert y.shape == wanted.shape and y.dtype == x.dtype and torch.isfinite(y).all()
    assert not m or (y - wanted).norm() < near(name) * wanted.norm()


@pytest.mark.parametrize("name", linear.KERNELS)
def test_a_gate_is_multiplied_like_its_product(name):
    torch.manual_seed(0)
    weight, decoded = stored(name)
    gated = Gated(torch.randn(2, 9, SHAPE[1]), torch.randn(2, 9, SHAPE[1]))
    wanted = gated.dense() @ decoded.T
    y = linear.run(name, gated, weight)
    assert y.shape == (2, 9, SHAPE[0]) and (y - wanted).norm() < 1.5 * near(name) * wanted.norm()


@pytest.mark.parametrize("rank", [0, 3, 300])
@pytest.mark.parametrize("name", linear.KERNELS)
def test_of_ranks_that_siblings_share_a_layer_takes_its_own(name, rank):
    """Before the siblings' input is prepared, and with it prepared."""
    torch.manual_seed(0)
    weight, decoded = stored(name)
    x, span = torch.randn(9, SHAPE[1]), (2, 2 + rank)
    strength = torch.rand(rank + 7)
    shared = LowRankBranch(torch.randn(rank + 7, SHAPE[1]) * 0.05, torch.randn(SHAPE[0], rank) * 0.05, strength, span)
    wanted = x @ decoded.T + (x @ shared.down[2 : 2 + rank].T * strength[2 : 2 + rank]) @ shared.up.T
    ways = [None, linear.prepare(name, x, weight, shared)] if name in linear.PREPARE else [None]
    for prepared in ways:
        y = linear.run(name, x, weight, None, shared, prepared)
        assert (y - wanted).norm() < near(name) * wanted.norm()
