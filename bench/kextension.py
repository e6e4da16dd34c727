"""What the low-rank branch loses, and costs, as columns of the layer's own GEMM. See bench/README.md.

Errors and bytes are computed here, on any device; the times are an estimate from spec peaks (kernels.md 9), never run.
"""

import argparse
import json

import record
import torch

record.load_pack()

from tessera.formats import FORMATS, FP8E4M3  # noqa: E402
from tessera.kernels import kextension as kx  # noqa: E402
from tessera.kernels import reference as ref  # noqa: E402
from tessera.kernels.balance import balance  # noqa: E402
from tessera.quantization import lowrank  # noqa: E402
from tessera.quantization.moment import Moment  # noqa: E402

KINDS = ("nvfp4", "mxfp8", "fp8_row")
LAYERS = {"qkv": (11520, 3840), "out": (3840, 3840), "w1": (10240, 3840), "w3": (10240, 3840), "w2": (3840, 10240)}
ROWS = 4608  # Z-Image at 1024x1024
PEAKS = {  # dense TFLOPS of the kind, bf16 TFLOPS, TB/s
    ("RTX 5090", "nvfp4"): (1676, 209.5, 1.79),
    ("RTX 5090", "mxfp8"): (838, 209.5, 1.79),
    ("B200", "nvfp4"): (9000, 2250, 8.0),
    ("B200", "mxfp8"): (4500, 2250, 8.0),
    ("H200", "fp8_row"): (1979, 989, 4.8),
}


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def operand(kind, x):
    """(qdata, scale, shared scale or None) of a weight or an input, with scales from its own largest values."""
    if kind == "fp8_row":
        scale = x.abs().amax(1, keepdim=True) / FP8E4M3.max
        return ref.fp8_codes(x, scale), scale, scale
    format = FORMATS[kind]()
    entries = format.pack(format.encode(x))
    return entries["weight"], entries["weight_scale"], entries.get("weight_scale_2")


def product(kind, x, weight):
    parts = 3 if kind == "nvfp4" else 2
    return ref.packed_product(kind, x[:parts], weight[:parts])


def inside(kind, x, rounded, packed, down, up, exact=False):
    """The output [M, N] with the branch in the product, t in bf16, and the balance; or why not."""
    factors = balance(kind, down, up, packed[2])
    if isinstance(factors, str):
        return factors
    layout = kx.layout(kind, [down.shape[0]], exact)
    wide = kx.reserve(kind, *packed[:2], layout.columns)
    kx.write(kx.encode_up(kind, factors.up, packed[2], layout), *wide, layout.columns)
    t = ref.branch_middle(x, factors.down, torch.tensor(1.0)).bfloat16()
    extended = kx.extend_input(kind, *rounded[:2], t, rounded[2], layout)
    return product(kind, (*extended, rounded[2]), (*wide, packed[2])), factors


def inside_int8(x, weight, down, up, base):
    """What int8 would make of it: codes of both factors under the row scales of x and W. Not a path of ours."""
    x_step, w_step = (v.abs().amax(1, keepdim=True) / 127 for v in (x, weight))
    factors = balance("fp8_row", down, up, w_step * 127 / ref.E4M3_MAX)
    if isinstance(factors, str):
        raise ValueError(factors)
    t = ref.branch_middle(x, factors.down, torch.tensor(1.0))
    codes = [(v / step).round().clamp(-127, 127) * step for v, step in ((t, x_step), (factors.up, w_step))]
    return base + codes[0] @ codes[1].T


def data(heavy, size, rows, seed=0):
    """Weight [size, size] of deviation .02, input [rows, size] with channels of very different size, their energies."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size, size, generator=generator)
    if heavy:  # Student t, 4 degrees of freedom
        weight = weight / torch.randn(4, size, size, generator=generator).square().mean(0).sqrt()
    channels = torch.exp(1.1 * torch.randn(size, generator=generator))
    return 0.02 * weight, torch.randn(rows, size, generator=generator) * channels, channels.square()


def errors(size=1024, rows=512, rank=32):
    """Relative output errors of a corrected layer, W and x rounded, and of the branch itself."""
    result = []
    for kind in KINDS:
        for heavy in (False, True):
            weight, x, energy = data(heavy, size, rows)
            packed, rounded = operand(kind, weight), operand(kind, x)
            decoded = ref.packed_decode(kind, *packed[: 3 if kind == "nvfp4" else 2])
            pair = lowrank.fit(weight - decoded, rank, moment=Moment(energy, size))
            down, up = pair.down.bfloat16(), pair.up.bfloat16()
            truth, base = x @ weight.T, product(kind, rounded, packed)
            branch = ref.branch_middle(x, down, torch.tensor(1.0)) @ up.float().T
            y, factors = inside(kind, x, rounded, packed, down, up)
            result.append({
                "format": kind, "weights": "heavy" if heavy else "gaussian", "no branch": relative(base, truth),
                "exact": relative(base + branch, truth), "k_extension": relative(y, truth),
                "branch": relative(y - base, branch), "rho_t": factors.rho_t, "rho_b": factors.rho_b,
            })  # fmt: skip
    return result


def branch_errors(size=1024, rows=512, rank=16, part=0.02):
    """Relative error of a LoRA's own term, its product `part` of the weight: plain, hi/lo, and what int8 would do."""
    weight, x, _ = data(False, size, rows)
    generator = torch.Generator().manual_seed(1)
    down = (torch.randn(rank, size, generator=generator) / size**0.5).bfloat16()
    up = (torch.randn(size, rank, generator=generator) * 0.02 * part * (size / rank) ** 0.5).bfloat16()
    branch = ref.branch_middle(x, down, torch.tensor(1.0)) @ up.float().T
    result = []
    for kind in KINDS:
        packed, rounded = operand(kind, weight), operand(kind, x)
        base = product(kind, rounded, packed)
        row = {"format": kind}
        for name, exact in (("plain", False), ("hi_lo", True)):
            found = inside(kind, x, rounded, packed, down, up, exact)
            row[name] = found if isinstance(found, str) else relative(found[0] - base, branch)
        result.append(row)
    y = inside_int8(x, weight, down, up, torch.zeros(rows, size))
    result.append({"format": "int8 (refused)", "plain": relative(y, branch), "hi_lo": "-"})
    return [*result, {"format": "int8, a correction (refused)", "plain": int8_correction(size, rows), "hi_lo": "-"}]


def int8_correction(size, rows, rank=32):
    """The same error for a correction of an int8 row-wise weight."""
    weight, x, energy = data(False, size, rows)
    step = weight.abs().amax(1, keepdim=True) / 127
    pair = lowrank.fit(weight - (weight / step).round() * step, rank, moment=Moment(energy, size))
    down, up = pair.down.bfloat16(), pair.up.bfloat16()
    branch = ref.branch_middle(x, down, torch.tensor(1.0)) @ up.float().T
    return relative(inside_int8(x, weight, down, up, torch.zeros(rows, size)), branch)


def sizes(columns=kx.STEP):
    """MB that the reserved columns add to Z-Image's layers on the device."""
    result = []
    for kind in KINDS:
        plain = wide = 0
        for n, k in LAYERS.values():
            per_byte, block = (2 if kind == "nvfp4" else 1), ref.BLOCKS[kind]
            for width in (k, k + columns):
                scales = ref.round_up(n, 128) * ref.round_up(width // block, 4) if block else 4 * n
                total = n * width // per_byte + scales
                plain, wide = (plain + total, wide) if width == k else (plain, wide + total)
        result.append({"format": kind, "columns": columns, "MB a block": plain / 1e6, "with columns": wide / 1e6,
                       "more_%": 100 * (wide / plain - 1)})  # fmt: skip
    return result


def roofline(rank=32, rows=ROWS):
    """Estimate of what the branch adds to Z-Image's layers: E/K of the GEMM's arithmetic, beside the addmm it replaces.

    64 columns are plain rank 32, 128 hi/lo.

    quantizer: the down projection's bf16 arithmetic where it outlasts the pass over memory that it is hidden under.
    addmm: x read again, y read and written, at the memory's peak.
    """
    result = []
    for (gpu, kind), (peak, half, memory) in PEAKS.items():
        layer = naive = 0.0  # us
        more = {64: 0.0, 128: 0.0}
        for n, k in LAYERS.values():
            traffic = rows * k * (2 + input_bytes(kind)) / memory / 1e6
            layer += 2 * rows * n * k / peak / 1e6 + traffic
            naive += rows * (2 * k + 4 * n) / memory / 1e6
            for columns in more:
                more[columns] += 2 * rows * n * columns / peak / 1e6 + rows * columns * input_bytes(kind) / memory / 1e6
                more[columns] += max(0.0, 2 * rows * k * rank / half / 1e6 - traffic)
        result.append({"gpu (estimate)": gpu, "format": kind, "layers_us": layer,
                       "branch_64_%": 100 * more[64] / layer, "branch_128_%": 100 * more[128] / layer,
                       "addmm_%": 100 * naive / layer})  # fmt: skip
    return result


def input_bytes(kind):
    """Bytes of one quantized input, scales included."""
    return {"nvfp4": 0.5625, "mxfp8": 1 + 1 / 32, "fp8_row": 1.0}[kind]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="in and out features of the layer the errors are of")
    parser.add_argument("--json", action="store_true", help="all figures as one JSON object in the last line")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    tables = {
        "output error": errors(arguments.size),
        "branch error": branch_errors(arguments.size),
        "bytes": sizes(),
        "estimate": roofline(),
    }
    for name, rows in tables.items():
        print(f"\n{name}\n")
        record.table(rows)
        if arguments.save:
            record.save(f"kextension {name}", rows)
    if arguments.json:
        print(json.dumps(tables))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
