"""Triton kernels compiled for GPUs that are not there: SASS, registers, spills and memory, without a driver.

A case is a dict: name, kernel, signature {argument: type}, constexprs {argument: value}, num_warps, expect {compute
capability: regex that a SASS mnemonic must match, or None}, max_registers; optional num_stages, options
{compiler option: value}, and max_spills {compute capability: local-memory instructions allowed} with 0 elsewhere. Case lists are `aot_cases()` of CASE_MODULES.

    python tests/aot.py [name part] [compute capability ...]    # a table of what is in the SASS
"""

import concurrent.futures
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("TESSERA_CACHE") or ROOT / ".cache").resolve() / "triton"
CASE_MODULES = ("aot_cases_gemm", "aot_cases_activations")
MATRIX = re.compile(r"^(HMMA|IMMA|QMMA|OMMA|HGMMA|IGMMA|QGMMA|UTC\w*MMA)")
# Bytes one program may have on a GPU of that compute capability (CUDA programming guide, table of limits)
SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99, 121: 99}
TENSOR_MEMORY = 512  # columns


@functools.cache
def cases():
    """Every case by its name."""
    sys.path[:0] = [] if str(ROOT / "tests") in sys.path else [str(ROOT / "tests")]
    importlib.import_module("conftest")  # loads the pack
    found = [case for module in CASE_MODULES if (ROOT / "tests" / f"{module}.py").exists() for case in importlib.import_module(module).aot_cases()]
    names = Counter(case["name"] for case in found)
    assert max(names.values()) == 1, f"case names are not unique: {names.most_common(3)}"
    return {case["name"]: case for case in found}


def source(case):
    """What Triton would compile for contiguous tensors of 16-byte alignment whose widths are multiples of 16."""
    from triton.compiler import ASTSource

    arguments = case["kernel"].arg_names
    signature = {name: case["signature"].get(name, "constexpr") for name in arguments}
    signature |= dict.fromkeys(case["constexprs"], "constexpr")
    unknown = set(case["signature"]) - set(arguments) | {a for a in arguments if a not in {*case["signature"], *case["constexprs"]}}
    assert not unknown, f"{case['name']}: signature and constexprs disagree with the kernel about {sorted(unknown)}"
    aligned = [
        (i,) for i, (name, kind) in enumerate(signature.items()) if kind[0] == "*" or (kind == "i32" and name != "M")
    ]
    return ASTSource(case["kernel"], signature, case["constexprs"], {key: [["tt.divisibility", 16]] for key in aligned})


def compile_case(name, cc):
    """Facts of one case on one GPU: registers, spills (local-memory instructions), shared, tensor_memory, mnemonics."""
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    import triton
    from triton.backends.compiler import GPUTarget

    case = cases()[name]
    options = {"num_warps": case["num_warps"], "num_stages": case.get("num_stages", 3), "enable_fp_fusion": True}
    options |= case.get("options", {})
    compiled = triton.compile(source(case), target=GPUTarget("cuda", cc, 32), options=options)
    facts = disassembled(compiled.asm["cubin"])
    memory = {"shared": compiled.metadata.shared, "tensor_memory": getattr(compiled.metadata, "tmem_size", 0) or 0}
    return facts | memory


def disassembled(cubin):
    """Registers and mnemonics of a cubin, by the wheel's own cuobjdump; remembered, as reading SASS takes its time."""
    kept = CACHE / f"sass-{hashlib.sha256(cubin).hexdigest()[:32]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{kept.stem}-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        text = dump(path, "-sass") + dump(path, "-res-usage")
    finally:
        path.unlink()
    # "  /*0a10*/  @P0 HMMA.16816.F32.BF16 R4, ..." -> HMMA.16816.F32.BF16
    found = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, re.MULTILINE)
    assert found, f"cuobjdump printed no SASS:\n{text[:500]}"
    mnemonics = Counter(found)
    facts = {
        "registers": int(re.search(r"REG:(\d+)", text)[1]),
        "spills": sum(n for m, n in mnemonics.items() if m.split(".")[0] in ("LDL", "STL")),
        "instructions": len(found),
        "mnemonics": dict(mnemonics),
    }
    temporary = kept.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(facts))
    temporary.replace(kept)
    return facts


def dump(path, what):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, what, path], capture_output=True, text=True, check=True).stdout


def problems(case, cc, facts):
    """What the SASS of a case breaks of its promises, as sentences; none if it keeps them."""
    found = []
    wanted, mnemonics = case["expect"][cc], facts["mnemonics"]
    if wanted and not any(re.search(wanted, m) for m in mnemonics):
        found.append(f"no instruction matches {wanted}, but {matrix(facts) or 'no matrix instruction at all'}")
    if facts["registers"] > case["max_registers"]:
        found.append(f"{facts['registers']} registers, allowed are {case['max_registers']}")
    budget = case.get("max_spills", {}).get(cc, 0)
    if facts["spills"] > budget:
        found.append(f"{facts['spills']} spill instructions (LDL/STL), allowed are {budget}")
    if facts["shared"] > SHARED[cc] * 1024:
        found.append(f"{facts['shared']} bytes of shared memory, the GPU has {SHARED[cc] * 1024}")
    if facts["tensor_memory"] > TENSOR_MEMORY:
        found.append(f"{facts['tensor_memory']} columns of tensor memory, the GPU has {TENSOR_MEMORY}")
    return found


def matrix(facts):
    """The matrix instructions in the SASS and how often each stands there."""
    return {m: n for m, n in facts["mnemonics"].items() if MATRIX.match(m)}


def executor(processes=2):
    return concurrent.futures.ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))


def main():
    part, ccs = (sys.argv + [""])[1], {int(a) for a in sys.argv[2:]}
    wanted = [(name, cc) for name, case in cases().items() if part in name for cc in case["expect"] if not ccs or cc in ccs]
    with executor() as pool:
        futures = [(name, cc, pool.submit(compile_case, name, cc)) for name, cc in wanted]
        for name, cc, future in futures:
            try:
                facts = future.result()
            except Exception as error:
                print(f"{name:36} {cc:4} {type(error).__name__}: {str(error)[-300:]}", flush=True)
                continue
            row = f"{name:36} {cc:4} regs {facts['registers']:3} spills {facts['spills']:3} "
            row += f"shared {facts['shared']:6} tmem {facts['tensor_memory']:3} instr {facts['instructions']:5} {matrix(facts)}"
            print(row, *problems(cases()[name], cc, facts), sep="\n    ! ", flush=True)


if __name__ == "__main__":
    main()
