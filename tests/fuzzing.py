"""Mutants of sound files through every reader: refused with a ValueError, or read as what their bytes say.

    fuzzing.py FOLDER SEED FIRST COUNT [SECONDS]    prints what came of cases FIRST to FIRST + COUNT as JSON

Case n of a seed is always the same mutant. What goes wrong is left in FOLDER, named by case and finding.
"""

import json
import random
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save

from conftest import load_pack

load_pack()

import fuzz_decode  # noqa: E402
import mutating  # noqa: E402
from tessera import calibration_file, formats, lora  # noqa: E402
from tessera.checkpoint import Checkpoint  # noqa: E402
from tessera.kernels import reference as ref  # noqa: E402
from tessera.quantization import layer_map, recipe  # noqa: E402

HERE = Path(__file__).parent
GOLDEN = ("ctq126_mixed_prefixed", "ctq134_int8_qwen", "legacy_e4m3", "legacy_e5m2", "mislabel_nvfp4", "small_mxfp8",
          "refuse_int8_blockwise", "refuse_fp8_rowwise", "refuse_fp8_blockwise", "refuse_hybrid_mxfp8")  # fmt: skip
FINDINGS = ("refused", "accepted", "crash", "hang", "wrong")
HANG = 10.0  # seconds; a case takes some milliseconds
LAYERS = {f"layers.{n}.{part}.weight": (32, 64) for n in range(3) for part in ("w1", "w2", "attention.qkv")}


class Wrong(Exception):
    """A file was accepted as something else than its bytes say."""


class Hang(BaseException):
    """A reader did not come back."""


@dataclass
class Outcome:
    counts: dict[str, Counter] = field(default_factory=dict)  # by reader
    findings: list[str] = field(default_factory=list)  # of crashes, hangs and wrong loads
    slowest: float = 0.0

    def as_dict(self) -> dict:
        return {"counts": self.counts, "findings": self.findings, "slowest": self.slowest}


# ---- what a reader must have understood


def check_checkpoint(path: Path, data: bytes, deep: bool) -> None:
    file = Checkpoint(path)
    found = _same_tensors(file, data)
    for name, layer in file.layers.items():
        if layer.zero:
            _require_zero(layer.key, found, file.weight(name, absorbed=False))
            continue
        by_row = layer.foreign is not None and layer.foreign.exact
        smoothing = found.get(f"{layer.key}.pre_quant_scale")
        columns = layer.shape[1] if smoothing is None else len(smoothing)  # fewer: the file does not say its padding
        shape = (layer.shape[0], columns)
        expected = fuzz_decode.weight(found, layer.key, layer.record, shape, by_row)
        weight = file.weight(name, shape, absorbed=False)
        _require_same(layer.key, weight, expected, getattr(layer.format, "convrot", False))
    if deep:
        _check_repair(path, file)


def _same_tensors(file: Checkpoint, data: bytes) -> dict[str, torch.Tensor]:
    try:
        found = fuzz_decode.tensors(data)
    except safetensors.SafetensorError as problem:
        raise Wrong(f"safetensors refuses it: {problem}") from None
    if found.keys() != file.tensors.keys() or fuzz_decode.metadata(data) != file.metadata:
        raise Wrong("other tensors or metadata than safetensors finds")
    for key, tensor in found.items():
        mine = file.read(key)
        if mine.dtype != tensor.dtype or mine.shape != tensor.shape or not _equal(mine, tensor):
            raise Wrong(f"{key}: other bytes than safetensors finds")
    return found


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8))


def _require_same(key: str, weight: torch.Tensor, expected: torch.Tensor, rotated: bool) -> None:
    if weight.shape != expected.shape:
        raise Wrong(f"{key}: {tuple(weight.shape)} and not {tuple(expected.shape)}")
    finite = weight.isfinite() & expected.isfinite()
    if not rotated and not torch.equal(weight.isfinite(), expected.isfinite()):
        raise Wrong(f"{key}: other infinities")
    difference = torch.where(finite, weight - expected, 0.0).abs().double()
    size = torch.where(finite, expected, 0.0).abs().double()
    size = size.amax(1, keepdim=True) if rotated and size.numel() else size
    if (difference > 1e-5 * size + 1e-38).any():
        raise Wrong(f"{key}: another weight than its bytes say")


def _require_zero(key: str, found: dict[str, torch.Tensor], weight: torch.Tensor) -> None:
    codes, scale = found[f"{key}.weight"], found.get(f"{key}.weight_scale_2")
    smoothing = found.get(f"{key}.pre_quant_scale")
    stored = codes.contiguous().flatten().view(torch.uint8).any() and (scale is None or scale.any())
    if stored or (weight.any() and (smoothing is None or smoothing.isfinite().all())):
        raise Wrong(f"{key}: is not all zero")


def _check_repair(path: Path, file: Checkpoint) -> None:
    """The host gets what the file says, or nothing."""
    state = {key: file.read(key) for key in file.tensors}
    try:
        repaired = file.repair(state)
    except ValueError:
        return
    again = path.with_name("repaired.safetensors")
    again.write_bytes(save({key: tensor.contiguous().clone() for key, tensor in repaired.items()}))
    twin = Checkpoint(again)
    left = [line for line in twin.repairs if not line.endswith("less exact than row scales")]
    if left or {n: x.format for n, x in twin.layers.items()} != {n: x.format for n, x in file.layers.items()}:
        raise Wrong(f"repaired, it needs repair: {left[:1]}")
    for name, layer in file.layers.items():
        if layer.foreign is None or layer.foreign.exact:
            _require_same(layer.key, twin.weight(name, layer.shape), file.weight(name, absorbed=False), False)


def check_lora(path: Path, data: bytes, deep: bool) -> None:
    read = lora.read_adapters(path)
    try:
        found = fuzz_decode.tensors(data)
    except safetensors.SafetensorError as problem:
        raise Wrong(f"safetensors refuses it: {problem}") from None
    for base, change in read.changes.items():
        raw = {key.removeprefix(base): tensor for key, tensor in read.raw[base].items()}
        for key, tensor in raw.items():
            same = [t for t in found.values() if t.shape == tensor.shape]
            if not any(torch.equal(tensor.double().nan_to_num(), t.double().nan_to_num()) for t in same):
                raise Wrong(f"{base}: {key} is not in the file")
        if change.adapter is not None and change.adapter.kind == "LoRA" and "lora_mid" not in str(raw.keys()):
            _require_same_lora(base, change.adapter, raw)
    if deep:
        _check_pairs(path)


def _require_same_lora(base: str, adapter, raw: dict[str, torch.Tensor]) -> None:
    up = next(t for k, t in raw.items() if lora.adapter_parts.split(f"x{k}")[1] == "lora_up").float().flatten(1)
    down = next(t for k, t in raw.items() if lora.adapter_parts.split(f"x{k}")[1] == "lora_down").float().flatten(1)
    scale = raw[".alpha"].item() / down.shape[0] if ".alpha" in raw else 1.0
    expected, delta = (up * scale) @ down, adapter.delta(torch.zeros(up.shape[0], down.shape[1]), 1.0)
    size = (up * scale).norm() * down.norm()
    if delta.shape != expected.shape or (size.isfinite() and (delta - expected).norm() > 1e-3 * size + 1e-30):
        raise Wrong(f"{base}: another difference than its factors say")


def _check_pairs(path: Path) -> None:
    try:
        pairs = lora.read(path)
    except ValueError:
        return
    for base, pair in pairs.items():
        if pair.up.shape[1] != pair.down.shape[0]:
            raise Wrong(f"{base}: a pair that is none")


def check_calibration(path: Path, data: bytes, deep: bool) -> None:
    read = calibration_file.read(path)
    found = fuzz_decode.tensors(data)
    for site in read.sites:
        try:
            statistics = read.sites[site]
        except ValueError:
            continue  # NaN: refused when it is asked for
        for part in calibration_file.PARTS:
            if not _equal(getattr(statistics, part), found[f"{site}.{part}"]):
                raise Wrong(f"{site}.{part}: other bytes than safetensors finds")
    if deep:
        calibration_file.inspect(path)


def check_recipe(path: Path, data: bytes, deep: bool) -> None:
    read = recipe.read(path)
    said = tomllib.loads(data.decode("utf-8-sig"))
    tables = said.get("rule", [])
    if len(read.rules) != len(tables):
        raise Wrong("other rules than TOML finds")
    for rule, table in zip(read.rules, tables, strict=True):
        [word] = table.keys() - {"reason", "regex", "optional", "rank"}
        label = "keep" if word == "keep" else formats.parse(word).label
        same = layer_map.label(rule.format) == label and list(rule.patterns) == table[word]
        if not same or (rule.regex, rule.rank) != (table.get("regex", False), table.get("rank")):
            raise Wrong(f"rule {table} was read as {rule}")
    read.resolve(LAYERS)


CHECKS: dict[str, Callable[[Path, bytes, bool], None]] = {
    "checkpoint": check_checkpoint, "LoRA": check_lora, "calibration": check_calibration, "recipe": check_recipe,
}  # fmt: skip
SHARES = {"checkpoint": 9, "LoRA": 5, "calibration": 3, "recipe": 3}  # of 20 cases


# ---- sound files to begin with


def seeds() -> dict[str, list[bytes]]:
    golden = [(HERE / "golden" / f"{name}.safetensors").read_bytes() for name in GOLDEN]
    return {
        "checkpoint": [*_small_checkpoints(), *golden],
        "LoRA": [*_small_loras(), (HERE / "golden/ctq126_mixed_prefixed_lora.safetensors").read_bytes()],
        "calibration": [_small_calibration()],
        "recipe": [path.read_bytes() for path in sorted((HERE.parent / "recipes").glob("*.toml"))] + [RECIPE],
    }


RECIPE = b"""name = "fuzz"
description = "every kind of rule"
architecture = "auto"
default = "nvfp4"

[[rule]]
int8_convrot_64 = ["layers.{0-1,7}.w*", "**.attention.{qkv,out}"]
reason = "first \\u00e9"
rank = 8

[[rule]]
keep = ['w2\\.weight$']
regex = true
optional = true
reason = 'second'
"""


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _small_checkpoints() -> list[bytes]:
    """Each format, tiny; one file of all of them; branches, smoothing, a lost marker, scales row by row."""
    generator, files, everything, records = _generator(), [], {}, {}
    for number, label in enumerate(("nvfp4", "mxfp8", "int8", "int8_row", "int8_convrot_16", "fp8_e4m3", "fp8_e5m2")):
        format = formats.parse(label).for_shape(24, 48)
        weight = torch.randn(24, 48, generator=generator)
        layer = {f"layers.{number}.w.{k}": v.contiguous() for k, v in format.pack(format.encode(weight)).items()}
        record = format.record() | {"orig_shape": [24, 48]}
        text = {f"layers.{number}.w.comfy_quant": formats.marker(record)}
        files += [save(layer | text), save(layer)]
        everything |= layer | text | {f"layers.{number}.w.bias": torch.ones(24).bfloat16()}
        records[f"layers.{number}.w"] = record
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": records})}
    files += [save(everything, header)]
    branch = {"layers.2.w.absorb_up": torch.ones(24, 2).half(), "layers.2.w.absorb_down": torch.ones(2, 48).half(),
              "layers.0.w.pre_quant_scale": torch.rand(48, generator=generator) + 0.5}  # fmt: skip
    said = {"tessera": '{"mode": "absorb"}', "tessera_layers": '{"layers.2.w": [0.1, 0.05]}'}
    files += [save({f"model.diffusion_model.{k}": v for k, v in (everything | branch).items()}, said)]
    quantized = formats.NVFP4().encode(torch.randn(32, 64, generator=generator))
    files += [save({"a.weight": ref.pack_nibbles(quantized.qdata), "a.weight_scale": quantized.block_scale,
                    "a.weight_scale_2": quantized.scale.reshape(1), "a.input_scale": torch.ones(1)})]  # fmt: skip
    return files


def _small_loras() -> list[bytes]:
    g = _generator()

    def of(*shape):
        return torch.randn(shape, generator=g)

    kinds = {
        "lora_unet_a": {"lora_up.weight": of(8, 2), "lora_down.weight": of(2, 6).half(), "alpha": torch.tensor(1.0)},
        "diffusion_model.b": {"lora_B.weight": of(8, 2).bfloat16(), "lora_A.weight": of(2, 6), "dora_scale": of(8, 1)},
        "transformer.c": {"hada_w1_a": of(8, 2), "hada_w1_b": of(2, 6), "hada_w2_a": of(8, 2), "hada_w2_b": of(2, 6)},
        "lycoris_d": {"lokr_w1": of(2, 2), "lokr_w2_a": of(4, 2), "lokr_w2_b": of(2, 3), "alpha": torch.tensor(2.0)},
        "diffusion_model.e": {"oft_blocks": of(2, 4, 4), "alpha": torch.tensor(0.1)},
        "diffusion_model.f": {"diff": of(8, 6), "diff_b": of(8)},
        "diffusion_model.g": {f"{a}.weight": of(2, 6) if "2" in a else of(6, 2) for a in ("a1", "a2", "b1", "b2")},
        "diffusion_model.h": {"lora_up.weight": of(8, 2, 1, 1), "lora_down.weight": of(2, 6, 1, 1)},
    }  # fmt: skip
    all_of_them = {f"{base}.{part}": tensor for base, found in kinds.items() for part, tensor in found.items()}
    alone = [{f"{base}.{part}": tensor for part, tensor in found.items()} for base, found in kinds.items()]
    return [save(all_of_them), *(save(found) for found in alone)]


def _small_calibration() -> bytes:
    said = {"version": 1, "model": "m", "runs": 2, "layers": {"a": "s", "b": "t"}, "notes": ["n"],
            "sites": {"s": {"tokens": 3, "skipped": 0}, "t": {"tokens": 3, "skipped": 1}}}  # fmt: skip
    tensors = {f"{site}.{part}": torch.ones(shape, dtype=calibration_file.PARTS[part])
               for site, second in (("s", (8,)), ("t", (8, 8)))
               for part, shape in {"mean": (8,), "amax": (8,), "second": second, "sample": (3, 8)}.items()}  # fmt: skip
    return save(tensors | {"s.noise.nvfp4": torch.ones(8)}, {calibration_file.METADATA: json.dumps(said)})


# ---- the run


def mutant(found: dict[str, list[bytes]], seed: int, case: int) -> tuple[str, bytes, random.Random]:
    """(reader, bytes, what it was made with) of a case."""
    r = random.Random(f"{seed}:{case}")
    reader = r.choices(list(SHARES), SHARES.values())[0]
    make = mutating.of_text if reader == "recipe" else mutating.of_safetensors
    return reader, make(r.choice(found[reader]), r), r


def run(folder: Path, seed: int, first: int, count: int, seconds: float = 1e9) -> Outcome:
    """Reads that many mutants, or as many as that time allows."""
    outcome, found, end = Outcome({reader: Counter() for reader in CHECKS}), seeds(), time.monotonic() + seconds
    signal.signal(signal.SIGALRM, _hang)
    with tempfile.TemporaryDirectory(dir=folder) as temp:
        for case in range(first, first + count):
            if time.monotonic() > end:
                break
            reader, data, r = mutant(found, seed, case)
            path = Path(temp) / ("f.toml" if reader == "recipe" else "f.safetensors")
            path.write_bytes(data)
            start = time.monotonic()
            finding, said = judge(reader, path, data, r.random() < 0.2)
            outcome.slowest = max(outcome.slowest, time.monotonic() - start)
            outcome.counts[reader][finding] += 1
            if finding not in ("refused", "accepted"):
                outcome.findings.append(f"{finding}: {reader}, case {seed}:{case}: {said}")
                (folder / f"{finding}-{seed}-{case}{path.suffix}").write_bytes(data)
    return outcome


def judge(reader: str, path: Path, data: bytes, deep: bool) -> tuple[str, str]:
    """(finding, what it says) of one file."""
    signal.setitimer(signal.ITIMER_REAL, HANG)
    try:
        CHECKS[reader](path, data, deep)
        return "accepted", ""
    except ValueError as problem:
        said = str(problem)
        named = path.name in said or path.stem in said
        return ("refused", said) if named else ("crash", f"a message that does not name the file: {said}")
    except Wrong as problem:
        return "wrong", str(problem)
    except Hang:
        return "hang", f"over {HANG} seconds"
    except Exception as problem:  # anything else is what must not happen
        return "crash", f"{type(problem).__name__}: {str(problem)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _hang(*_):
    raise Hang


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(run(Path(sys.argv[1]), *map(int, sys.argv[2:5]), *map(float, sys.argv[5:])).as_dict()))
