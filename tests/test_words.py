"""What users read is complete, true to the nodes, and the same in every language."""

import importlib.util
import re

import pytest

from conftest import ROOT

pytestmark = pytest.mark.host

spec = importlib.util.spec_from_file_location("tessera_locales", ROOT / "scripts" / "locales.py")
locales = importlib.util.module_from_spec(spec)
spec.loader.exec_module(locales)
RUN = "run scripts/locales.py, then translate what it names"
DOCS = ROOT / "web" / "docs"
PICTURE = 60_000  # bytes
COMPILED = re.compile(r"[{}@|%]")  # signs that the frontend's message compiler takes for its own
# What a translation may not change: places for values, file names and folders, formats, addresses
KEPT = re.compile(
    r"\{\d\}|<\w+>\w*|[\w*]+(?:/[\w*]+)+(?:\.\w+)?|\b(?:nvfp4|mxfp8|int8\w*|BF16|LATENT|CONDITIONING)\b", re.ASCII
)


@pytest.fixture(scope="module")
def schemas(models):
    return {schema.node_id: schema for schema in locales.schemas()}


@pytest.fixture(scope="module")
def english(schemas):
    return locales.english(list(schemas.values()))


# Languages


def test_english_is_what_the_nodes_and_the_frontend_say(english):
    assert locales.read("en") == english, RUN


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_every_text_is_translated_and_nothing_else_is(english, language):
    found = locales.read(language)
    missing = [f"{file}: {key}: {text}" for file, words in english.items() for key, text in words.items()
               if not found[file].get(key)]  # fmt: skip
    extra = [f"{file}: {key}" for file, words in found.items() for key in words.keys() - english[file].keys()]
    assert (missing, extra) == ([], []), RUN


@pytest.mark.parametrize("language", locales.LANGUAGES)
def test_translations_keep_placeholders_names_of_files_and_formats(language):
    english, found = locales.read("en"), locales.read(language)
    for file, words in english.items():
        for key, text in words.items():
            assert sorted(KEPT.findall(found[file][key])) == sorted(KEPT.findall(text)), (file, key)


@pytest.mark.parametrize("language", ["en", *locales.LANGUAGES])
def test_no_text_has_a_sign_that_the_frontend_would_compile(language):
    for file, words in locales.read(language).items():
        for key, text in words.items():
            spoken = COMPILED.findall(text) if not key.startswith("tessera/") else []  # those are ours to fill in
            assert not [sign for sign in spoken if sign != "%"] and "%{" not in text, (file, key)


def test_the_host_serves_every_language(models, tmp_path, monkeypatch):
    import folder_paths
    from app.custom_node_manager import CustomNodeManager

    (tmp_path / "any name").symlink_to(ROOT, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda name: [str(tmp_path)])
    served = CustomNodeManager().build_translations()
    assert set(served) == {"en", *locales.LANGUAGES}
    for language, words in served.items():
        own = locales.read(language)
        assert words["nodeDefs"]["TesseraLoRA"]["display_name"] == own["nodeDefs"]["TesseraLoRA/display_name"]
        assert words["settings"]["Tessera_MergeGuard"]["name"] == own["settings"]["Tessera_MergeGuard/name"]
        assert words["commands"]["Tessera_UseLoaders"]["label"] == own["commands"]["Tessera_UseLoaders/label"]


# Nodes


def test_every_node_says_what_it_is_and_can_be_found(schemas):
    assert len(schemas) >= 18
    for name, schema in schemas.items():
        assert name.startswith("Tessera") and schema.display_name.endswith("(Tessera)"), name
        assert schema.description.endswith(".") and len(schema.search_aliases) >= 3, name


def test_every_input_and_output_has_a_tooltip(schemas):
    missing = [f"{name}: {item.id}" for name, schema in schemas.items() for item in (*schema.inputs, *schema.outputs)
               if not (item.tooltip or "").endswith((".", ")"))]  # fmt: skip
    assert not missing


# Help pages


def page(name):
    path = DOCS / f"{name}.md"
    return path.read_text(encoding="utf-8") if path.exists() else ""


def listed(text, section):
    """The names in backticks in the first column of a section's table."""
    found = re.search(rf"^## {section}\n(.*?)(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    lines = found[1].splitlines() if found else []
    cells = [line.split("|")[1] for line in lines if line.startswith("|")]
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


def test_every_node_has_a_help_page_and_every_page_a_node(schemas):
    assert {path.stem for path in DOCS.glob("*.md")} == set(schemas)


def test_help_pages_list_exactly_the_inputs_and_outputs(schemas):
    wrong = []
    for name, schema in schemas.items():
        inputs = {item.id for item in schema.inputs}
        outputs = {item.display_name or item.id for item in schema.outputs}
        outputs = {re.sub(r"^_\d+_(\w+)_$", r"\1", output) for output in outputs}
        text = page(name)
        for section, wanted in (("Inputs", inputs), ("Outputs", outputs)):
            difference = wanted ^ set(listed(text, section))
            wrong += [f"{name}: {section}: {sorted(difference)}"] if difference else []
    assert not wrong


def test_every_help_page_has_its_picture_and_all_are_small(schemas):
    pictures = {path.name: path.stat().st_size for path in (DOCS / "images").glob("*")}
    named = {
        found for path in DOCS.glob("*.md") for found in re.findall(r"!\[[^\]]+\]\(images/([^)]+)\)", page(path.stem))
    }
    assert {f"{name}.jpg" for name in schemas} <= named == set(pictures)
    assert max(pictures.values()) <= PICTURE
    assert all(path.suffix in (".jpg", ".md", "") for path in DOCS.rglob("*"))
