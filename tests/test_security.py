"""What SECURITY.md says of the code: nothing is evaluated, unpickled, started or fetched, but where it says so."""

import ast
import asyncio
import gc
import inspect
import json
import re
import subprocess
import weakref

import pytest

import comfy_host
from conftest import ROOT
from tessera.checkpoint import Checkpoint
from tessera.job import Job
from tessera.quantization import recipe

SOURCES = [
    path for path in subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split(
        "\n")
    if path and not path.startswith(("tests/", "bench/", "scripts/"))
]  # fmt: skip
SCRIPTS = sorted((ROOT / "web").glob("**/*.js"))
FORBIDDEN_MODULES = {
    "pickle", "marshal", "shelve", "dill", "subprocess", "ctypes", "socket", "ssl", "http", "urllib", "requests",
    "aiohttp", "ftplib", "smtplib", "asyncio", "webbrowser", "importlib", "runpy", "code", "pip",
}  # fmt: skip
ALLOWED_MODULES = {  # why
    "cluster.py": {"socket", "importlib"},  # asks whether the Ray that the user named is there
    "kernels/facts.py": {"importlib"},  # which libraries are installed
    "kernels/ops.py": {"importlib"},  # our own Triton modules, once a GPU needs them
    "boot.py": {"importlib"},  # the pack itself, in a worker process
    "workers.py": {"runpy"},  # boot.py, first thing in each worker process
    "host/routes.py": {"aiohttp", "asyncio"},  # two answers of the host's own server
}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "input", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {"system", "popen", "execv", "execve", "spawnv", "spawnl", "fork", "startfile"}  # of os
MARKUP = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "import(", "fetch(",
          "XMLHttpRequest", "WebSocket", "http:", "https:")  # fmt: skip


def test_there_is_code_to_look_at():
    assert len(SOURCES) > 80 and SCRIPTS


@pytest.mark.parametrize("path", SOURCES)
def test_no_module_evaluates_starts_or_fetches_anything(path):
    tree, found = ast.parse((ROOT / path).read_text(encoding="utf-8")), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            roots = {name.partition(".")[0] for name in names if name != "importlib.metadata"}
            found += sorted(roots & FORBIDDEN_MODULES - ALLOWED_MODULES.get(path, set()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS:
            found.append(f"{node.func.id}()")
        attribute = node.func if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) else None
        if attribute is not None and isinstance(attribute.value, ast.Name) and attribute.value.id == "os":
            found += [f"os.{attribute.attr}()"] if attribute.attr in FORBIDDEN_ATTRIBUTES else []
    assert not found


def test_torch_unpickles_only_messages_of_our_own_processes():
    calls = {}
    for path in SOURCES:
        count = len(re.findall(r"\btorch\.(?:load|package)\b|\bjit\.load\b", (ROOT / path).read_text(encoding="utf-8")))
        if count:
            calls[path] = count
    assert calls == {"workers.py": 1}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_the_frontend_writes_text_and_talks_to_nobody(path):
    text = re.sub(r"/\*.*?\*/|^\s*//.*?$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    assert "registerExtension" in text or "export" in text
    assert [word for word in MARKUP if word in text] == []


@pytest.fixture
def server(models):
    """A server with nothing in it, where the host's own would be; its table of routes."""
    import sys

    from aiohttp import web

    table = web.RouteTableDef()
    module = sys.modules.get("server") or type(sys)("server")
    known = sys.modules.get("server"), getattr(getattr(module, "PromptServer", None), "instance", None)
    if known[0] is None:
        module.PromptServer = type("PromptServer", (), {})
        sys.modules["server"] = module
    module.PromptServer.instance = type("Server", (), {"routes": table, "app": web.Application()})()
    yield module.PromptServer.instance
    module.PromptServer.instance = known[1]
    if known[0] is None:
        del sys.modules["server"]


@pytest.mark.host
def test_the_pack_adds_two_routes_that_read_nothing(server):
    """PromptServer collects routes in one table; loading the pack adds these, and nothing else anywhere."""
    import sys

    async def load():
        extension = await sys.modules["tessera"].comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    nodes = asyncio.run(load())
    assert len(nodes) >= 13
    assert [(route.method, route.path) for route in server.routes] == [
        ("GET", "/tessera/jobs"), ("GET", "/tessera/doctor")]  # fmt: skip
    assert list(server.app.router.routes()) == []
    source = inspect.getsource(sys.modules["tessera.host.routes"])
    assert not re.search(r"\brequest\s*[.\[]", source)  # no parameter, header or body is looked at


@pytest.mark.host
def test_without_a_server_nothing_is_registered_and_nothing_fails(models):
    import sys

    from tessera.host import routes

    server = sys.modules.pop("server", None)
    try:
        routes.register()
    finally:
        sys.modules.update({"server": server} if server else {})


@pytest.mark.host
def test_what_jobs_say_stays_bounded_and_what_ended_holds_no_model(models, monkeypatch):
    from comfy_api.latest._io import HiddenHolder

    from tessera.host import jobs

    monkeypatch.setattr(jobs, "_jobs", {})
    sources = []
    for number in range(4):
        source = Checkpoint(comfy_host.TINY)
        sources.append(weakref.ref(source))
        with jobs.Live(HiddenHolder.from_dict({})) as live:
            live.run(Job(source, models / "diffusion_models" / f"b{number}.safetensors",
                         recipe.builtin("z_image_nvfp4"), rank=0))  # fmt: skip
        del source
    gc.collect()
    assert [source() for source in sources] == [None] * 4
    whole = json.loads(jobs.answer())["jobs"]
    assert [bool(job["map"] and job["report"]) for job in whole] == [True] * 4
    monkeypatch.setattr(jobs, "ANSWER", len(jobs.answer()) // 2)
    text = jobs.answer()
    short = json.loads(text)["jobs"]
    assert [job["title"] for job in short] == [job["title"] for job in whole]  # all are told, the newest wholly
    assert short[0] == whole[0] and short[-1]["map"] is None and len(text) < 1.2 * jobs.ANSWER


@pytest.mark.host
@pytest.mark.parametrize("name", ["../out", "/tmp/out", "a/../../out", "..\\..\\out/../../../x"])
def test_no_name_leaves_its_folder(models, name):
    from tessera import host

    for folder in ("diffusion_models", "text_encoders", "loras"):
        with pytest.raises(ValueError, match="leaves the folder"):
            host.output_path(folder, name)
    for make in (host.new_recipe_path, host.new_calibration_path, host.calibration_path):
        with pytest.raises(ValueError, match="leaves the folder"):
            make(name)
