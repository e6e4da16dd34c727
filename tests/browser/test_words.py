"""Swapping loaders, languages, settings, help and errors as a user meets them in ComfyUI's page."""

import json

import pytest
from playwright.sync_api import expect

from conftest import ROOT
from frontend_workflow import official

from . import PROMPT, Builder, Failed

pytestmark = pytest.mark.host

NODES = sorted(path.stem for path in (ROOT / "web" / "docs").glob("*.md"))
COMMAND = "window.app.extensionManager.command.execute('Tessera.UseLoaders')"
COVERED = """window.probe.nodes().flatMap((one, _, all) => {
  const over = (other) => other.pos[0] < one.pos[0] + one.size[0] && other.pos[0] + other.size[0] > one.pos[0]
    && other.pos[1] - 30 < one.pos[1] + one.size[1] && other.pos[1] + other.size[1] > one.pos[1] - 30
  const beside = all.filter((other) => other !== one && other.graph === one.graph)
  return beside.filter(over).map((other) => [one.type, other.type])
})"""


def mixed(page):
    """Loaders of all kinds with links in and out, one of them bypassed, and one that Tessera has no node for."""
    graph = Builder(page.host)
    unet = graph.add("UNETLoader", ["tiny.safetensors", "default"])
    clip = graph.add("CLIPLoader", ["qwen_3_4b.safetensors", "lumina2", "default"])
    both = graph.add("LoraLoader", ["b.safetensors", 0.7, -0.2], model=(unet, 0), clip=(clip, 0))
    number = graph.add("PrimitiveFloat", [0.25])
    one = graph.add("LoraLoaderModelOnly", ["a.safetensors", 1], model=(both, 0), strength_model=(number, 0))
    graph.add("CheckpointLoaderSimple", ["x.safetensors"])
    graph.add("CLIPTextEncode", ["a star"], clip=(both, 1))
    graph.add("ModelSave", ["saved"], model=(one, 0))
    workflow = graph.workflow()
    workflow["nodes"][unet - 1] |= {"title": "Mine", "color": "#322", "bgcolor": "#533"}
    workflow["nodes"][both - 1]["mode"] = 4
    workflow["groups"] = [{"id": 1, "title": "Loaders", "bounding": [-10, -80, 900, 400], "color": "#3f789e"}]
    return workflow


def kept(nodes):
    keys = ("id", "pos", "title", "color", "bgcolor", "mode", "flags")
    return [{key: node.get(key) for key in keys} for node in nodes]


@pytest.mark.parametrize("name", ["mixed", "image_z_image_turbo"])
def test_swapped_loaders_run_what_the_loaders_did_and_one_undo_takes_it_back(page, name):
    page.load(mixed(page) if name == "mixed" else official(name))
    before, saved = page.prompt(), page.saved()
    page.at.evaluate(COMMAND)
    page.probe("drawn")
    after, swapped = page.prompt(), page.saved()
    assert before.keys() == after.keys()
    counterparts = {"UNETLoader": "TesseraDiffusionModelLoader", "CLIPLoader": "TesseraCLIPLoader",
                    "LoraLoader": "TesseraLoRA", "LoraLoaderModelOnly": "TesseraLoRA"}  # fmt: skip
    for id, node in before.items():
        assert after[id]["class_type"] == counterparts.get(node["class_type"], node["class_type"])
        assert {key: after[id]["inputs"].get(key) for key in node["inputs"]} == node["inputs"]
    assert kept(saved["nodes"]) == kept(swapped["nodes"]) and saved["groups"] == swapped["groups"]
    if name != "mixed":
        assert page.at.evaluate(COVERED) == []  # loaders with a map take little more room
    if name == "mixed":
        toast = page.toast("Left as it is")
        expect(toast).to_contain_text("Load Checkpoint (Tessera has no node in its place)")
    title = page.probe("point", swapped["nodes"][0]["id"], 40, -12)
    page.at.mouse.click(*title)  # the keyboard is the canvas's, and a click is no step of undo
    page.at.keyboard.press("Control+z")
    page.at.wait_for_function(f"async (old) => (await {PROMPT}) === old", arg=text(before))


def text(prompt):
    """As JSON.stringify writes it."""
    return json.dumps(prompt, separators=(",", ":"), ensure_ascii=False)


def test_a_node_says_what_went_wrong_until_the_next_run(page):
    graph = Builder(page.host)
    unet = graph.add("UNETLoader", ["tiny.safetensors", "default"])
    correction = graph.add("TesseraCorrectionLoRA", ["(beside the checkpoint)", 1], model=(unet, 0))
    graph.add("ModelSave", ["saved"], model=(correction, 0))
    page.load(graph.workflow())
    with pytest.raises(Failed, match="TesseraCorrectionLoRA"):
        page.run()
    said = page.at.locator(".tessera-error")
    expect(said).to_contain_text("choose one in lora_name")
    page.at.keyboard.press("Escape")
    page.at.evaluate("window.probe.node('TesseraCorrectionLoRA').mode = 4")
    page.run()
    expect(said).to_be_hidden()


def test_new_nodes_take_the_users_defaults_and_loaded_ones_keep_theirs(page):
    defaults = {"Tessera.Speed": "exact", "Tessera.Cache": True, "Tessera.Rank": 64}
    usual = {"Tessera.Speed": "auto", "Tessera.Cache": False, "Tessera.Rank": 32}
    graph = Builder(page.host)
    graph.add("TesseraDiffusionModelLoader", ["tiny.safetensors", "default"])  # from before there was speed
    for name, value in defaults.items():
        page.setting(name, value)
    try:
        page.load(graph.workflow())
        found = [page.value("TesseraDiffusionModelLoader", widget) for widget in ("speed", "cache")]
        page.at.evaluate("for (const kind of ['TesseraCLIPLoader', 'TesseraQuantize', 'TesseraExtractLoRA'])"
                         " window.app.graph.add(LiteGraph.createNode(kind))")  # fmt: skip
        made = [page.value("TesseraCLIPLoader", widget) for widget in ("speed", "cache")]
        ranks = [page.value(kind, "rank") for kind in ("TesseraQuantize", "TesseraExtractLoRA")]
    finally:
        for name, value in usual.items():
            page.setting(name, value)
    assert (found, made, ranks) == (["auto", False], ["exact", True], [64, 32])


def test_chinese_names_nodes_inputs_settings_and_what_the_page_says(studio):
    words = json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text("utf-8"))
    with studio.page("litegraph", settings={"Comfy.Locale": "zh"}) as page:
        titles = page.at.evaluate("names => names.map((name) => LiteGraph.registered_node_types[name].title)", NODES)
        assert titles == [words[name]["display_name"] for name in NODES]
        page.at.evaluate("window.app.graph.clear(); void window.app.graph.add(LiteGraph.createNode('TesseraLoRA'))")
        labels = page.at.evaluate("window.probe.node('TesseraLoRA').widgets.map(({ name, label }) => [name, label])")
        assert all(label == words["TesseraLoRA"]["inputs"][name]["name"] for name, label in labels)
        page.at.evaluate(COMMAND)
        said = json.loads((ROOT / "locales" / "zh" / "main.json").read_text("utf-8"))["tessera"]
        expect(page.toast(said["swap_none"])).to_be_attached()
        page.at.evaluate("void window.app.graph.add(LiteGraph.createNode('TesseraPlan'))")
        expect(page.inside("TesseraPlan").locator("[data-part=message]")).to_have_text(said["map_run_plan"])
        page.at.evaluate("window.app.extensionManager.command.execute('Comfy.ShowSettingsDialog')")
        page.at.get_by_role("dialog").get_by_text("Tessera", exact=True).first.click()
        settings = json.loads((ROOT / "locales" / "zh" / "settings.json").read_text("utf-8"))
        for words in settings.values():
            expect(page.at.get_by_role("dialog").get_by_text(words["name"]).first).to_be_visible()
        expect(page.at.locator(".tessera-cache-folder")).to_contain_text("transcoded")
        page.screenshot("settings zh")
        page.check()
