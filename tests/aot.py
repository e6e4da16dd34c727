"""Triton kernels compiled for GPUs that are not there: SASS, registers, spills and memory, without a driver.

A case is a dict: name, kernel, signature {argument: type}, constexprs {argument: value}, num_warps, expect {compute
capability: regex that a SASS mnemonic must match, or None}, max_registers; optional num_stages, options {compiler
option: value}, and max_spills {compute capability: local-memory instructions allowed} with 0 elsewhere. Case lists are
`aot_cases()` of CASE_MODULES.

    python tests/aot.py [name part] [compute capability ...]    # a table of what is in the SASS
"""

import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("TESSERA_CACHE") or ROOT / ".cache").resolve() / "triton"
CASE_MODULES = ("aot_cases_gemm", "aot_cases_activations")
MATRIX = re.compile(r"^(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)")
LOCAL_MEMORY = ("LDL", "STL")
# KiB of shared memory that one program may have (CUDA programming guide, technical specifications per capability)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
TENSOR_MEMORY = 512  # columns
# "  /*0a10*/  @P0 HMMA.16816.F32.BF16 R4, ..." -> HMMA.16816.F32.BF16
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def foreign_triton():
    """Why this Triton's output is not compared; empty where it is the one that scripts/setup_host.py installs."""
    import torch
    import triton

    pinned = re.search(r'^TRITON = "triton==([\d.]+)"', (ROOT / "scripts" / "setup_host.py").read_text(), re.M)[1]
    if triton.__version__ == pinned or not torch.cuda.is_available():
        return ""
    return f"expects what Triton {pinned} compiles, torch's own beside this GPU is {triton.__version__}"


@functools.cache
def cases():
    """Every case by its name."""
    importlib.import_module("conftest")  # loads the pack
    found = [case for module in CASE_MODULES for case in importlib.import_module(module).aot_cases()]
    names = Counter(case["name"] for case in found)
    twice = [name for name, n in names.items() if n > 1]
    assert not twice, f"two cases are called {', '.join(twice)}"
    return {case["name"]: case for case in found}


def selection():
    """(name, capability) of what the tests compile: a case of every kernel on every GPU it claims, in turns, and every
    case somewhere. All of them take ten minutes: TESSERA_AOT=all, or this file as a program.
    """
    every = [(name, cc) for name, case in cases().items() for cc in case["expect"]]
    if os.environ.get("TESSERA_AOT") == "all":
        return every
    claims = defaultdict(list)
    for name, cc in every:
        claims[cases()[name]["kernel"].fn.__qualname__, cc].append(name)
    kept = {(names[turn % len(names)], cc) for turn, ((_, cc), names) in enumerate(sorted(claims.items()))}
    forgotten = [name for name in cases() if name not in {name for name, _ in kept}]
    for turn, name in enumerate(forgotten):
        capabilities = sorted(cases()[name]["expect"])
        kept.add((name, capabilities[turn % len(capabilities)]))
    return [key for key in every if key in kept]


def source(case):
    """What Triton compiles at run time for 16-byte aligned tensors whose sizes, M aside, are multiples of 16."""
    from triton.compiler import ASTSource

    arguments = case["kernel"].arg_names
    disputed = set(arguments) ^ {*case["signature"], *case["constexprs"]}
    assert not disputed, f"{case['name']} and its kernel disagree about {', '.join(sorted(disputed))}"
    signature = {name: case["signature"].get(name, "constexpr") for name in arguments}
    round_sizes = {name for name, kind in signature.items() if kind == "i32" and name != "M"}
    aligned = [(i,) for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or name in round_sizes]
    return ASTSource(case["kernel"], signature, case["constexprs"], {key: [["tt.divisibility", 16]] for key in aligned})


def compile_case(name, cc):
    """Facts of one case on one GPU: registers, spills, instructions, mnemonics, shared, tensor_memory."""
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    import triton
    from triton.backends.compiler import GPUTarget

    case = cases()[name]
    options = {"num_warps": case["num_warps"], "num_stages": case.get("num_stages", 3), "enable_fp_fusion": True}
    options |= case.get("options", {})
    compiled = triton.compile(source(case), target=GPUTarget("cuda", cc, 32), options=options)
    metadata = compiled.metadata
    return disassembled(compiled.asm["cubin"]) | {"shared": metadata.shared, "tensor_memory": metadata.tmem_size or 0}


def disassembled(cubin):
    """Registers and mnemonics of a cubin, read by the wheel's own cuobjdump; remembered beside Triton's cache."""
    kept = CACHE / f"sass-{hashlib.sha256(cubin).hexdigest()[:32]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    CACHE.mkdir(parents=True, exist_ok=True)
    path = kept.with_suffix(f".{os.getpid()}.cubin")
    path.write_bytes(cubin)
    try:
        text = _cuobjdump("-sass", path) + _cuobjdump("-res-usage", path)
    finally:
        path.unlink()
    mnemonics = Counter(INSTRUCTION.findall(text))
    assert mnemonics, f"cuobjdump printed no SASS:\n{text[:500]}"
    facts = {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spills": sum(n for mnemonic, n in mnemonics.items() if mnemonic.split(".")[0] in LOCAL_MEMORY),
        "instructions": mnemonics.total(),
        "mnemonics": dict(mnemonics),
    }
    new = kept.with_suffix(f".{os.getpid()}.new")
    new.write_text(json.dumps(facts))
    new.replace(kept)
    return facts


def _cuobjdump(what, path):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


def problems(case, cc, facts):
    """Which promises of a case its SASS breaks, as sentences; none if it keeps them."""
    found, wanted = [], case["expect"][cc]
    if wanted and not any(re.search(wanted, mnemonic) for mnemonic in facts["mnemonics"]):
        found.append(f"no instruction matches {wanted}; it has {matrix(facts) or 'no matrix instruction at all'}")
    if facts["registers"] > case["max_registers"]:
        found.append(f"{facts['registers']} registers, allowed are {case['max_registers']}")
    budget = case.get("max_spills", {}).get(cc, 0)
    if facts["spills"] > budget:
        found.append(f"{facts['spills']} spill instructions (LDL, STL), allowed are {budget}")
    if facts["shared"] > SHARED[cc] * 1024:
        found.append(f"{facts['shared']} bytes of shared memory, the GPU has {SHARED[cc] * 1024}")
    if facts["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"{facts['tensor_memory']} columns of tensor memory, the GPU has {TENSOR_MEMORY}")
    return found


def matrix(facts):
    """The matrix instructions in the SASS, and how often each stands there."""
    return {mnemonic: n for mnemonic, n in facts["mnemonics"].items() if MATRIX.match(mnemonic)}


def executor():
    """Two processes that run `compile_case`."""
    return ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn"))


def main():
    part, *ccs = sys.argv[1:] or [""]
    wanted = [(name, cc) for name, case in cases().items() if part in name for cc in case["expect"]]
    wanted = [(name, cc) for name, cc in wanted if not ccs or str(cc) in ccs]
    with executor() as pool:
        for (name, cc), facts in zip(wanted, pool.map(compile_case, *zip(*wanted, strict=True)), strict=True):
            row = f"{name:36} {cc:4}  registers {facts['registers']:3}  spills {facts['spills']:2}"
            row += f"  shared {facts['shared']:6}  tensor memory {facts['tensor_memory']:3}"
            row += f"  instructions {facts['instructions']:4}  {matrix(facts)}"
            print(row, *problems(cases()[name], cc, facts), sep="\n    ! ", flush=True)


if __name__ == "__main__":
    main()
