"""Which compiled variants of the GEMM kernels are looked at, and what their SASS must contain (kernels.md 8)."""

from tessera.kernels.gpu import block_scaled, int8_gemm, weight_only

SMALL, MIDDLE, LARGE = 0, 1, 2  # places in the tables of tiles
HALF = {80: r"^HMMA", 86: r"^HMMA", 89: r"^HMMA", 90: r"^HGMMA", 100: r"^UTCHMMA", 120: r"^HMMA"}
# What the cases above leave out: K that the tile does not divide, no padding to it, a wide branch, bias, one scale
RAGGED = {"EVEN_K": False, "RANK_BLOCK": 64}


def on(expect, *ccs):
    return {cc: expect[cc] for cc in ccs}


def gemm_case(name, kernel, tile, signature, constexprs, expect, max_registers, dtype="*bf16"):
    bias = {"bias_ptr": dtype} if constexprs.get("EVEN_K") is False else {}
    factors = dict.fromkeys(("t_ptr", "up_ptr", "y_ptr"), dtype)
    variant = {"RANK_BLOCK": 32, "EVEN_K": True, "GROUP_M": 8} | ({} if bias else {"bias_ptr": None})
    return {
        "name": name,
        "kernel": kernel,
        "signature": signature | bias | factors | dict.fromkeys(("M", "N", "K", "R"), "i32"),
        "constexprs": variant | {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k} | constexprs,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
        "expect": expect,
        "max_registers": max_registers,
    }


def int8_case(name, family, size, expect, max_registers=255, **constexprs):
    signature = {"q_ptr": "*i8", "x_scale_ptr": "*fp32", "weight_ptr": "*i8", "weight_scale_ptr": "*fp32"}
    constexprs = {"SCALE_PER_ROW": constexprs.get("EVEN_K", True)} | constexprs
    tile = int8_gemm.TILES[family][size][1]
    return gemm_case(
        f"int8_gemm-{name}", int8_gemm.int8_gemm_kernel, tile, signature, constexprs, expect, max_registers
    )


def int8_cases():
    imma = dict.fromkeys((80, 86, 89, 90, 120, 121), r"^IMMA")
    return [
        int8_case("consumer", "consumer", LARGE, on(imma, 86, 89, 120, 121)),
        int8_case("consumer_middle", "consumer", MIDDLE, on(imma, 89, 120), 128),
        int8_case("consumer_small", "consumer", SMALL, on(imma, 89, 120), 80),
        int8_case("consumer_ragged", "consumer", LARGE, on(imma, 89, 120), **RAGGED),
        int8_case("ampere", "ampere", LARGE, on(imma, 80)),
        int8_case("ampere_middle", "ampere", MIDDLE, on(imma, 80), 128),
        int8_case("ampere_small", "ampere", SMALL, on(imma, 80), 80),
        int8_case("hopper", "hopper", LARGE, {90: r"^IGMMA"}),
        int8_case("hopper_middle", "hopper", MIDDLE, {90: r"^IGMMA"}, 128),
        int8_case("hopper_small", "hopper", SMALL, on(imma, 90), 80),  # 16 rows are too few for IGMMA
        int8_case("hopper_ragged", "hopper", LARGE, {90: r"^IGMMA"}, **RAGGED),
        int8_case("blackwell", "blackwell", LARGE, {100: r"^UTCIMMA", 103: r"^IMMA"}),  # the B300 has no int8 UTCMMA
        int8_case("blackwell_middle", "blackwell", MIDDLE, {100: r"^UTCIMMA"}, 128),
        int8_case("blackwell_small", "blackwell", SMALL, {100: r"^IMMA"}, 80),
        int8_case("blackwell_ragged", "blackwell", LARGE, {100: r"^UTCIMMA"}, **RAGGED),
    ]


def weight_only_case(name, kind, tile, expect, max_registers, dtype="*bf16", **constexprs):
    blocked = kind in ("e2m1", "mx_e4m3")
    signature = {"x_ptr": dtype, "w_ptr": "*i8" if kind == "int8" else "*u8", "w_width": "i32", "scale_width": "i32"}
    constexprs = {"KIND": kind, "SCALE_PER_ROW": kind == "int8"} | constexprs
    for argument, present, pointer in (("scale_ptr", kind != "mx_e4m3", "*fp32"), ("block_scale_ptr", blocked, "*i32")):
        (signature if present else constexprs)[argument] = pointer if present else None
    gemv = tile is weight_only.GEMV_TILE
    kernel = weight_only.weight_only_gemv_kernel if gemv else weight_only.weight_only_gemm_kernel
    name = f"weight_only-{kind}{'_' * bool(name)}{name}"
    return gemm_case(name, kernel, tile, signature, constexprs, expect, max_registers, dtype)


def weight_only_cases():
    consumer, datacenter = ([tile for _, tile in weight_only.TILES[f]] for f in ("consumer", "datacenter"))
    found = []
    for kind in ("e2m1", "mx_e4m3", "int8", "e4m3", "e5m2"):
        everywhere = (80, 86, 89, 90, 100, 120) if kind == "e2m1" else (80, 120)
        found += [
            weight_only_case("consumer", kind, consumer[LARGE], on(HALF, 86, 89, 120), 192),
            weight_only_case("datacenter", kind, datacenter[LARGE], on(HALF, 80, 90, 100), 192),
            weight_only_case("small", kind, consumer[SMALL], on(HALF, 89), 144),
            weight_only_case("gemv", kind, weight_only.GEMV_TILE, dict.fromkeys(everywhere), 64),
        ]
    found += [
        weight_only_case("consumer_half", "e2m1", consumer[LARGE], on(HALF, 86), 192, "*fp16"),
        weight_only_case("consumer_middle", "e2m1", consumer[MIDDLE], on(HALF, 89), 192),
        weight_only_case("datacenter_middle", "e2m1", datacenter[MIDDLE], on(HALF, 90), 192),
        weight_only_case("datacenter_small", "e2m1", datacenter[SMALL], {90: r"^HMMA"}, 144),
        weight_only_case("gemv_ragged", "e2m1", weight_only.GEMV_TILE, {89: None}, 96, **RAGGED),
    ]
    for kind in ("e2m1", "mx_e4m3"):
        found.append(weight_only_case("consumer_ragged", kind, consumer[LARGE], on(HALF, 89), 255, **RAGGED))
        found.append(weight_only_case("datacenter_ragged", kind, datacenter[LARGE], on(HALF, 90), 255, **RAGGED))
    return found


def block_scaled_case(name, format, tile, expect, max_registers, **constexprs):
    codes = "*u8" if format == "e2m1" else "*fp8e4nv"
    signature = {"a_ptr": codes, "a_scale_ptr": "*i32", "b_ptr": codes, "b_scale_ptr": "*i32"}
    signature |= {"a_scale_width": "i32", "b_scale_width": "i32"}
    constexprs = {"FORMAT": format} | constexprs
    for argument in ("a_global_ptr", "b_global_ptr"):
        (signature if format == "e2m1" else constexprs)[argument] = "*fp32" if format == "e2m1" else None
    kernel = block_scaled.block_scaled_gemm_kernel
    return gemm_case(f"block_scaled-{name}", kernel, tile, signature, constexprs, expect, max_registers)


def block_scaled_cases():
    instructions = {
        ("nvfp4", "e2m1"): {100: r"^UTCOMMA", 103: r"^UTCOMMA", 120: r"^OMMA\.SF", 121: r"^OMMA\.SF"},
        ("mxfp8", "e4m3"): {100: r"^UTCQMMA", 103: r"^UTCQMMA", 120: r"^QMMA\.SF", 121: r"^QMMA\.SF"},
    }
    found = []
    for (name, format), expect in instructions.items():
        tile = block_scaled.TILES[name]
        found += [
            block_scaled_case(f"{name}_10", format, tile[10], on(expect, 100, 103), 128),
            block_scaled_case(f"{name}_12", format, tile[12], on(expect, 120, 121), 192),
            block_scaled_case(f"{name}_10_ragged", format, tile[10], on(expect, 100), 192, **RAGGED),
            block_scaled_case(f"{name}_12_ragged", format, tile[12], on(expect, 120), 255, **RAGGED),
        ]
    return found


def aot_cases():
    return int8_cases() + weight_only_cases() + block_scaled_cases()
