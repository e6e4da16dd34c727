"""Which compiled variants of the GEMM kernels are looked at, and what their SASS must contain."""

from tessera.kernels.gpu import int8_gemm


def tile(t):
    return {"BLOCK_M": t.m, "BLOCK_N": t.n, "BLOCK_K": t.k}


def int8_case(name, t, expect, **more):
    return {
        "name": name,
        "kernel": int8_gemm.int8_gemm_kernel,
        "signature": {
            "q_ptr": "*i8", "x_scale_ptr": "*fp32", "weight_ptr": "*i8", "weight_scale_ptr": "*fp32",
            "t_ptr": "*bf16", "up_ptr": "*bf16", "y_ptr": "*bf16", "M": "i32", "N": "i32", "K": "i32", "R": "i32",
        },
        "constexprs": {
            "bias_ptr": None, "SCALE_PER_ROW": True, "RANK_BLOCK": 32, "EVEN_K": True, "GROUP_M": 8, **tile(t),
        },
        "num_warps": t.warps,
        "num_stages": t.stages,
        "expect": expect,
        "max_registers": 255,
        **more,
    }  # fmt: skip


def aot_cases():
    tiles = {family: [t for _, t in table] for family, table in int8_gemm.TILES.items()}
    imma = dict.fromkeys((86, 89, 120), r"^IMMA\.")
    return [
        int8_case("int8_gemm-consumer", tiles["consumer"][2], imma),
        int8_case("int8_gemm-consumer-small", tiles["consumer"][0], imma),
        int8_case("int8_gemm-consumer-mid", tiles["consumer"][1], imma),
        int8_case("int8_gemm-ampere", tiles["ampere"][2], {80: r"^IMMA\."}),
        int8_case("int8_gemm-hopper", tiles["hopper"][2], {90: r"^IGMMA\."}),
        int8_case("int8_gemm-hopper-small", tiles["hopper"][0], {90: r"^I(G)?MMA\."}),
        int8_case("int8_gemm-hopper-mid", tiles["hopper"][1], {90: r"^I(G)?MMA\."}),
        int8_case("int8_gemm-blackwell", tiles["blackwell"][2], {100: r"^UTCIMMA", 103: "^IMMA"}),
        int8_case("int8_gemm-blackwell-mid", tiles["blackwell"][1], {100: r"^UTCIMMA"}),
    ]
