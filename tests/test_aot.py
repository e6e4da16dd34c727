"""Every Triton kernel compiles for every GPU it claims, to the matrix instruction it is written for, without spills."""

import re

import pytest

pytest.importorskip("triton", reason="Triton, which exists for Linux only, is not installed: scripts/setup_host.py")

import aot

if aot.foreign_triton():
    pytest.skip(aot.foreign_triton(), allow_module_level=True)

CASES = aot.selection()


@pytest.fixture(scope="module")
def compiled(request):
    """Facts of the cases that this run asks for; two processes work ahead."""
    wanted = dict.fromkeys(
        (item.callspec.params["name"], item.callspec.params["cc"])
        for item in request.session.items
        if item.path.samefile(__file__) and "cc" in getattr(getattr(item, "callspec", None), "params", {})
    )
    with aot.executor() as pool:
        futures = {key: pool.submit(aot.compile_case, *key) for key in wanted}
        yield lambda *key: futures[key].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name, cc", CASES)
def test_kernel_has_its_matrix_instruction_and_no_spills(compiled, name, cc):
    assert not aot.problems(aot.cases()[name], cc, compiled(name, cc))


def test_a_broken_promise_is_seen():
    facts = {"registers": 200, "spills": 3, "instructions": 9, "shared": 1 << 20, "tensor_memory": 0}
    case = {"name": "x", "expect": {120: r"^OMMA\.SF"}, "max_registers": 128}
    found = aot.problems(case, 120, facts | {"mnemonics": {"HMMA.16816.F32": 8, "STL": 3}})
    assert [sentence.split(";")[0] for sentence in found] == [
        r"no instruction matches ^OMMA\.SF",
        "200 registers, allowed are 128",
        "3 spill instructions (LDL, STL), allowed are 0",
        "1048576 bytes of shared memory, the GPU has 101376",
    ]


def test_every_kernel_is_compiled_for_every_gpu_it_claims():
    kernels = {name: case["kernel"].fn.__qualname__ for name, case in aot.cases().items()}
    claimed = {(kernels[name], cc) for name, case in aot.cases().items() for cc in case["expect"]}
    assert {(kernels[name], cc) for name, cc in CASES} == claimed
    assert {name for name, _ in CASES} == set(kernels)
    assert {cc for _, cc in claimed} >= {80, 86, 89, 90, 100, 120}
    modules = {case["kernel"].fn.__module__.rpartition(".")[2] for case in aot.cases().values()}
    files = (
        path
        for path in (aot.ROOT / "kernels" / "gpu").glob("*.py")
        if re.search(r"^def \w+_kernel\(", path.read_text(), re.M)
    )
    assert modules == {path.stem for path in files}
