"""What SECURITY.md says of the code: nothing is evaluated, unpickled, started or fetched, but where it says so."""

import ast
import asyncio
import re
import subprocess

import pytest

from conftest import ROOT

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


@pytest.mark.host
def test_the_pack_adds_no_http_route(models):
    """PromptServer collects routes in one table; importing every node must leave it as it was."""
    import server
    from aiohttp import web

    class Routes(web.RouteTableDef):
        pass

    before = getattr(server.PromptServer, "instance", None)
    table = Routes()
    server.PromptServer.instance = type("Server", (), {"routes": table, "app": web.Application()})()
    try:
        import sys

        extension = asyncio.run(sys.modules["tessera"].comfy_entrypoint())
        nodes = asyncio.run(extension.get_node_list())
        added = list(table), list(server.PromptServer.instance.app.router.routes())
    finally:
        if before is None:
            del server.PromptServer.instance
        else:
            server.PromptServer.instance = before
    assert len(nodes) >= 13 and added == ([], [])


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
