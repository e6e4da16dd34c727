"""The GEMM kernels against the reference: in Triton's interpreter, and on the GPU where there is one."""

import importlib

import pytest
import torch

pytest.importorskip("triton", reason="Triton, which exists for Linux only, is not installed: scripts/setup_host.py")

import interpreted
from gpu_gemm_checks import (
    block_scaled_is_exact,
    int8_epilogue,
    int8_is_exact,
    int8_rounds_once,
    no_rows_give_no_rows,
    weight_only_decodes_every_code,
    weight_only_epilogue,
    weight_only_is_exact,
)

KINDS = ("nvfp4", "mxfp8", "int8_row", "int8_scalar", "fp8_e4m3", "fp8_e5m2", "fp8_row")
# M of the GEMV, the small and the large tile; N and K that no tile divides
SHAPES = ((1, 24, 72), (4, 20, 520), (5, 33, 200), (17, 100, 96), (63, 33, 64), (70, 140, 300))


@pytest.fixture(scope="module", params=["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)])
def run(request):
    """Runs a check of gpu_gemm_checks there."""
    if request.param == "interpreter":
        with interpreted.executor() as pool:
            yield lambda check, *arguments: pool.submit(check, *arguments).result()
    elif not torch.cuda.is_available():
        pytest.skip("no GPU")
    else:
        with torch.device("cuda"):
            yield lambda check, *arguments: check(*arguments)


@pytest.mark.parametrize("m, n, k", [(1, 16, 32), (63, 40, 96), (64, 65, 128), (17, 129, 300), (130, 200, 77)])
def test_int8_product_is_bit_exact(run, m, n, k):
    run(int8_is_exact, m, n, k, True)


def test_int8_product_with_one_weight_scale_is_bit_exact(run):
    run(int8_is_exact, 5, 24, 64, False)


@pytest.mark.parametrize("rank", [1, 16, 19, 64, 200, 300])
def test_int8_epilogue_adds_bias_and_a_branch_of_any_rank(run, rank):
    run(int8_epilogue, 63, 40, 96, rank, torch.bfloat16, True)
    run(int8_epilogue, 70, 130, 96, rank, torch.float16, False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_int8_output_is_rounded_once(run, dtype):
    run(int8_rounds_once, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_weight_only_product_is_that_of_the_decoded_weight(run, kind, m, n, k):
    run(weight_only_is_exact, kind, m, n, k, torch.bfloat16)


@pytest.mark.parametrize("kind", KINDS)
def test_weight_only_takes_float16(run, kind):
    run(weight_only_is_exact, kind, 2, 33, 200, torch.float16)
    run(weight_only_is_exact, kind, 18, 33, 200, torch.float16)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
def test_weight_only_decodes_every_code_and_scale_exactly(run, kind):
    run(weight_only_decodes_every_code, kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [19, 100])
def test_weight_only_epilogue_adds_bias_and_branch(run, kind, rank):
    run(weight_only_epilogue, kind, 2, 33, 200, rank, torch.bfloat16)
    run(weight_only_epilogue, kind, 18, 33, 200, rank, torch.bfloat16)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("sm", [(10, 0), (12, 0)], ids=["sm100", "sm120"])
def test_block_scaled_operands_and_epilogue_are_those_of_the_decoded_numbers(run, kind, sm):
    for m, n, k, rank in ((1, 24, 72, 0), (63, 33, 512, 0), (130, 140, 300, 19), (5, 24, 96, 300)):
        run(block_scaled_is_exact, kind, m, n, k, rank, sm)


def test_no_rows_give_no_rows(run):
    run(no_rows_give_no_rows)


@pytest.mark.parametrize("module", ["int8_gemm", "weight_only"])
def test_more_rows_never_get_a_smaller_tile(module):
    tile_for = importlib.import_module(f"tessera.kernels.gpu.{module}").tile_for
    for sm in ((8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1)):
        areas = [tile_for(m, sm).m * tile_for(m, sm).n for m in (1, 16, 17, 64, 65, 4608)]
        assert areas == sorted(areas)
