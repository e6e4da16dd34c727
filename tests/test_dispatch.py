"""Which kernel a layer gets follows from the device's facts alone, and the reason names what is missing."""

import re

import comfy_kitchen
import pytest
import torch

from tessera import formats
from tessera.formats import FORMATS, Plain
from tessera.kernels import dispatch
from tessera.kernels.dispatch import DECODE, NATIVE, DeviceFacts, Plan

ALL = frozenset({"eager", "triton", "cuda"})


def nvidia(*sm, cuda=(13, 0), torch=(2, 13), backends=ALL):
    return DeviceFacts("cuda", sm, cuda, torch, backends)


EAGER = frozenset({"eager"})
LABELS = ("nvfp4", "mxfp8", "fp8_e4m3", "fp8_e5m2", "int8", "int8_row", "int8_convrot_64")
INT8 = {"int8", "int8_row", "int8_convrot_64"}
FP8 = {"fp8_e4m3", "fp8_e5m2"}
EVERYTHING = set(LABELS)
DEVICES = {  # facts, formats multiplied natively, what is missing for nvfp4 and for mxfp8
    "Turing": (nvidia(7, 5), INT8, "needs a Blackwell GPU (SM 10.0), this is SM 7.5", "Blackwell"),
    "Ampere A100": (nvidia(8, 0), INT8, "this is SM 8.0", "this is SM 8.0"),
    "Ampere RTX 30": (nvidia(8, 6), INT8, "this is SM 8.6", "this is SM 8.6"),
    "Ada RTX 40": (nvidia(8, 9), INT8 | FP8, "this is SM 8.9", "this is SM 8.9"),
    "Hopper": (nvidia(9, 0), INT8 | FP8, "this is SM 9.0", "this is SM 9.0"),
    "Blackwell B200": (nvidia(10, 0), EVERYTHING, "", ""),
    "Blackwell B300": (nvidia(10, 3), EVERYTHING, "", ""),
    "Blackwell RTX 50": (nvidia(12, 0), EVERYTHING, "", ""),
    "Blackwell GB10": (nvidia(12, 1), EVERYTHING, "", ""),
    "RTX 50, CUDA 12": (nvidia(12, 0, cuda=(12, 8)), EVERYTHING - {"nvfp4"}, "built for CUDA 13: install torch", ""),
    "RTX 50, torch 2.9": (nvidia(12, 0, torch=(2, 9)), EVERYTHING - {"mxfp8"}, "", "torch 2.10, this is 2.9: update"),
    "RTX 50, torch 2.10": (nvidia(12, 0, torch=(2, 10)), EVERYTHING, "", ""),
    "RTX 50, no CUDA backend": (nvidia(12, 0, backends=EAGER), EVERYTHING - {"nvfp4"}, "CUDA backend is not avail", ""),
    "CPU": (DeviceFacts("cpu"), INT8, "no nvfp4 on cpu", "no mxfp8 on cpu"),
    "ROCm": (DeviceFacts("cuda", None, None), INT8, "no nvfp4 on ROCm", "no mxfp8 on ROCm"),
    "XPU": (DeviceFacts("xpu"), INT8, "no nvfp4 on xpu", "no mxfp8 on xpu"),
    "MPS": (DeviceFacts("mps"), INT8, "no nvfp4 on mps", "no mxfp8 on mps"),
}


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("device", DEVICES)
def test_path_follows_from_the_facts(device, label):
    facts, native, *_ = DEVICES[device]
    plan = dispatch.plan(formats.parse(label), facts)
    assert plan.path == (NATIVE if label in native else DECODE) and plan.reason


@pytest.mark.parametrize("device", DEVICES)
def test_reason_names_what_is_missing(device):
    facts, _, *missing = DEVICES[device]
    for label, words in zip(("nvfp4", "mxfp8"), missing, strict=True):
        assert words in dispatch.plan(formats.parse(label), facts).reason
    fp8 = dispatch.plan(formats.parse("fp8_e4m3"), facts)
    if facts.sm and fp8.path == DECODE:
        assert fp8.reason == f"fp8 needs SM 8.9, this is SM {facts.sm[0]}.{facts.sm[1]}"


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("device", DEVICES)
def test_exact_always_decodes(device, label):
    plan = dispatch.plan(formats.parse(label), DEVICES[device][0], "exact")
    assert plan == Plan(DECODE, "speed is set to exact")


@pytest.mark.parametrize("name", [name for name, cls in FORMATS.items() if not issubclass(cls, Plain)])
def test_a_file_that_asks_for_full_precision_gets_it(name):
    format = FORMATS[name](full_precision_matrix_mult=True)
    assert dispatch.plan(format, nvidia(12, 0)) == Plan(DECODE, "the file asks for full-precision multiplication")


def test_facts_of_the_cpu_are_read_from_this_process():
    facts = dispatch.read_facts(torch.device("cpu"))
    assert (facts.type, facts.sm) == ("cpu", None)
    assert facts.torch == tuple(int(n) for n in re.match(r"(\d+)\.(\d+)", torch.__version__).groups())
    assert "eager" in facts.backends and facts.backends <= set(comfy_kitchen.list_backends())
    assert {label for label in LABELS if dispatch.plan(formats.parse(label), facts).path == NATIVE} == INT8


def test_facts_are_one_readable_line():
    assert str(nvidia(12, 0)) == "cuda SM 12.0, torch 2.13, CUDA 13.0, comfy-kitchen cuda, eager, triton"
    assert str(DeviceFacts("cpu")) == "cpu, torch 2.13, comfy-kitchen eager"


def test_summary_counts_equal_plans_the_most_first():
    native, decode = Plan(NATIVE, "fast"), Plan(DECODE, "slow")
    plans = [("nvfp4", native), ("mxfp8", decode), ("nvfp4", native), ("nvfp4", decode)]
    assert dispatch.summary(plans)[0] == "2 nvfp4: native (fast)"
    assert sorted(dispatch.summary(plans)[1:]) == ["1 mxfp8: decode (slow)", "1 nvfp4: decode (slow)"]
    assert dispatch.summary([]) == []
