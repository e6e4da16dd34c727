"""Writes locales/en from the nodes' schemas and from web/*.js, and says what the other languages lack.

    COMFYUI_PATH=... python scripts/locales.py

Keys that nothing needs any more are removed from every language; a text that is new somewhere, and translated
elsewhere, takes that translation. Exits with 1 while a translation is missing. Files as ComfyUI reads them:
locales/<language>/{nodeDefs,settings,commands,main}.json (app/custom_node_manager.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCALES = ROOT / "locales"
LANGUAGES = ("zh", "ja")
FILES = ("nodeDefs", "settings", "commands", "main")
STRINGS = r'((?:"(?:[^"\\]|\\.)*"[\s+]*)+)'
Words = dict[str, str]  # path of keys, joined by "/", -> text


def schemas() -> list:
    """The schemas of all nodes, made by the real ComfyUI in this process."""
    import tempfile

    sys.path.insert(0, str(ROOT / "tests"))

    import comfy_host
    import conftest

    pack = conftest.load_pack()
    if "nodes" not in sys.modules:
        comfy_host.start(Path(tempfile.mkdtemp()))
    nodes = asyncio.run(asyncio.run(pack.comfy_entrypoint()).get_node_list())
    return [node.GET_SCHEMA() for node in nodes]


def english(schemas: list) -> dict[str, Words]:
    """What locales/en has to say: file -> words."""
    scripts = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "web").glob("*.js"))]
    settings = {key: value for script in scripts for key, value in _settings(script).items()}
    commands = {f"{key.replace('.', '_')}/label": label for script in scripts for key, label in _commands(script)}
    said = {f"tessera/{key}": _text(text) for script in scripts for key, text in _words(script)}
    categories = {f"settingsCategories/{name}": name for script in scripts for name in _categories(script)}
    labels = {f"{place}/{text}": text for place in ("menuLabels", "contextMenu") for text in commands.values()}
    nodes = {key: text for schema in schemas for key, text in _node(schema).items()}
    return {"nodeDefs": nodes, "settings": settings, "commands": commands, "main": categories | labels | said}


def _node(schema) -> Words:
    """Names, tooltips and description of one node."""
    found = {"display_name": schema.display_name, "description": schema.description}
    for item in schema.inputs:
        found[f"inputs/{item.id}/name"] = item.display_name or item.id
        found[f"inputs/{item.id}/tooltip"] = item.tooltip
    for index, item in enumerate(schema.outputs):
        name = item.display_name or item.id
        if name and name not in (item.get_io_type(), f"_{index}_{item.get_io_type()}_"):  # those are ComfyUI's words
            found[f"outputs/{index}/name"] = name
        found[f"outputs/{index}/tooltip"] = item.tooltip
    return {f"{schema.node_id}/{key}": text for key, text in found.items() if text}


def _settings(script: str) -> Words:
    found = {}
    for constant, value in re.findall(r'^const ([A-Z_]+) = "(Tessera\.\w+)"$', script, re.MULTILINE):
        script = script.replace(f"id: {constant},", f'id: "{value}",')
    for key, rest in re.findall(r'id: "(Tessera\.\w+)",(.*?)(?=\bid: "|\Z)', script, re.DOTALL):
        if not re.match(r"\s*category:", rest):
            continue  # a command
        for part in ("name", "tooltip"):
            said = re.search(rf"\b{part}:\s*{STRINGS}", rest)
            found |= {f"{key.replace('.', '_')}/{part}": _text(said[1])} if said else {}
        listed = re.search(r"\boptions: \[(.*?)\]", rest, re.DOTALL)
        for option in re.findall(r'text: "(.*?)"', listed[1]) if listed else []:
            found[f"{key.replace('.', '_')}/options/{option}"] = option
    return found


def _commands(script: str) -> list[tuple[str, str]]:
    return re.findall(r'id: "(Tessera\.\w+)",\s*label: "(.*?)"', script)


def _words(script: str) -> list[tuple[str, str]]:
    return re.findall(rf'\bword\("(\w+)",\s*{STRINGS}', script)


def _categories(script: str) -> set[str]:
    """The first two levels, which the settings dialog shows."""
    return {
        name for listed in re.findall(r"category: \[(.*?)\]", script) for name in re.findall(r'"(.*?)"', listed)[:2]
    }


def _text(strings: str) -> str:
    """The text of one or more JavaScript strings with + between."""
    return "".join(json.loads(part) for part in re.findall(r'"(?:[^"\\]|\\.)*"', strings))


def read(language: str) -> dict[str, Words]:
    """A language's files, as words."""
    paths = {file: LOCALES / language / f"{file}.json" for file in FILES}
    return {file: _flat(json.loads(p.read_text(encoding="utf-8"))) if p.exists() else {} for file, p in paths.items()}


def write(language: str, files: dict[str, Words]) -> None:
    (LOCALES / language).mkdir(parents=True, exist_ok=True)
    for file, words in files.items():
        tree: dict = {}
        for path, text in words.items():
            *folders, last = path.split("/")
            at = tree
            for folder in folders:
                at = at.setdefault(folder, {})
            at[last] = text
        target = LOCALES / language / f"{file}.json"
        target.write_text(json.dumps(tree, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _flat(tree: dict, path: str = "") -> Words:
    found: Words = {}
    for key, value in tree.items():
        here = f"{path}/{key}" if path else key
        found |= _flat(value, here) if isinstance(value, dict) else {here: value}
    return found


def carried(new: dict[str, Words], old: dict[str, Words], translated: dict[str, Words]) -> dict[str, Words]:
    """A language's words for new English ones: kept where the English is as before, else the same text's elsewhere."""
    pairs = [(old[file].get(key), text) for file in FILES for key, text in translated[file].items()]
    known = {source: text for source, text in pairs if source}
    made: dict[str, Words] = {}
    for file, words in new.items():
        kept = {key: translated[file].get(key) if old[file].get(key) == text else None for key, text in words.items()}
        filled = {key: kept[key] or known.get(text) for key, text in words.items()}
        made[file] = {key: text for key, text in filled.items() if text}
    return made


def main() -> int:
    if not os.environ.get("COMFYUI_PATH"):
        sys.exit("COMFYUI_PATH is not set; name a ComfyUI, e.g. the one of scripts/setup_host.py")
    new, old = english(schemas()), read("en")
    write("en", new)
    missing = 0
    for language in LANGUAGES:
        files = carried(new, old, read(language))
        write(language, files)
        for file, words in new.items():
            for key in words.keys() - files[file].keys():
                print(f"{language}/{file}: {key}: {words[key]}")
                missing += 1
    print(f"{sum(map(len, new.values()))} texts, {missing} translations missing")
    return missing > 0


if __name__ == "__main__":
    sys.exit(main())
