"""One quantized linear layer of Z-Image: ours beside the host's own op and plain F.linear. See bench/README.md."""

import argparse
import dataclasses
import json
import time
from statistics import median

import record
import torch
from torch.nn.functional import linear as dense_linear

SHAPES = {"qkv": (11520, 3840), "out": (3840, 3840), "w13": (10240, 3840), "w2": (3840, 10240)}  # [out, in]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
HOST_NATIVE = {"int8_tensorwise": (0, 0), "nvfp4": (10, 0), "mxfp8": (10, 0)}  # SM; below, the host decodes per call
CARRYING = ("nvfp4", "mxfp8", "fp8_row")  # kernels with reserved columns for branches
ERROR_ROWS = 64


class Case:
    """A weight in one format: ours by its plan, with and without a branch, and as the host multiplies it."""

    def __init__(self, label, weight, facts, dtype, speed, rank):
        from tessera import formats
        from tessera.kernels import dispatch
        from tessera.kernels.linear import LowRankBranch

        self.shape, self.facts = tuple(weight.shape), facts
        self.format = formats.parse(label).for_shape(*self.shape)
        entries = self.format.pack(self.format.encode(weight))
        self.decoded = self.format.decode(self.format.unpack(entries, *self.shape))  # what the file stands for
        self.plan = dispatch.plan(self.format, facts, speed, self.shape)
        self.quantized = quantized_tensor(self.format, entries, self.shape, dtype)
        self.stored = self._stored(entries)
        down, up = (torch.randn(s, device=weight.device) * 0.02 for s in ((rank, self.shape[1]), (self.shape[0], rank)))
        self.branch = LowRankBranch(down.to(dtype), up.to(dtype), torch.ones(rank, device=weight.device))
        self.inside = self._carried(rank)

    def host(self, x):
        """As ComfyUI's Linear.forward without patches."""
        from comfy_kitchen.tensor import QuantizedTensor

        name = self.format.name
        if (self.facts.sm or (0, 0)) < HOST_NATIVE[name]:
            return dense_linear(x, self.quantized.dequantize())
        return dense_linear(
            x if name == "int8_tensorwise" else QuantizedTensor.from_float(x, self.format.layout), self.quantized
        )

    def ours(self, x, branch=None):
        from tessera.kernels import dispatch, linear

        if self.plan.kernel == dispatch.HOST:
            y = self.host(x)
            return y if branch is None else branch.add_to(y, x)
        return linear.run(self.plan.kernel, x, self.stored, None, branch)

    def naive(self, x):
        """The branch as a LoRA node adds it: two products and a sum, in x's dtype."""
        return self.ours(x) + dense_linear(dense_linear(x, self.branch.down), self.branch.up)

    def path(self, m):
        """How ours runs, in the words of the plan; on a CPU with what it chooses for that many rows."""
        from tessera.kernels import cpu

        target = f" {self.plan.target}" if self.plan.target else ""
        how = self.plan.kernel
        if how in ("cpu_int8", "cpu_widened"):
            how = f"cpu_{cpu.choose(m, *self.shape, self.facts.cpu, self.stored.code_max)[0]}"
        return f"{self.plan.path}{target}: {how}"

    def _stored(self, entries):
        from tessera import transcode
        from tessera.kernels import dispatch, kextension
        from tessera.kernels.linear import Stored

        format, device, code_max = self.format, self.decoded.device, 127
        if self.plan.path == dispatch.TRANSCODE:
            made = transcode.transcode(format, entries, self.shape, self.plan, device.type)
            format, code_max = made.format, self.plan.code_max
            entries = {suffix: tensor.to(device) for suffix, tensor in made.entries.items()}
        kind = {"int8_tensorwise": "int8"}.get(format.name, format.name)
        kind = "fp8_row" if self.plan.target == "fp8_row" else kind
        scales = (entries["weight_scale_2"], entries["weight_scale"]) if kind == "nvfp4" else (entries["weight_scale"],)
        group = format.convrot_groupsize if kind == "int8" else 0
        stored = Stored(kind, self.shape, entries["weight"], *scales, group=group, code_max=code_max)
        if self.plan.kernel not in CARRYING:
            return stored
        tiled = "block_scale" if kind == "nvfp4" else "scale"
        qdata, scale = kextension.reserve(kind, stored.qdata, getattr(stored, tiled), kextension.STEP)
        return dataclasses.replace(stored, qdata=qdata, extension=kextension.STEP, **{tiled: scale})

    def _carried(self, rank):
        if not self.stored.extension:
            return self.branch
        from tessera.kernels import extended

        found = extended.encode(self.stored, self.branch, [rank], [False])
        if isinstance(found, str):
            raise ValueError(
                f"{self.format.label} {list(self.shape)}: the branch does not fit beside the weight: {found}"
            )
        extended.place(self.stored, found)
        return dataclasses.replace(self.branch, extended=found)


def quantized_tensor(format, entries, shape, dtype):
    """The weight as the host holds it after loading a file."""
    from comfy_kitchen.tensor import QuantizedTensor, get_layout_class

    params = {"scale": entries["weight_scale"], "orig_dtype": dtype, "orig_shape": shape}
    if format.name == "nvfp4":
        params |= {"scale": entries["weight_scale_2"], "block_scale": entries["weight_scale"]}
    if format.name == "mxfp8":
        params["scale"] = entries["weight_scale"].view(torch.float8_e8m0fnu)
    if format.name == "int8_tensorwise":
        params |= {"convrot": format.convrot, "convrot_groupsize": format.convrot_groupsize or 256}
    return QuantizedTensor(entries["weight"], format.layout, get_layout_class(format.layout).Params(**params))


class Contestant:
    """A call that is timed; one that would take longer than `slow` seconds runs on fewer rows.

    Its time is then continued along the line through those and 64 rows: decoding a weight costs the same for any M.
    """

    def __init__(self, call, x, slow, timer):
        self.call, self.timer, self.m, self.times = call, timer, x.shape[0], []
        few = x[:64]
        timer(call, few)
        self.few = len(few), timer(call, few)
        estimate = self.few[1] * self.m / max(1, len(few))
        self.rows = self.m if estimate <= slow * 1e3 else max(len(few), int(self.m * slow * 1e3 / estimate))
        self.x = x[: self.rows]
        self.seconds = timer(call, self.x) / 1e3  # warms up

    def once(self):
        ms = self.timer(self.call, self.x)
        if self.rows == self.m:
            return ms
        if self.rows < 2 * self.few[0]:
            return ms * self.m / self.rows
        slope = (ms - self.few[1]) / (self.rows - self.few[0])
        return ms + slope * (self.m - self.rows)

    def repeat(self):
        self.times.append(self.once())

    @property
    def ms(self):
        return median(self.times)


def timer_of(device):
    """A function (call, x) -> milliseconds; on CUDA by events, after a flush of the L2 cache.

    One CPU thread is timed by the processor time it gets, so that other processes do not count.
    """
    if device.type == "cpu":
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter

        def elapsed(call, x):
            started = clock()
            call(x)
            return (clock() - started) * 1e3

        return elapsed
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def events(call, x):
        flush.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        call(x)
        last.record()
        last.synchronize()
        return first.elapsed_time(last)

    return events


def measure(case, m, dense, dtype, arguments, timer):
    """The row of one layer, format and M."""
    n, k = case.shape
    x = torch.randn(m, k, device=case.decoded.device).to(dtype)
    calls = {"ours": (case.ours, x), "fused": (lambda x: case.ours(x, case.inside), x), "naive": (case.naive, x),
             "host": (case.host, x)}  # fmt: skip
    for name, weight in dense.items():
        calls[name] = (lambda x, weight=weight: dense_linear(x, weight)), x.to(DTYPES[name])
    runs = {name: Contestant(call, x, arguments.slow, timer) for name, (call, x) in calls.items()}
    once = sum(run.seconds for run in runs.values())
    for _ in range(max(arguments.repeats, min(20, int(arguments.seconds / once)))):
        for run in runs.values():  # in turn, so that all meet the same machine
            run.repeat()
    ours = runs["ours"].ms
    extra = {name: median(t / o - 1 for t, o in zip(runs[name].times, runs["ours"].times, strict=True))
             for name in ("fused", "naive")}  # fmt: skip
    stored = sum(t.numel() * t.element_size() for t in (case.stored.qdata, case.stored.scale, case.stored.block_scale)
                 if t is not None)  # fmt: skip
    some = x[:ERROR_ROWS]
    exact = some.float() @ case.decoded.T
    errors = [((y.float() - exact).norm() / exact.norm()).item() for y in (case.ours(some), case.host(some))]
    row = {"format": case.format.label, "path": case.path(m), "m": m, "n": n, "k": k, "ours_ms": ours,
           "host_ms": runs["host"].ms}  # fmt: skip
    row |= {f"{name}_ms": runs[name].ms for name in dense}
    row |= {"branch_overhead": extra["fused"], "naive_overhead": extra["naive"]}
    row |= {"x_host": runs["host"].ms / ours} | {f"x_{name}": runs[name].ms / ours for name in dense}
    row |= {"tflops": 2 * m * n * k / ours / 1e9, "gb_s": (stored + (m * k + m * n) * x.element_size()) / ours / 1e6}
    row |= {"error": errors[0], "host_error": errors[1], "dtype": arguments.dtype, "threads": torch.get_num_threads()}
    return row | {f"{name}_m": runs[name].rows for name in ("host", *dense) if runs[name].rows != m}


def line(layer, row):
    """One row as it appears while the bench runs."""
    scaled = [f"{key[:-2]} from {row[key]} rows" for key in row if key.endswith("_m")]
    dense = "  ".join(f"{key[:-3]} {row[key]:.2f} ms" for key in row if key in ("bf16_ms", "fp16_ms", "fp32_ms"))
    return (f"{row['format']:<16} {layer:<4} {row['m']}x{row['k']}x{row['n']}  {row['path']}  {row['ours_ms']:.2f} ms  "
            f"host {row['host_ms']:.2f} ms ({row['x_host']:.2f}x)  {dense} ({row['x_bf16']:.2f}x bf16)  "
            f"{row['tflops']:.2f} TFLOP/s  {row['gb_s']:.1f} GB/s  branch +{100 * row['branch_overhead']:.1f} % "
            f"(naive +{100 * row['naive_overhead']:.1f} %)  error {row['error']:.4f} (host {row['host_error']:.4f})"
            + (f"  [{', '.join(scaled)}]" if scaled else ""))  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--layers", default="qkv,out,w13,w2")
    parser.add_argument("--m", default="4608,512,77,1")
    parser.add_argument("--formats", default="int8_convrot_64,int8_convrot,nvfp4,mxfp8")
    parser.add_argument("--dtype", default="bf16", choices=DTYPES, help="of inputs; what the host computes in")
    parser.add_argument("--speed", default="auto", choices=("auto", "exact"))
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=15, help="to spend on a row, about")
    parser.add_argument("--repeats", type=int, default=3, help="at least, whatever they take")
    parser.add_argument("--slow", type=float, default=8, help="seconds; a longer call runs on fewer rows")
    parser.add_argument("--threads", type=int, help="of the CPU; torch's default")
    parser.add_argument("--json", action="store_true", help="end with all rows as one JSON line")
    parser.add_argument("--save", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads or torch.get_num_threads())
    record.load_pack()
    from tessera.kernels import dispatch

    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    facts, timer, rows = dispatch.read_facts(device, dtype), timer_of(device), []
    print(facts, flush=True)
    names = {"bf16", arguments.dtype} | ({"fp32"} if device.type == "cpu" else set())
    with torch.inference_mode():
        for layer in arguments.layers.split(","):
            torch.manual_seed(0)
            weight = torch.randn(SHAPES[layer], device=device) * 0.02
            dense = {name: weight.to(DTYPES[name]) for name in sorted(names)}
            for label in arguments.formats.split(","):
                case = Case(label, weight, facts, dtype, arguments.speed, arguments.rank)
                for m in map(int, arguments.m.split(",")):
                    rows.append(measure(case, m, dense, dtype, arguments, timer))
                    print(line(layer, rows[-1]), flush=True)
    if arguments.save:
        record.save(f"linear-{arguments.device}-{arguments.dtype}", rows)
    if arguments.json:
        print(json.dumps(rows))


if __name__ == "__main__":
    main()
