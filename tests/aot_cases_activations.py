"""Which compiled variants of the quantizing and decoding kernels are looked at, and what their SASS must contain."""

import itertools

from tessera.kernels.gpu import activations, dequantize
from tessera.kernels.gpu.quantize_blocks import block_quantize_kernel
from tessera.kernels.gpu.quantize_int8 import int8_quantize_kernel

GPUS = (80, 86, 89, 90, 100, 120)
FEW = (86, 90, 120)  # for variants that differ in little
MATRIX = r"^(HMMA|HGMMA|UTCHMMA)"
INPUTS = {"x_ptr": "*bf16", "M": "i32", "K": "i32"}


def branch(rank, t=True):
    """(signature, constexprs, config) of the branch arguments."""
    c = activations.config(rank)
    absent = dict.fromkeys(("down_ptr", "s_ptr", "t_ptr"))
    constexprs = {"RANK": c.rank, "STAGES": c.stages, "s_step": 1} | ({} if rank else absent)
    signature = {"R": "i32"} | ({"down_ptr": "*bf16", "s_ptr": "*fp32", "t_ptr": "*bf16"} if rank else {})
    if rank and not t:
        constexprs["t_ptr"] = None
        del signature["t_ptr"]
    return signature, constexprs, c


def int8(name, group, rank=0, swiglu=False, dtype="*bf16", rows=activations.ROWS, gpus=FEW):
    signature, constexprs, c = branch(rank)
    signature |= INPUTS | {"x_ptr": dtype, "q_ptr": "*i8", "scale_ptr": "*fp32"}
    if swiglu:
        signature["up_ptr"] = dtype
    registers = None if dtype == "*fp32" else c.registers
    constexprs |= {"GROUP": group, "ROWS": rows} | ({} if swiglu else {"up_ptr": None})
    return {
        "name": f"int8_quantize_{name}", "kernel": int8_quantize_kernel, "signature": signature,
        "constexprs": constexprs, "num_warps": c.warps, "options": {"maxnreg": registers},
        "expect": dict.fromkeys(gpus, MATRIX if group or rank else None), "max_registers": registers or 255,
        # what 128 registers cost, of 3700 instructions; the 136 without a limit would leave one program on an SM
        "max_spills": dict.fromkeys(gpus, 0 if registers is None else 48 if swiglu else 4),
    }  # fmt: skip


def blocks(name, nv=None, mx=None, rank=0, swiglu=False, dtype="*bf16", gpus=FEW):
    """nv, mx: columns of the extension of each format; None: the format is not written."""
    signature, constexprs, c = branch(rank, t=0 in (nv, mx))
    signature |= INPUTS | {"x_ptr": dtype, "per_program": "i32"}
    constexprs |= {"ROWS": activations.ROWS, "COLUMNS": c.columns}
    constexprs |= {"NV_EXTENSION": nv or 0, "MX_EXTENSION": mx or 0}
    given = {"up_ptr": dtype if swiglu else None}
    given |= dict.fromkeys(("nv_ptr", "nv_scale_ptr"), None if nv is None else "*u8")
    given |= dict.fromkeys(("mx_ptr", "mx_scale_ptr"), None if mx is None else "*u8")
    given["sx_ptr"] = None if nv is None else "*fp32"
    signature |= {a: kind for a, kind in given.items() if kind}
    constexprs |= {a: None for a, kind in given.items() if not kind}
    return {
        "name": f"block_quantize_{name}", "kernel": block_quantize_kernel, "signature": signature,
        "constexprs": constexprs, "num_warps": c.warps, "expect": dict.fromkeys(gpus, MATRIX if rank else None),
        "max_registers": 168,
    }  # fmt: skip


def decoder(kind, group=None):
    kernel = getattr(dequantize, f"{kind}_dequantize_kernel")
    signature = {"q_ptr": "*i8" if kind == "int8" else "*u8", "y_ptr": "*bf16", "M": "i32", "K": "i32"}
    if kind == "int8":
        signature |= {"scale_ptr": "*fp32"}
        constexprs = {"GROUP": group, "ROWS": dequantize.ROWS, "scale_step": 1}
    else:
        signature |= {"block_scale_ptr": "*u8", "q_stride": "i32", "scale_stride": "i32"}
        signature |= {"scale_ptr": "*fp32"} if kind == "nvfp4" else {}
        constexprs = {"ROWS": dequantize.ROWS, "COLUMNS": dequantize.COLUMNS}
    return {
        "name": f"dequantize_{kind}" + (f"_{group}" if group else ""), "kernel": kernel, "signature": signature,
        "constexprs": constexprs, "num_warps": 4, "expect": dict.fromkeys(GPUS, MATRIX if group else None),
        "max_registers": 128,
    }  # fmt: skip


def aot_cases():
    rotated = [int8(f"{g}_r{r}", g, r, gpus=GPUS) for g, r in itertools.product((64, 256), (0, 32))]
    return [
        *rotated,
        int8("0", 0),
        int8("0_r32", 0, 32),
        int8("16", 16),
        int8("64_r64", 64, 64),
        int8("64_r128", 64, 128),
        int8("64_r256", 64, 256, rows=16),
        int8("64_few_rows", 64, 32, rows=16),
        int8("256_fp32_r32", 256, 32, dtype="*fp32", rows=16),
        int8("swiglu_64_r32", 64, 32, swiglu=True),
        int8("swiglu_256_r32", 256, 32, swiglu=True, gpus=GPUS),
        blocks("nvfp4", nv=0),
        blocks("nvfp4_r32", nv=0, rank=32),
        blocks("nvfp4_extension", nv=64, rank=32, gpus=GPUS),
        blocks("mxfp8", mx=0),
        blocks("mxfp8_extension", mx=64, rank=32, gpus=GPUS),
        blocks("dual", nv=0, mx=0),
        blocks("dual_extension", nv=64, mx=64, rank=32),
        blocks("dual_extension_256", nv=256, mx=256, rank=256),
        blocks("swiglu_nvfp4_extension", nv=64, rank=32, swiglu=True, gpus=GPUS),
        blocks("swiglu_mxfp8_extension", mx=64, rank=32, swiglu=True, gpus=GPUS),
        decoder("nvfp4"),
        decoder("mxfp8"),
        decoder("int8", 0),
        decoder("int8", 64),
        decoder("int8", 256),
    ]
