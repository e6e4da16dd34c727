"""The pack is what its metadata says, costs nothing to import, and its modules import only downwards."""

import ast
import importlib
import io
import json
import re
import subprocess
import sys
import tomllib
import zipfile

import pytest

from conftest import ROOT
from tessera.version import VERSION

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = {name: ROOT.joinpath(*name.split(".")[1:]) for name in PROJECT["tool"]["setuptools"]["packages"]}
MODULES = sorted(path for folder in PACKAGES.values() for path in folder.glob("*.py"))
HOST = {"comfy", "comfy_api", "comfy_extras", "comfy_execution", "comfyui_version", "folder_paths", "server", "nodes"}
# The Comfy registry warns about any other value, and then drops the field (comfy-cli's config parser).
SYSTEMS = {"OS Independent", "Microsoft :: Windows", "POSIX :: Linux", "MacOS"}
ACCELERATORS = {
    "GPU :: NVIDIA CUDA",
    "GPU :: AMD ROCm",
    "GPU :: Intel Arc",
    "NPU :: Huawei Ascend",
    "GPU :: Apple Metal",
}
COMFY_FIELDS = {"PublisherId", "DisplayName", "Icon", "Banner", "Models", "includes", "requires-comfyui"}
HOST_VERSION = re.compile(r"(==|>=|<=|!=|~=|>|<|<>|=)?\s*\d+\.\d+\.\d+(-[a-zA-Z0-9]+)?")


def name_of(path):
    return str(path.relative_to(ROOT))


def imports(path):
    """(level, module, line) of every import of a file that runs, wherever it stands."""
    tree = ast.parse(path.read_text())
    typing = [n for n in ast.walk(tree) if isinstance(n, ast.If) and getattr(n.test, "id", "") == "TYPE_CHECKING"]
    idle = {inner for outer in typing for inner in ast.walk(outer)}
    for node in (node for node in ast.walk(tree) if node not in idle):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.level, node.module, node.lineno
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.level, alias.name, node.lineno) for alias in node.names)


# ---- importing


def test_importing_the_pack_imports_neither_torch_nor_the_host():
    program = (
        "import importlib.util, json, sys, time; started = time.perf_counter(); before = set(sys.modules);"
        "spec = importlib.util.spec_from_file_location('any name', sys.argv[1] + '/__init__.py',"
        " submodule_search_locations=[sys.argv[1]]);"
        "sys.modules['any name'] = module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module);"
        "print(json.dumps([sorted(set(sys.modules) - before), module.WEB_DIRECTORY, time.perf_counter() - started]))"
    )
    found = subprocess.run([sys.executable, "-c", program, str(ROOT)], capture_output=True, text=True, check=True)
    loaded, web, _ = json.loads(found.stdout)
    assert loaded == ["any name"] and (ROOT / web).is_dir()


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_inside_the_pack_imports_are_relative(path):
    own = {"tessera", *(folder.name for folder in PACKAGES.values()), *(p.stem for p in ROOT.glob("*.py"))} - {
        "__init__"
    }
    absolute = [(module, line) for level, module, line in imports(path) if not level and module.split(".")[0] in own]
    assert [found for found in absolute if not (found[0] == "nodes" and talks_to_host(path))] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_only_host_and_nodes_import_comfyui(path):
    found = {module.split(".")[0] for level, module, _ in imports(path) if not level} & HOST
    assert not found or talks_to_host(path), found


def talks_to_host(path):
    return path.parent in (ROOT / "host", ROOT / "nodes")


MAY_IMPORT = {
    "kernels": {"kernels"},
    "formats": {"formats", "kernels"},
    "quantization": {"quantization", "formats", "kernels"},
    "recipes": set(),
    "architectures": set(),
}


@pytest.mark.parametrize("path", [p for p in MODULES if p.parent.name in MAY_IMPORT], ids=name_of)
def test_imports_point_downwards(path):
    folder = path.parent.name
    for level, module, _ in imports(path):
        if level:
            assert (folder if level == 1 else module.split(".")[0]) in MAY_IMPORT[folder]


# ---- metadata


def test_version_is_the_same_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    top = re.search(r"^## \[?(\d+\.\d+\.\d+)", changelog, re.MULTILINE)
    assert PROJECT["project"]["version"] == VERSION and top and top[1] == VERSION


def test_every_package_listed_exists_and_every_package_is_listed():
    assert all((folder / "__init__.py").is_file() for folder in PACKAGES.values())
    found = {path.parent for pattern in ("*", "*/*") for path in ROOT.glob(f"{pattern}/__init__.py")} | {ROOT}
    assert set(PACKAGES.values()) == {folder for folder in found if "tests" not in folder.parts}
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {"tessera": "."}


@pytest.mark.parametrize("path", [p for p in MODULES if not talks_to_host(p)], ids=name_of)
def test_every_module_imports_without_comfyui(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    importlib.import_module(".".join(["tessera", *(part for part in parts if part != "__init__")]))


def test_the_command_points_at_a_function():
    module, function = PROJECT["project"]["scripts"]["tessera"].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_registry_metadata_is_valid():
    comfy, project = PROJECT["tool"]["comfy"], PROJECT["project"]
    assert comfy.keys() <= COMFY_FIELDS and comfy["PublisherId"] and comfy["DisplayName"]
    assert HOST_VERSION.fullmatch(comfy["requires-comfyui"])
    assert re.fullmatch(r"[a-zA-Z][a-zA-Z0-9._-]{0,99}", project["name"])
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert project["urls"]["Repository"].startswith("https://github.com/")


def test_classifiers_are_those_the_registry_knows():
    known = {f"Operating System :: {name}" for name in SYSTEMS} | {f"Environment :: {name}" for name in ACCELERATORS}
    chosen = [c for c in PROJECT["project"]["classifiers"] if c.startswith(("Operating System", "Environment"))]
    assert chosen and set(chosen) <= known


def test_licence_is_apache_2():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["project"]["license"] == "Apache-2.0" and PROJECT["project"]["license-files"] == ["LICENSE"]
    assert "Apache License" in text and "Version 2.0, January 2004" in text and "END OF TERMS AND CONDITIONS" in text


def test_torch_and_kitchen_are_not_pinned():
    """The host pins them; a bound of ours would change them under it."""
    assert all(re.fullmatch(r"[a-z-]+", name) for name in PROJECT["project"]["dependencies"])


# ---- what the Comfy registry gets: `comfy node validate` and `comfy node pack`, without comfy-cli


def packed():
    """The files of the registry's package: tracked, and not in .comfyignore."""
    listed = [subprocess.run(["git", "ls-files", *more], cwd=ROOT, capture_output=True, text=True, check=True).stdout
              for more in ((), ("-ci", "--exclude-from=.comfyignore"))]  # fmt: skip
    everything, ignored = (set(names.splitlines()) for names in listed)
    return sorted(name for name in everything - ignored if (ROOT / name).is_file())


def test_the_registry_package_has_what_runs_and_nothing_of_the_workshop():
    names = packed()
    tops = {name.split("/")[0] for name in names}
    assert not tops & {"tests", "bench", "scripts", "examples", "demo_output", ".ci", ".github", ".cache"}
    assert not [name for name in names if name.endswith((".pyc", ".log", ".ipynb", ".safetensors"))]
    assert {"__init__.py", "pyproject.toml", "README.md", "LICENSE"} <= set(names)
    assert {"web", "locales", "example_workflows", "nodes", "host", "recipes", "architectures"} <= tops
    missing = [name_of(path) for path in MODULES if name_of(path) not in names and is_tracked(path)]
    assert not missing


def is_tracked(path):
    found = subprocess.run(["git", "ls-files", name_of(path)], cwd=ROOT, capture_output=True, text=True, check=True)
    return bool(found.stdout)


def test_the_registry_package_is_small():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in packed():
            archive.write(ROOT / name, name)
    assert content.tell() < 4_000_000


def test_the_registrys_linter_finds_nothing():
    """S102 exec, S307 eval, E702 two statements in a line: what `comfy node validate` has ruff look for."""
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--no-cache", "--select", "S102,S307,E702"]
    sources = [name for name in packed() if name.endswith(".py")]
    found = subprocess.run([*command, *sources], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


def test_registry_text_fields_are_there_and_the_pack_names_no_web_folder():
    """`web` in [tool.comfy] would register the JavaScript a second time, under the project's name."""
    project, comfy = PROJECT["project"], PROJECT["tool"]["comfy"]
    assert project["name"] == project["name"].lower() and "comfyui" not in project["name"]
    assert 0 < len(project["description"]) <= 500 and "web" not in comfy
    assert project["dependencies"] and project["requires-python"].startswith(">=")
