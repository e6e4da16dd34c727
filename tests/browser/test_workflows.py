"""What a user sees who opens workflows in ComfyUI's page, runs, cancels and changes them, in both renderers."""

import json
import re

import pytest
from playwright.sync_api import expect

from frontend_workflow import api_format, official

from . import EXAMPLES, Builder, Failed, example, for_tiny, picture
from .files import NAMES, STRANGE, WIDE

pytestmark = pytest.mark.host

QUANTIZE = "TesseraQuantize"
UNDO = """async () => {
  const tracker = window.app.extensionManager.workflow.activeWorkflow.changeTracker
  const capture = tracker.captureCanvasState ?? tracker.checkState // its name before 1.44
  capture.call(tracker)
  window.probe.widget("TesseraQuantize", "rank").value = 64
  capture.call(tracker)
  await tracker.undo()
}"""


# Example workflows


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_opens_without_a_complaint_and_queues_what_the_tests_over_http_run(page, path):
    workflow = example(path.stem)
    before = page.notices()
    page.load(workflow)
    assert page.at.locator("[data-testid=error-overlay]").count() == 0
    assert page.notices() <= before
    assert page.at.locator("[role=dialog]").count() == 0
    queued = {id: {key: node[key] for key in ("class_type", "inputs")} for id, node in page.prompt().items()}
    assert queued == api_format(workflow, page.host.object_info())


def test_example_with_a_strength_sweep_shows_its_grid(page):
    workflow = example("tessera_strength_sweep")
    page.files.named_by(workflow, real=True)
    page.load(for_tiny(workflow))
    assert min(picture(page.run()).shape[:2]) > 256


# Quantizing


def quantizing(page, source, filename):
    """A page with only a Quantize node."""
    graph = Builder(page.host)
    graph.add(QUANTIZE, size=(480, 320))
    page.load(graph.workflow(), look=[QUANTIZE])
    for widget, value in {"source": f"diffusion_models/{source}", "recipe": "nvfp4", "filename": filename}.items():
        page.set(QUANTIZE, widget, value)


def status(page):
    return page.inside(QUANTIZE).locator("[data-part=job-status]")


def test_a_quantization_survives_a_reload_and_is_cancelled(page):
    quantizing(page, "wide.safetensors", f"cancelled_{page.renderer}")
    prompt = page.start()
    expect(status(page)).to_have_text(re.compile(rf"Layer \d+ of {WIDE}"))
    page.look(QUANTIZE)
    expect(page.inside(QUANTIZE).get_by_role("gridcell")).to_have_count(WIDE + 1)
    page.reload()
    expect(status(page)).to_have_text(re.compile(rf"Layer \d+ of {WIDE}"))
    expect(page.inside(QUANTIZE).get_by_role("gridcell")).to_have_count(WIDE + 1)
    page.look(QUANTIZE)
    page.inside(QUANTIZE).locator("[data-part=cancel]").click()
    with pytest.raises(Failed, match="execution_interrupted"):
        page.wait(prompt)
    expect(status(page)).to_contain_text("was cancelled")
    assert not list(page.host.models("diffusion_models").glob("cancelled_*"))


def test_a_quantization_is_still_shown_after_undo(page):
    quantizing(page, "strange.safetensors", f"undone_{page.renderer}")
    page.run()
    page.at.evaluate(UNDO)
    page.until(f"window.probe.widget('{QUANTIZE}', 'job').element.isConnected")
    assert page.value(QUANTIZE, "rank") == 32
    expect(status(page)).to_contain_text("is made and checked")


def test_names_of_layers_are_shown_as_text(page):
    quantizing(page, "strange.safetensors", f"strange_{page.renderer}")
    page.run()
    expect(status(page)).to_contain_text("is made and checked")
    page.look(QUANTIZE)
    tiles = page.inside(QUANTIZE).get_by_role("gridcell")
    expect(tiles).to_have_count(6)
    labels = [tile.get_attribute("aria-label") for tile in tiles.all()]
    assert {label.partition(": ")[0] for label in labels} == set(NAMES)
    tiles.first.focus()
    expect(page.inside(QUANTIZE).locator("[data-part=details]")).to_contain_text("hacked")
    page.inside(QUANTIZE).locator("[data-part=report] summary").click()
    expect(page.inside(QUANTIZE).locator("[data-part=report-table] tbody")).to_contain_text(STRANGE[1])
    assert nothing_ran(page)


def test_a_name_with_markup_is_refused_and_shown_as_text(page):
    quantizing(page, "hostile.safetensors", f"hostile_{page.renderer}")
    with pytest.raises(Failed, match=r"hostile\.safetensors: .*markup"):
        page.run()
    expect(page.inside(QUANTIZE).locator("[data-part=job-error]")).to_contain_text("img src=x onerror=hacked=1>.0.w")
    assert nothing_ran(page)


def nothing_ran(page):
    return page.at.evaluate("typeof hacked === 'undefined' && !document.querySelector('img[src=x]')")


# Around the workflow


def kinds(page):
    return sorted(page.at.evaluate("window.probe.nodes().map((node) => node.type)"))


def test_loaders_of_the_official_template_are_swapped_and_swapped_back(page):
    page.load(official("image_z_image_turbo"))
    before = kinds(page)
    assert {"UNETLoader", "CLIPLoader"} <= set(before)
    page.at.evaluate("window.app.extensionManager.command.execute('Tessera.UseLoaders')")
    swapped = {"UNETLoader": "TesseraDiffusionModelLoader", "CLIPLoader": "TesseraCLIPLoader"}
    after = sorted(swapped.get(kind, kind) for kind in before)
    page.until(f"window.probe.nodes().map((node) => node.type).sort().join() === {json.dumps(','.join(after))}")
    expect(page.toast("Replaced")).to_contain_text("Load Diffusion Model")
    page.at.evaluate("window.app.extensionManager.command.execute('Comfy.Undo')")
    page.until(f"window.probe.nodes().map((node) => node.type).sort().join() === {json.dumps(','.join(before))}")


def test_doctor_says_what_runs_here_and_copies_it(page):
    page.sidebar().click()
    doctor = page.at.locator("[data-part=doctor]")
    expect(doctor.locator("[data-part=doctor-verdict]")).not_to_be_empty()
    formats = doctor.locator("[data-part=doctor-format]").all()
    assert {"nvfp4", "mxfp8"} <= {word for row in formats for word in row.get_attribute("data-formats").split()}
    expect(doctor.locator("[data-part=doctor-machine]")).to_contain_text("torch")
    doctor.locator("[data-part=doctor-copy]").click()
    expect(doctor.locator("[data-part=doctor-copy]")).to_have_text("Copied")
    copied = page.at.evaluate("navigator.clipboard.readText()")
    assert "comfy-kitchen" in copied and "nvfp4" in copied and "|" in copied
    page.screenshot(f"doctor {page.renderer}")
    page.sidebar().click()
