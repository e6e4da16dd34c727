"""Which kernel a layer gets follows from facts alone, and the reason names what is missing and what to do."""

import dataclasses
import re

import comfy_kitchen
import pytest
import torch

from tessera import formats
from tessera.formats import FORMATS, Plain
from tessera.kernels import dispatch
from tessera.kernels.cpu import CPUFacts
from tessera.kernels.dispatch import DECODE, NATIVE, TRANSCODE, WEIGHT_ONLY, DeviceFacts, Plan
from tessera.kernels.linear import KERNELS

ALL, EAGER = frozenset({"eager", "triton", "cuda"}), frozenset({"eager"})
SHAPE = (10240, 3840)
LABELS = ("nvfp4", "mxfp8", "fp8_e4m3", "fp8_e5m2", "int8", "int8_row", "int8_convrot_64", "int8_convrot_256")


def nvidia(*sm, cuda=(13, 0), torch=(2, 13), backends=ALL, triton=(3, 6), **more):
    return DeviceFacts("cuda", sm, cuda, torch, backends, triton, **more)


def cpu(onednn=True, saturates=False):
    return DeviceFacts("cpu", cpu=CPUFacts("AVX512", not saturates, False, onednn, saturates))


# A cell: path and kernel, with the format a layer is kept in. The columns are those of kernels.md 2.
N4, NM, NF = "native nvfp4", "native mxfp8", "native host"
X8, X8F, XF = "transcode int8 int8_convrot_256", "transcode int8_fused int8_convrot_256", "transcode fp8_row fp8_row"
I8, F64, HOST, D = "native int8", "native int8_fused", "native host", "decode decode"
C8, XC = "native cpu_int8", "transcode cpu_int8 int8_convrot_256"
WIDE, DC = "native cpu_widened", "decode cpu_decoded"


def column(nvfp4, mxfp8, fp8, int8, convrot64, convrot256):
    cells = (nvfp4, mxfp8, fp8, fp8, int8, int8, convrot64, convrot256)
    return dict(zip(LABELS, cells, strict=True))


BLACKWELL = column(N4, NM, NF, I8, F64, I8)
AMPERE = column(X8, X8, X8, I8, F64, I8)
HOPPER = column(X8, XF, NF, I8, F64, I8)
DEVICES = {
    "SM 7.5 Turing": (nvidia(7, 5), column(X8, X8, X8, I8, I8, I8)),
    "SM 8.0 A100": (nvidia(8, 0), AMPERE),
    "SM 8.6 RTX 30": (nvidia(8, 6), AMPERE),
    "SM 8.9 RTX 40": (nvidia(8, 9), HOPPER),
    "SM 9.0 Hopper": (nvidia(9, 0), HOPPER),
    "SM 10.0 B200": (nvidia(10, 0), BLACKWELL),
    "SM 10.3 B300": (nvidia(10, 3), BLACKWELL),
    "SM 12.0 RTX 50": (nvidia(12, 0), BLACKWELL),
    "SM 12.1 GB10": (nvidia(12, 1), BLACKWELL),
    "SM 12.0, CUDA 12": (nvidia(12, 0, cuda=(12, 8)), column(X8F, NM, NF, F64, F64, F64)),
    "SM 12.0, torch 2.9": (nvidia(12, 0, torch=(2, 9)), column(N4, X8, NF, I8, F64, I8)),
    "SM 12.0, torch 2.10": (nvidia(12, 0, torch=(2, 10)), BLACKWELL),
    "SM 12.0, no CUDA backend": (nvidia(12, 0, backends=EAGER), column(X8F, NM, NF, F64, F64, F64)),
    "SM 12.0, no Triton": (nvidia(12, 0, triton=None), column(N4, NM, NF, I8, I8, I8)),
    "SM 8.9, CUDA 12": (nvidia(8, 9, cuda=(12, 6)), column(X8F, XF, NF, F64, F64, F64)),
    "SM 8.6, CUDA 12, no Triton": (nvidia(8, 6, cuda=(12, 1), triton=None), column(D, D, D, HOST, HOST, HOST)),
    "SM 7.5, CUDA 12": (nvidia(7, 5, cuda=(12, 6)), column(D, D, D, HOST, HOST, HOST)),
    "CPU with VNNI": (cpu(), column(XC, XC, XC, C8, C8, C8)),
    "CPU without VNNI": (cpu(saturates=True), column(XC, XC, XC, WIDE, WIDE, WIDE)),
    "CPU without oneDNN": (cpu(onednn=False), column(DC, DC, DC, WIDE, WIDE, WIDE)),
    "ROCm RDNA3": (DeviceFacts("cuda", backends=frozenset({"eager", "hip"}), gfx="gfx1100"),
                   column(X8, X8, X8, I8, I8, I8)),
    "ROCm RDNA2": (DeviceFacts("cuda", backends=frozenset({"eager", "hip"}), gfx="gfx1030"),
                   column(D, D, D, HOST, HOST, HOST)),
    "XPU with Triton": (DeviceFacts("xpu", backends=frozenset({"eager", "triton"})), column(X8, X8, X8, I8, I8, I8)),
    "XPU": (DeviceFacts("xpu"), column(D, D, D, HOST, HOST, HOST)),
    "MPS": (DeviceFacts("mps"), column(D, D, D, HOST, HOST, HOST)),
}  # fmt: skip


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("device", DEVICES)
def test_plan_follows_from_the_facts(device, label):
    facts, cells = DEVICES[device]
    plan = dispatch.plan(formats.parse(label), facts, shape=SHAPE)
    assert f"{plan.path} {plan.kernel} {plan.target}".strip() == cells[label]
    assert plan.reason and (plan.kernel == dispatch.HOST or plan.kernel in KERNELS)


MISSING = {  # words of the reason, words of the remedy
    ("SM 7.5 Turing", "nvfp4"): ("needs a Blackwell GPU (SM 10.0), this is SM 7.5", ""),
    ("SM 9.0 Hopper", "mxfp8"): ("this is SM 9.0", ""),
    ("SM 8.6 RTX 30", "fp8_e4m3"): ("fp8 needs SM 8.9, this is SM 8.6", ""),
    ("SM 12.0, CUDA 12", "nvfp4"): ("this one is for CUDA 12: native path disabled", "cu130 index"),
    ("SM 12.0, torch 2.9", "mxfp8"): ("needs torch 2.10, this is 2.9", "update torch"),
    ("SM 12.0, no CUDA backend", "nvfp4"): ("CUDA backend is not available", "reinstall comfy-kitchen"),
    ("SM 8.6, CUDA 12, no Triton", "nvfp4"): ("without comfy-kitchen's CUDA backend or Triton", ""),
    ("CPU without VNNI", "int8_row"): ("would overflow without VNNI", ""),
    ("CPU with VNNI", "nvfp4"): ("no nvfp4 on cpu", ""),
    ("ROCm RDNA3", "nvfp4"): ("no nvfp4 on ROCm", ""),
    ("ROCm RDNA2", "int8_row"): ("not fast on ROCm", ""),
    ("MPS", "mxfp8"): ("no mxfp8 on mps", ""),
}


@pytest.mark.parametrize(("device", "label"), MISSING)
def test_reason_names_what_is_missing_and_what_to_do(device, label):
    plan = dispatch.plan(formats.parse(label), DEVICES[device][0], shape=SHAPE)
    reason, fix = MISSING[device, label]
    assert reason in plan.reason and fix in plan.fix and bool(fix) == bool(plan.fix)
    assert plan.reason in str(plan) and plan.fix in str(plan)


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("device", DEVICES)
def test_exact_always_decodes(device, label):
    plan = dispatch.plan(formats.parse(label), DEVICES[device][0], "exact", SHAPE)
    assert plan == Plan(DECODE, "speed is set to exact")


@pytest.mark.parametrize("name", [name for name, cls in FORMATS.items() if not issubclass(cls, Plain)])
def test_a_file_that_asks_for_full_precision_gets_it(name):
    format = FORMATS[name](full_precision_matrix_mult=True)
    assert dispatch.plan(format, nvidia(12, 0)) == Plan(DECODE, "the file asks for full-precision multiplication")


@pytest.mark.parametrize(("columns", "target"), [
    (3840, "int8_convrot_256"), (10240, "int8_convrot_256"), (320, "int8_convrot_64"), (48, "int8_convrot_16"),
    (40, ""),
])  # fmt: skip
def test_transcoding_takes_the_largest_group_that_divides(columns, target):
    plan = dispatch.plan(formats.NVFP4(), nvidia(8, 0), shape=(64, columns))
    assert plan.target == target and plan.path == (TRANSCODE if target else DECODE)


def test_a_shape_that_the_native_gemm_does_not_take_is_transcoded_and_says_so():
    plan = dispatch.plan(formats.NVFP4(), nvidia(12, 0), shape=(100, 3840))
    assert plan.path == TRANSCODE and "[100, 3840]" in plan.reason
    plan = dispatch.plan(formats.MXFP8(), nvidia(8, 9), shape=(100, 256))
    assert plan.target == "int8_convrot_256"  # fp8 GEMMs take sixteens


def test_without_room_4_bit_layers_stay_4_bit():
    for facts, path in ((nvidia(8, 6), WEIGHT_ONLY), (nvidia(7, 5), DECODE), (nvidia(8, 6, triton=None), DECODE)):
        plan = dispatch.plan(formats.NVFP4(), facts, shape=SHAPE, room=False)
        assert plan.path == path and "do not fit" in plan.reason
        assert dispatch.plan(formats.MXFP8(), facts, shape=SHAPE, room=False).path == TRANSCODE  # is 8 bits already


def test_a_residual_in_the_epilogue_is_used_where_comfy_kitchen_has_one():
    facts = nvidia(9, 0, features=frozenset({"residual"}))
    assert dispatch.plan(formats.parse("int8_convrot_256"), facts, shape=SHAPE).kernel == "int8_residual"
    assert dispatch.plan(formats.parse("int8_convrot_64"), facts, shape=SHAPE).kernel == "int8_fused"


def test_a_group_that_our_kernel_does_not_rotate_is_left_to_comfy_kitchen():
    assert dispatch.plan(formats.parse("int8_convrot_1024"), nvidia(8, 6), shape=(64, 2048)).kernel == "int8"
    plan = dispatch.plan(formats.parse("int8_convrot_1024"), nvidia(8, 6, cuda=(12, 1)), shape=(64, 2048))
    assert plan.kernel == "host" and plan.path == NATIVE


def test_fp32_computing_gets_no_16_bit_kernel():
    facts = nvidia(8, 6, cuda=(12, 1), dtype="float32")
    assert {dispatch.plan(formats.parse(label), facts, shape=SHAPE).kernel for label in LABELS} == {"decode", "host"}


def test_codes_of_a_transcoded_layer_fit_the_cpu_that_multiplies_them():
    for saturates, largest in ((False, 127), (True, 64)):
        assert dispatch.plan(formats.NVFP4(), cpu(saturates=saturates), shape=SHAPE).code_max == largest
    assert dispatch.plan(formats.NVFP4(), nvidia(8, 6), shape=SHAPE).code_max == 127


def test_a_refused_transcode_is_decoded_in_the_product_or_for_each_call():
    for facts, path in ((nvidia(8, 6), WEIGHT_ONLY), (nvidia(7, 5), DECODE), (cpu(), DECODE)):
        plan = dispatch.plan(formats.NVFP4(), facts, shape=SHAPE)
        assert dispatch.instead(plan, facts).path == path and not dispatch.instead(plan, facts).target


def test_a_format_without_a_rule_is_an_error():
    strange = dataclasses.make_dataclass(
        "Strange", [], bases=(formats.NVFP4,), namespace={"name": "strange"}, frozen=True
    )
    FORMATS.pop("strange")  # entered when it was defined
    with pytest.raises(ValueError, match=r"strange: has no rule in kernels/dispatch\.py"):
        dispatch.plan(strange(), nvidia(12, 0))


def test_facts_of_the_cpu_are_read_from_this_process():
    facts = dispatch.read_facts(torch.device("cpu"))
    assert (facts.type, facts.sm) == ("cpu", None) and facts.cpu is not None
    assert facts.torch == tuple(int(n) for n in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
    assert "eager" in facts.backends and facts.backends <= set(comfy_kitchen.list_backends())
    for label in LABELS:
        assert "cpu" in dispatch.plan(formats.parse(label), facts, shape=SHAPE).kernel


def test_facts_are_one_readable_line():
    assert str(nvidia(12, 0)) == "cuda SM 12.0, torch 2.13, CUDA 13.0, Triton 3.6, comfy-kitchen cuda, eager, triton"
    assert str(cpu()).startswith("CPU AVX512")


def test_summary_counts_equal_plans_the_most_first():
    native, decode = Plan(NATIVE, "fast"), Plan(DECODE, "slow", fix="update torch")
    plans = [("nvfp4", native), ("mxfp8", decode), ("nvfp4", native), ("nvfp4", decode)]
    assert dispatch.summary(plans)[0] == "2 nvfp4: native (fast)"
    rest = [f"1 {label}: decode (slow; for the native path update torch)" for label in ("mxfp8", "nvfp4")]
    assert sorted(dispatch.summary(plans)[1:]) == rest
    assert dispatch.summary([]) == []
