"""The long form of what tests/test_writes.py and tests/test_numbers.py promise: trust_writes.py [POINTS] [SEED]

Kill points and power cuts; a disk that is really full or read-only (a small tmpfs in a mount namespace of its own);
errors that strace has the kernel answer; the page cache as fincore sees it; comfy-kitchen's newest version and
torchao, fetched into .cache/trust. Prints a line for each, exits 1 on any finding; what this machine cannot do is said.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import newest

TESTS = Path(__file__).resolve().parent
ALONE = os.environ | {"OMP_NUM_THREADS": "1"}
SYSCALLS = {"write": 14, "fsync": 12, "ftruncate": 6, "fallocate": 2, "rename": 3, "link": 1}  # calls of one job
ERRORS = ("EDQUOT", "EIO", "ENOSPC", "EROFS")
KITCHEN_TESTS = ("test_formats.py", "test_values.py", "test_golden.py")


def start(*arguments):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ALONE)


def power_cuts(points, seed):
    share = points // 2
    with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
        running = [start(TESTS / "powercut.py", folder, count, seed + n)
                   for n, (folder, count) in enumerate(((one, share), (two, points - share)))]  # fmt: skip
        done = []
        for process in running:
            said, problem = process.communicate()
            if process.returncode:
                return f"kill points: {problem[-2000:]}", False
            done.append(json.loads(said))
    found = {key: sum(part["found"].get(key, 0) for part in done) for key in ("old", "between", "new")}
    problems = [problem for part in done for problem in part["problems"]]
    text = (f"{points - len(problems)}/{points} kill points safe ({sum(part['power'] for part in done)} with the power "
            f"gone as well): {found['old']} left the old pair, {found['new']} the new, {found['between']} a LoRA ahead "
            f"of its model, which was noticed and finished; {max(part['seconds'] for part in done):.0f} s")  # fmt: skip
    return "\n".join([text, *problems]), not problems


def real_disks():
    """In a mount namespace of this process's children."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        return "full and read-only disks: not run, this machine grants no mount namespace", True
    found = subprocess.run(["unshare", "-rm", sys.executable, __file__, "disks"], capture_output=True, text=True,
                           env=ALONE)  # fmt: skip
    return (found.stdout + found.stderr[-2000:]).strip(), found.returncode == 0


def disks():
    """A job on a tmpfs of each size from too small for anything to large enough, and on one that turns read-only."""
    import powercut

    folder = Path(tempfile.mkdtemp())
    powercut.source(folder)
    full, done, problems = 0, 0, []
    for size in range(8, 420, 12):
        mount(folder / "out", f"size={size}k")
        try:
            powercut.run(folder)
            done += 1
            expected = [powercut.MODEL, powercut.LORA]
        except ValueError as problem:
            full += 1
            expected = []
            if "free some space" not in str(problem):
                problems.append(f"{size} kB: {problem}")
        if sorted(os.listdir(folder / "out")) != expected:
            problems.append(f"{size} kB: {os.listdir(folder / 'out')}")
        subprocess.run(["umount", folder / "out"], check=True)
    mount(folder / "out", "size=2m")
    powercut.run(folder, seed=1)
    before = powercut.files(folder)
    subprocess.run(["mount", "-o", "remount,ro", folder / "out"], check=True)
    try:
        powercut.run(folder, overwrite=True)
        problems.append("a read-only disk was written")
    except ValueError as problem:
        if "cannot be written to (Read-only file system)" not in str(problem):
            problems.append(str(problem))
    if powercut.files(folder) != before:
        problems.append("a read-only disk changed")
    print(f"full disks (tmpfs): {full} sizes too small, each refused with nothing left, {done} large enough; "
          "a read-only one refused")  # fmt: skip
    print("\n".join(problems))
    return not problems and full > 3 and done > 3


def mount(folder, options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)


def kernel_errors():
    """Every call of the writers answered once with an error, by the kernel."""
    import powercut

    if not shutil.which("strace"):
        return "errors of the kernel: not run, strace is missing", True
    powercut.torch.set_num_threads(1)
    counts, problems = {"refused": 0, "saved": 0}, []
    with tempfile.TemporaryDirectory() as temporary:
        made, _ = powercut.templates(Path(temporary))
        before, new = powercut.files(made["old"]), powercut.files(made["new"])
        points = [(call, n) for call, most in SYSCALLS.items() for n in range(1, most + 1)]
        for number, (call, n) in enumerate(points):
            folder = Path(temporary) / "job"
            shutil.copytree(made["old"], folder)
            code = answered(folder, call, ERRORS[number % len(ERRORS)], n)
            found, left = powercut.files(folder), sorted(os.listdir(folder / "out"))
            if found not in (before, new) or left != [powercut.MODEL, powercut.LORA] or code not in (0, 1):
                problems.append(f"{call} {n} {ERRORS[number % len(ERRORS)]}: {code}, {left}")
            counts["saved" if found == new else "refused"] += 1
            shutil.rmtree(folder)
    text = f"errors of the kernel (strace): {len(points)} calls failed, {counts['refused']} left the old pair, "
    return "\n".join([f"{text}{counts['saved']} the new one whole", *problems]), not problems


def answered(folder, call, error, number):
    """The exit status of a job whose call of that number fails."""
    import powercut

    def work():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.kill(os.getpid(), signal.SIGSTOP)
        powercut.run(folder, overwrite=True)

    if not (process := os.fork()):
        try:
            work()
        except (ValueError, RuntimeError):
            os._exit(1)
        except BaseException:
            os._exit(2)
        os._exit(0)
    os.waitpid(process, os.WUNTRACED)
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", os.devnull, "-p", str(process), "-e", f"trace={call}",
                               "-e", f"inject={call}:error={error}:when={number}"])  # fmt: skip
    while "TracerPid:\t0" in Path(f"/proc/{process}/status").read_text() and tracer.poll() is None:
        time.sleep(0.002)
    os.kill(process, signal.SIGCONT)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    tracer.wait()
    return code


def page_cache():
    """What a file has in memory when it is about to be read back."""
    import torch

    from tessera.formats import TensorSpec
    from tessera.writer import Writer

    if not shutil.which("fincore"):
        return "page cache: not run, fincore is missing", True
    newest.CACHE.mkdir(parents=True, exist_ok=True)  # not on a tmpfs: there memory is the disk
    path = newest.CACHE / "pages.safetensors"
    path.unlink(missing_ok=True)
    with Writer(path, {"x": TensorSpec(torch.uint8, (1 << 24,))}, 200) as writer:
        writer.write("x", torch.zeros(1 << 24, dtype=torch.uint8))
        pages = [resident(writer.temporary)]
        pages.append(resident(writer.finish({})))
    text = f"page cache: {pages[0]} bytes of 16 MB in memory before the file is finished, {pages[1]} when it is read"
    return text, pages[1] < pages[0] / 10


def resident(path):
    found = subprocess.run(["fincore", "-n", "-b", "-o", "RES", path], capture_output=True, text=True, check=True)
    return int(found.stdout)


def newest_kitchen():
    folder, version = newest.fetch(newest.KITCHEN)
    if folder is None:
        return f"newest comfy-kitchen: not run, {version}", True
    environment = ALONE | {"PYTHONPATH": str(folder)}
    check = "import comfy_kitchen; print(comfy_kitchen.__file__)"
    used = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, env=environment).stdout
    found = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
                            *(str(TESTS / name) for name in KITCHEN_TESTS)],
                           capture_output=True, text=True, env=environment, cwd=TESTS.parent)  # fmt: skip
    well = found.returncode == 0 and str(folder) in used
    said = found.stdout.strip().splitlines()
    return "\n".join([f"comfy-kitchen {version}: {said[-1]}", *([] if well else said[-30:])]), well


def newest_torchao():
    folder, version = newest.fetch(newest.TORCHAO)
    if folder is None:
        return f"torchao: not run, {version}", True
    found = subprocess.run([sys.executable, __file__, "torchao"], capture_output=True, text=True,
                           env=ALONE | {"PYTHONPATH": str(folder)})  # fmt: skip
    well = found.returncode == 0
    return f"torchao {version}: {found.stdout.strip() if well else found.stderr[-2000:]}", well


def torchao():
    """Its MXFP8 (rounding mode RCEIL) and NVFP4 encoders give our codes and scales, to the bit."""
    import torch
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    from tessera.formats import MXFP8, NVFP4

    count = 0
    for seed, (rows, columns) in enumerate(((64, 128), (96, 256), (1, 32), (300, 96))):
        weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10.0 ** (seed - 3)
        weight[0, :32] = 0 if rows > 1 else weight[0, :32]
        scales, codes = to_mx(weight, torch.float8_e4m3fn, 32, ScaleCalculationMode.RCEIL)
        ours = MXFP8().encode(weight)
        zero = ours.block_scale == 0  # an all-zero block: the host's reader and torchao write other exponents
        assert torch.equal(scales.view(torch.uint8).reshape(rows, -1)[~zero], ours.block_scale[~zero])
        assert torch.equal(codes.reshape(rows, columns).float(), ours.qdata.float())
        ours = NVFP4().encode(weight)
        scales, packed = nvfp4_quantize(weight, 16, ours.scale)
        packed = packed.view(torch.uint8).reshape(rows, -1)
        codes = torch.stack((packed & 0x0F, packed >> 4), -1).flatten(-2)  # its low nibble is the even column
        used = (ours.block_scale.float() != 0).repeat_interleave(16, 1)
        assert torch.equal(scales.reshape(rows, -1).float()[used[:, ::16]], ours.block_scale.float()[used[:, ::16]])
        assert torch.equal(codes[used], ours.qdata[used])
        count += 2 * weight.numel()
    print(f"{count} codes of MXFP8 and NVFP4 with their scales are equal")
    return True


def main():
    from conftest import load_pack

    load_pack()
    alone = {"disks": disks, "torchao": torchao}
    if sys.argv[1:2] and sys.argv[1] in alone:
        return 0 if alone[sys.argv[1]]() else 1
    points, seed = (int(text) for text in (sys.argv[1:] + ["200", "1"][len(sys.argv) - 1 :]))
    sound = True
    parts = (kernel_errors, lambda: power_cuts(points, seed), real_disks, page_cache, newest_kitchen, newest_torchao)
    for part in parts:  # the first forks: torch has no threads yet
        text, well = part()
        print(text.strip(), flush=True)
        sound &= well
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
