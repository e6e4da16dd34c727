"""One real ComfyUI and one Chromium for all tests that open a page; either renderer, and what a page must not do.

    with Studio() as studio, studio.page("nodes2") as page:
        page.load(workflow)                    # as the frontend saves it
        page.run()                             # raises Failed with what ComfyUI said
        page.inside("TesseraPlan").get_by_role("grid").wait_for()
        page.check()                           # no page error, no console error, nothing asked of another machine

`TESSERA_BROWSER` names the Chromium, as scripts/setup_browser.py prints it. Pictures go to .cache/screenshots.
"""

import contextlib
import copy
import io
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from comfy_host import PROMPTS, TINY
from host_server import HostServer

TESTS = Path(__file__).resolve().parent.parent
ROOT = TESTS.parent
EXAMPLES = sorted((ROOT / "example_workflows").glob("*.json"))
SCREENSHOTS = Path(os.environ.get("TESSERA_CACHE") or ROOT / ".cache") / "screenshots"
SECONDS, RUN = 60, 300  # to wait for anything, for a workflow; machines of continuous integration are slow
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--no-first-run",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]  # fmt: skip
SETTINGS = {
    "Comfy.TutorialCompleted": True, "Comfy.Minimap.Visible": False, "Comfy.Graph.CanvasInfo": False,
    "Comfy.Notification.ShowVersionUpdates": False, "Comfy.Locale": "en",
}  # fmt: skip
RECIPES = {"nvfp4": "z_image_nvfp4", "mxfp8": "z_image_mxfp8", "int8": "int8_convrot"}  # by a word in a file's name
PROMPT = "window.app.graphToPrompt().then(({ output }) => JSON.stringify(output))"
KNOWN = (  # what ComfyUI's own page complains of
    r"Failed to load resource: the server responded with a status of 404",  # user.css, a user's workflow index...
    r"ComfyApp graph accessed before initialization",
)


class Failed(Exception):
    """ComfyUI refused a workflow, failed in a node, or was interrupted; says which and why."""


class Studio:
    """The host with the tiny model and everything the examples name, and the browser; both end with the block."""

    def __init__(self, packs=None):
        self.packs = {"tiny": TESTS / "tiny" / "node_pack"} | (packs or {})

    def __enter__(self):
        with contextlib.ExitStack() as cleanup:
            self.browser = cleanup.enter_context(chromium())
            self.host = cleanup.enter_context(HostServer(self.packs, cpu=True, args=frontend()))
            self.files = Files(self.host)
            self.cleanup = cleanup.pop_all()
        return self

    def __exit__(self, *_):
        self.cleanup.close()

    @contextlib.contextmanager
    def page(self, renderer, viewport=(1280, 800), dark=True, settings=None):
        """A frontend in a fresh profile."""
        theme = "dark" if dark else "light"
        wanted = {"Comfy.VueNodes.Enabled": renderer == "nodes2", "Comfy.ColorPalette": theme} | (settings or {})
        context = self.browser.new_context(viewport={"width": viewport[0], "height": viewport[1]})
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=self.host.url)
        context.add_init_script(path=TESTS / "browser" / "page.js")
        context.set_default_timeout(SECONDS * 1000)
        try:
            page = Page(context.new_page(), self, renderer, SETTINGS | wanted)
            page.open()
            yield page
        finally:
            context.close()


def frontend():
    """ComfyUI's argument for another frontend: TESSERA_FRONTEND is the folder of a comfyui_frontend_package."""
    folder = os.environ.get("TESSERA_FRONTEND")
    return ["--front-end-root", str(Path(folder, "static").resolve())] if folder else []


@contextlib.contextmanager
def chromium():
    """The browser that TESSERA_BROWSER names; without one the tests are skipped, which CI counts as failure."""
    program = os.environ.get("TESSERA_BROWSER")
    if not program or not os.environ.get("COMFYUI_PATH"):
        pytest.skip("TESSERA_BROWSER or COMFYUI_PATH is not set: run scripts/test, or scripts/setup_browser.py")
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=FLAGS, timeout=SECONDS * 1000)
        yield browser
        browser.close()


class Files:
    """Models under the names that workflows use, made when somebody asks for them."""

    def __init__(self, host):
        self.host, self.empty = host, set()
        self.made = {}  # (recipe, source) -> the name of a model that was quantized so
        for folder in ("diffusion_models", "text_encoders", "vae", "loras"):
            host.models(folder)
        shutil.copy(TINY, host.models("diffusion_models") / "tiny.safetensors")

    def named_by(self, workflow, real=False):
        """Every file that a workflow names is there afterwards: `real` diffusion models are tiny ones, others empty."""
        for node in workflow["nodes"]:
            for value in node.get("widgets_values") or []:
                if isinstance(value, str) and re.fullmatch(r"[\w./-]+\.safetensors", value):
                    name, *folder = reversed(value.split("/"))
                    self._make(self.host.models(folder[0] if folder else folder_of(node["type"])) / name, real)

    def _make(self, path, real):
        real = real and path.parent.name == "diffusion_models"
        if path.exists() and not (real and path in self.empty):
            return
        if not real:
            save_file({"nothing": torch.zeros(1)}, path)
            self.empty.add(path)
            return
        path.unlink(missing_ok=True)
        self.empty.discard(path)
        recipe = next((recipe for word, recipe in RECIPES.items() if word in path.name), None)
        if recipe:
            self.quantized(path.stem, recipe)
        else:
            shutil.copy(TINY, path)

    def quantized(self, name="tiny_nvfp4", recipe="z_image_nvfp4", source=TINY):
        """A quantized model and its correction LoRA, by name."""
        from tessera.checkpoint import Checkpoint
        from tessera.job import Job
        from tessera.quantization import recipe as recipes

        target = self.host.models("diffusion_models") / f"{name}.safetensors"
        lora = self.host.models("loras") / f"{name}_lora.safetensors"
        if not target.exists():
            lora.unlink(missing_ok=True)
            if (recipe, source) in self.made:  # renamed, as users do
                made = self.made[recipe, source]
                shutil.copy(target.with_name(f"{made}.safetensors"), target)
                shutil.copy(lora.with_name(f"{made}_lora.safetensors"), lora)
            else:
                Job(Checkpoint(source), target, recipes.builtin(recipe), lora).run()
                self.made[recipe, source] = name
        return target.name, lora.name

    def lora(self, name, source="tiny_nvfp4_lora.safetensors"):
        """Another name of a LoRA."""
        shutil.copy(self.host.models("loras") / source, self.host.models("loras") / name)


def folder_of(kind):
    """Where the files lie that a kind of node loads."""
    words = {"CLIP": "text_encoders", "VAE": "vae", "LoRA": "loras", "Lora": "loras", "UNET": "diffusion_models"}
    return next((folder for word, folder in words.items() if word in kind), "diffusion_models")


class Page:
    """An open frontend; `probe` is what page.js knows about it, `at` Playwright's page."""

    def __init__(self, at, studio, renderer, settings):
        self.at, self.host, self.files, self.renderer = at, studio.host, studio.files, renderer
        self.settings = settings
        self.complaints, self.foreign = [], []
        at.on("pageerror", lambda error: self.complaints.append(f"page error: {error}"))
        at.on("console", self._console)
        at.on("request", self._request)

    def _console(self, message):
        if message.type == "error" and not any(re.search(known, message.text) for known in KNOWN):
            self.complaints.append(f"console: {message.text}")

    def _request(self, request):
        if not request.url.startswith((self.host.url, "data:", "blob:")):
            self.foreign.append(request.url)

    # Pages

    def open(self):
        self._settle()
        self.at.goto(self.host.url)
        self.at.wait_for_function("window.probe?.ready()")

    def reload(self):
        self._settle()
        self.at.reload()
        self.at.wait_for_function("window.probe?.ready()")

    def _settle(self):
        """ComfyUI keeps one set of settings; another page may have opened with its own since."""
        self.host.post("/settings", self.settings)

    def until(self, expression):
        """Waits for something to be true in the page."""
        self.at.wait_for_function(expression)

    def check(self):
        """The page has had no error since the last check, and asked nothing of another machine."""
        found, self.complaints = self.complaints, []
        assert not found, "\n".join(found)
        assert self.foreign == []

    def screenshot(self, name):
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{re.sub(r'[^A-Za-z0-9]+', '_', name).strip('_')}.png"
        self.at.screenshot(path=path)
        return path

    def picture(self):
        """What is shown now, as a file in memory."""
        return io.BytesIO(self.at.screenshot())

    def probe(self, name, *arguments):
        """Calls one of the functions of `window.probe`."""
        return self.at.evaluate("([name, given]) => window.probe[name](...given)", [name, list(arguments)])

    # Workflows

    def load(self, workflow, look=(), name=None):
        """Opens a workflow, in a tab of some name, and looks at all of it, or at some nodes."""
        self.probe("load", workflow, name)
        assert self.probe("missing") == []
        self.look(*look)

    def look(self, *nodes, most=1.0):
        """Moves and zooms so that these nodes, or all, are in view."""
        self.probe("look", list(nodes), most)

    def queued(self):
        """The prompts that this page has queued since it was opened."""
        return self.at.evaluate("window.probe.queued")

    def start(self):
        """Queues the open workflow: its prompt id."""
        refused = self.probe("queue")
        if refused:
            raise Failed(refused)
        return self.queued()[-1]

    def wait(self, prompt, timeout=RUN):
        """The files that a run saved, when it has ended well."""
        find = "prompt => window.probe.ends.find((end) => end.prompt_id === prompt)"
        end = self.at.wait_for_function(find, arg=prompt, timeout=timeout * 1000).json_value()
        if end["type"] != "execution_success":
            raise Failed(f"{end['type']} in {end.get('node_type')}: {end.get('exception_message', '')}")
        self.probe("drawn")
        return self.host.files(self.host.get(f"/history/{prompt}")[prompt])

    def run(self, timeout=RUN):
        return self.wait(self.start(), timeout)

    # Nodes

    def value(self, node, widget):
        return self.probe("value", node, widget)

    def set(self, node, widget, value):
        self.probe("set", node, widget, value)

    def setting(self, name, value):
        self.at.evaluate("([name, value]) => window.app.extensionManager.setting.set(name, value)", [name, value])

    def slider(self, node, widget):
        """The slider of a widget, in Nodes 2.0."""
        return (
            self.at.locator(f'[data-node-id="{self.probe("mark", node)}"]').get_by_label(widget).get_by_role("slider")
        )

    def slide(self, node, widget, share):
        """Drags a slider to a share of its way."""
        if self.renderer == "nodes2":
            box = self.slider(node, widget).locator("xpath=ancestor::*[@data-slot='slider']").bounding_box()
            left, width, y = box["x"], box["width"], box["y"] + box["height"] / 2
        else:
            (left, y), (right, _) = self.probe("track", node, widget)
            width = right - left
        self.at.mouse.move(left + 0.6 * width, y)
        self.at.mouse.down()
        for part in (0.55, 0.5 * (0.55 + share), share, share):
            self.at.mouse.move(left + part * width, y)
            self.probe("drawn")  # a page takes a pointer's moves frame by frame
        self.at.mouse.up()
        self.probe("drawn")

    def inside(self, node):
        """A locator of what a node's own widget shows, in both renderers; good until the next page is opened."""
        return self.at.locator(f'[data-of-node="{self.probe("mark", node)}"]')

    def toast(self, text):
        """The notification that says this."""
        return self.at.get_by_role("alert").filter(has_text=text).last

    def notices(self):
        """What all notifications say now."""
        return set(self.at.get_by_role("alert").all_inner_texts())

    def sidebar(self):
        """The button of our tab."""
        return self.at.get_by_role("button", name="Tessera: what this machine does with each format")

    def saved(self):
        """The workflow as the frontend would save it."""
        return self.probe("saved")

    def prompt(self):
        """The workflow as the frontend would queue it: {node id: {class_type, inputs, ...}}."""
        return json.loads(self.at.evaluate(PROMPT))


def picture(paths):
    """The pixels of the last of some files."""
    with Image.open(paths[-1]) as image:
        return np.asarray(image).astype(int)


# Workflows for the tiny model


def example(name):
    return json.loads((ROOT / "example_workflows" / f"{name}.json").read_text(encoding="utf-8"))


def for_tiny(workflow, text=PROMPTS[0], steps=2):
    """The same workflow with the tiny model's two ends in place of text encoder and VAE, small and quick."""
    workflow = copy.deepcopy(workflow)
    for node in workflow["nodes"]:
        if node["type"] == "CLIPTextEncode":
            _become(workflow, node, "TinyPrompt", [text])
        elif node["type"] == "VAEDecode":
            _become(workflow, node, "TinyDecode", [4])
        elif node["type"] == "EmptySD3LatentImage":
            node["widgets_values"] = [128, 128, 1]
        elif node["type"] == "KSampler":
            node["widgets_values"][2] = steps
    gone = {n["id"] for n in workflow["nodes"] if n["type"] in ("CLIPLoader", "TesseraCLIPLoader", "VAELoader")}
    workflow["nodes"] = [node for node in workflow["nodes"] if node["id"] not in gone]
    _unlink(workflow, lambda link: link[1] in gone or link[3] in gone)
    return workflow


def _become(workflow, node, kind, values):
    """Another type of node with the same outputs; of its inputs stay those of the name `samples`."""
    kept = [slot for slot in node["inputs"] if slot["name"] == "samples"]
    lost = {slot["link"] for slot in node["inputs"] if slot not in kept}
    _unlink(workflow, lambda link: link[0] in lost)
    node |= {"type": kind, "inputs": kept, "widgets_values": values}
    for link in workflow["links"]:
        if link[3] == node["id"]:
            link[4] = 0


def _unlink(workflow, gone):
    """Takes links out, at both their ends."""
    lost = {link[0] for link in workflow["links"] if gone(link)}
    workflow["links"] = [link for link in workflow["links"] if link[0] not in lost]
    for node in workflow["nodes"]:
        for slot in node.get("inputs", []):
            slot["link"] = None if slot.get("link") in lost else slot.get("link")
        for slot in node.get("outputs", []):
            slot["links"] = [link for link in slot.get("links") or [] if link not in lost]


class Builder:
    """A workflow node by node, laid out in columns: `add` gives the node's id."""

    def __init__(self, host):
        self.info, self.nodes, self.links = host.object_info(), [], []
        self.x = 0

    def add(self, kind, values=(), size=(380, 200), **sources):
        """A node with the values of its widgets, in order, and inputs from (id, output number)."""
        id, schema = len(self.nodes) + 1, self.info[kind]
        specs = schema["input"].get("required", {}) | schema["input"].get("optional", {})
        inputs = [{"name": name, "type": specs[name][0] if isinstance(specs[name][0], str) else "COMBO", "link": None}
                  for name in sources]  # fmt: skip
        outputs = [{"name": name, "type": type_, "links": []}
                   for name, type_ in zip(schema["output_name"], schema["output"], strict=True)]  # fmt: skip
        node = {"id": id, "type": kind, "pos": [self.x, 0], "size": list(size), "flags": {}, "order": id, "mode": 0,
                "inputs": inputs, "outputs": outputs, "properties": {}, "widgets_values": list(values)}  # fmt: skip
        self.nodes.append(node)
        self.x += size[0] + 60
        for slot, (origin, output) in enumerate(sources.values()):
            link, source = len(self.links) + 1, self.nodes[origin - 1]["outputs"][output]
            self.links.append([link, origin, output, id, slot, source["type"]])
            source["links"].append(link)
            inputs[slot]["link"] = link
        return id

    def workflow(self):
        return {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes,
                "links": self.links, "groups": [], "config": {}, "extra": {}, "version": 0.4}  # fmt: skip
