"""What stacked LoRAs cost on one layer of Z-Image's width, and a change of their strengths. See bench/README.md."""

import argparse
import json
import time
from statistics import median

import block
import record
import torch

COUNTS = (0, 1, 2, 4, 8)
FORMATS = ("nvfp4", "mxfp8", "int8_convrot", "bf16")
LAYERS = 100  # of a strength change


def layer(format, width, device, dtype):
    """A layer [width, width] as our loader makes it; bf16: as the host's own, to be hooked."""
    import comfy.ops

    from tessera import formats
    from tessera.host import operations as ours
    from tessera.kernels.facts import read_facts

    weight = torch.randn(width, width, generator=torch.Generator().manual_seed(0)) * 0.02
    if format == "bf16":
        made = comfy.ops.manual_cast.Linear(width, width, bias=False, device=device, dtype=dtype)
        made.weight = torch.nn.Parameter(weight.to(device, dtype), requires_grad=False)
        return made
    kind = formats.parse(format).for_shape(width, width)
    entries = kind.pack(kind.encode(weight)) | {"comfy_quant": formats.marker(kind.record())}
    loading = ours.Loading(read_facts(device, dtype), device=str(device))
    made = ours.operations(dtype, loading).Linear(width, width, bias=False, device=device, dtype=dtype)
    made.load_state_dict(entries, strict=False)
    return made.to(device)


def stacked(made, width, count, rank, device):
    """The layer's call with `count` LoRAs beside it, given an input."""
    from tessera.branch import Branches, Strengths
    from tessera.host.carrying import cast
    from tessera.injection import _adding

    if not count:
        return made
    branches = Branches({"": parts(width, count, rank)}, {"": (width, width)}, block_linear()).build()
    [item], strengths = branches.items, Strengths([0.5] * count)
    item.group.to(device), item.to(device)
    attach = getattr(made, "attach_branch", None)

    def call(x):
        hook = _adding(item, strengths, cast)
        handle = attach(item, strengths) if attach else made.register_forward_hook(hook)
        try:
            return made(x)
        finally:
            handle.remove()

    return call


def parts(width, count, rank, first=0):
    from tessera.adapters import Change, LoRA, form
    from tessera.branch import Part
    from tessera.quantization.lowrank import LowRank

    generator = torch.Generator().manual_seed(count)
    found = []
    for entry in range(first, first + count):
        up, down = (0.01 * torch.randn(s, generator=generator) for s in ((width, rank), (rank, width)))
        found.append(Part(entry, form(Change(LoRA(LowRank(up.half(), down.half()))), (width, width), None)))
    return found


def block_linear():
    import comfy.ops

    return comfy.ops.manual_cast.Linear


def seconds(call, x):
    """Of this process's processor on a CPU: other programs do not count, so one thread; of the clock on a GPU."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if x.device.type == "cuda" else time.process_time
    started = clock()
    call(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - started


def overheads(format, arguments, device, dtype):
    """One row: the layer alone in ms, and by how much each number of LoRAs lengthens it; every call in its turn."""
    made = layer(format, arguments.width, device, dtype)
    x = torch.randn(1, arguments.rows, arguments.width, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    calls = {n: stacked(made, arguments.width, n, arguments.rank, device) for n in COUNTS}
    times = {n: [] for n in COUNTS}
    for turn in range(arguments.repeat + 1):
        for n, call in calls.items():
            spent = seconds(call, x)
            if turn:  # the first fills caches
                times[n].append(spent)
    row = {"format": format, "rows": arguments.rows, "alone ms": 1000 * median(times[0])}
    for n in COUNTS[1:]:
        ratios = [spent / alone for spent, alone in zip(times[n], times[0], strict=True)]
        row[f"{n} LoRAs"] = median(ratios) - 1
    return row


def changes(count, rank, device, repeat=50):
    """Milliseconds to write the strengths of `count` LoRAs over LAYERS layers: on all of them, each on every second."""
    from tessera.branch import Branches, Strengths

    found = {}
    for name, chosen in (
        ("on all layers", lambda layer: range(count)),
        ("a mix for each layer", lambda layer: [n for n in range(count) if (layer + 1) >> n & 1]),
    ):
        taken = {f"{layer}": [part for n in chosen(layer) for part in parts(64, 1, rank, n)] for layer in range(LAYERS)}
        taken = {name: some for name, some in taken.items() if some}
        branches = Branches(taken, dict.fromkeys(taken, (64, 64)), block_linear()).build()
        strengths, spent = Strengths([1.0] * count), []
        strengths.prepare(branches, device)
        for turn in range(repeat):
            started = time.perf_counter()
            strengths.set([0.01 * turn + n for n in range(count)])
            spent.append(1000 * (time.perf_counter() - started))
        found[name] = median(spent)
    return {"LoRAs": count, "layers": LAYERS} | {f"{name}, ms": value for name, value in found.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=4608)
    parser.add_argument("--width", type=int, default=3840)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    block.start()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # what the host computes in there
    torch.set_num_threads(1)
    with torch.inference_mode():
        rows = [overheads(format, arguments, device, dtype) for format in arguments.formats.split(",")]
        moves = [changes(count, arguments.rank, device) for count in (1, 8)]
    record.table(rows)
    record.table(moves)
    if arguments.json:
        print(json.dumps({"layer": rows, "strengths": moves}))
    if arguments.save:
        record.save("lora_stack", rows)
        record.save("lora_strengths", moves)


if __name__ == "__main__":
    main()
