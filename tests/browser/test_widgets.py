"""What one sees and moves inside Tessera's nodes in ComfyUI's page, in both renderers."""

import re

import pytest
from playwright.sync_api import expect

from . import Builder, example, for_tiny, picture
from .files import LORAS

pytestmark = pytest.mark.host

CORRECTION, LOADER, PLAN = "TesseraCorrectionLoRA", "TesseraDiffusionModelLoader", "TesseraPlan"
STACK = "TesseraLoRAStack"


def sampled(page):
    """The example with the tiny model: loader, correction, sampler, picture."""
    return for_tiny(example("tessera_z_image_nvfp4"))


# The strength slider


def test_strength_moves_by_pointer_and_key_and_changes_the_picture(page):
    page.load(sampled(page), look=[CORRECTION])
    whole = picture(page.run())
    page.slide(CORRECTION, "strength", -0.1)
    assert page.value(CORRECTION, "strength") == 0
    without = picture(page.run())
    assert (whole != without).any()
    if page.renderer == "nodes2":  # the canvas of LiteGraph has no keyboard
        page.slider(CORRECTION, "strength").press("ArrowRight")
        assert page.value(CORRECTION, "strength") > 0
    page.set(CORRECTION, "strength", 1)
    assert (picture(page.run()) == whole).all()


def test_strength_runs_when_it_is_released(page):
    page.load(sampled(page), look=[CORRECTION])
    page.setting("Tessera.QueueOnRelease", True)
    count = len(page.queued())
    page.slide(CORRECTION, "strength", 0.25)
    page.until(f"window.probe.queued.length === {count + 1}")
    page.wait(page.queued()[-1])
    page.setting("Tessera.QueueOnRelease", False)


# Rows of LoRAs


def stack(page, text):
    graph = Builder(page.host)
    loader = graph.add(LOADER, ["tiny_nvfp4.safetensors"])
    graph.add(STACK, [text], size=(520, 240), model=(loader, 0))
    return graph.workflow()


def test_rows_of_the_stack_are_its_text(page):
    page.load(stack(page, "tiny_nvfp4_lora.safetensors : 0.5"), look=[STACK])
    rows = page.inside(STACK).locator("li")
    expect(rows).to_have_count(1)
    expect(rows.get_by_label("strength of the diffusion model")).to_have_value("0.5")
    rows.get_by_label("strength of the diffusion model").fill("0.75")
    adder = page.inside(STACK).get_by_label("Add a LoRA")
    adder.fill("onerror")
    adder.press("Enter")
    expect(rows).to_have_count(2)
    rows.nth(1).get_by_label("strength of the diffusion model").press("Alt+ArrowUp")
    rows.nth(1).locator("[data-part=on]").uncheck()
    assert page.value(STACK, "stack") == f"{LORAS[0]} : 1\n# tiny_nvfp4_lora.safetensors : 0.75"
    page.load(page.saved(), look=[STACK])
    expect(rows).to_have_count(2)
    expect(rows.nth(0).get_by_label("LoRA file")).to_have_value(LORAS[0])
    expect(rows.nth(1).locator("[data-part=on]")).not_to_be_checked()


def test_names_of_files_are_shown_as_text(page):
    page.load(stack(page, "\n".join(f"{name} : 1" for name in LORAS)), look=[STACK])
    chosen = page.inside(STACK).get_by_label("LoRA file")
    expect(chosen).to_have_count(len(LORAS))
    for index, name in enumerate(LORAS):
        expect(chosen.nth(index)).to_have_value(name)
    assert page.at.evaluate("[typeof hacked, document.querySelectorAll('img[src=x]').length]") == ["undefined", 0]


# The layer map


def test_loader_shows_a_tile_per_layer_and_counts_formats(page):
    page.load(sampled(page), look=[LOADER])
    page.host.free()  # ComfyUI sends nothing of a loader whose whole workflow is cached
    page.run()
    page.look(LOADER)
    page.inside(LOADER).get_by_role("gridcell").first.wait_for()
    tiles, legend = page.inside(LOADER).get_by_role("gridcell"), page.inside(LOADER).locator("[data-part=legend-entry]")
    counts = {entry.get_attribute("data-key"): int(re.search(r"\d+$", entry.inner_text())[0]) for entry in legend.all()}
    assert counts["nvfp4"] == 13 and counts["mxfp8"] == 15
    expect(tiles).to_have_count(sum(count for key, count in counts.items() if key != "branch"))
    first = tiles.first
    first.focus()
    expect(page.inside(LOADER).locator("[data-part=details]")).to_contain_text("bits")
    named = page.inside(LOADER).locator("[data-part=details] .name")
    before = named.inner_text()
    first.press("ArrowRight")
    expect(named).not_to_have_text(before)
    page.load(page.saved(), look=[LOADER])  # still open: there is room
    expect(tiles.first).to_be_visible()


# The map of a plan, which can be painted


def planning(page):
    graph = Builder(page.host)
    model = graph.add("UNETLoader", ["tiny.safetensors", "default"])
    graph.add(PLAN, size=(520, 420), model=(model, 0))
    page.load(graph.workflow(), look=[PLAN])
    few = {"target_size_gb": 0.01, "minutes": 0.0, "ranks": "0", "int8_convrot": False, "name": page.renderer}
    for widget, value in few.items():
        page.set(PLAN, widget, value)


def fact(page, label):
    """A fact above the map, without what edits change about it."""
    return page.inside(PLAN).locator("[data-part=facts] div", has_text=label).locator("dd")


def test_painting_a_tile_changes_size_and_error_and_is_saved(page):
    planning(page)
    page.run()
    page.look(PLAN)
    tile = page.inside(PLAN).locator("[data-part=tile][aria-label*='mxfp8']").first
    tile.wait_for()
    size, error = fact(page, "size").inner_text(), fact(page, "expected error").inner_text()
    name = tile.get_attribute("aria-label").partition(":")[0]
    page.inside(PLAN).locator("[data-part=brush-nvfp4]").click()
    tile.click()
    painted = page.inside(PLAN).locator(f"[data-part=tile][aria-label^='{name}:']")
    expect(painted).to_have_attribute("aria-label", re.compile("nvfp4"))
    expect(fact(page, "size")).not_to_have_text(size)
    expect(fact(page, "expected error")).not_to_have_text(error)
    edits = page.value(PLAN, "edits")
    assert edits.startswith(f"{name} = nvfp4")
    page.inside(PLAN).locator("[data-part=undo]").click()
    expect(fact(page, "size")).to_have_text(size)
    assert page.value(PLAN, "edits") == ""
    painted.focus()
    painted.press("Enter")  # the brush is still in hand
    assert page.value(PLAN, "edits") == edits
    page.load(page.saved(), look=[PLAN])
    assert page.value(PLAN, "edits") == edits
    page.run()
    page.look(PLAN)
    expect(painted).to_have_attribute("aria-label", re.compile("nvfp4"))
    expect(page.inside(PLAN).locator("[data-part=legend-entry]", has_text="edited")).to_contain_text("1")
