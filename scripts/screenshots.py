"""Takes the pictures of the README, docs/gallery.md and the help pages: a real ComfyUI, its page, the tiny model.

    scripts/screenshots              all of them: docs/images/*.jpg and web/docs/images/<NodeId>.jpg
    scripts/screenshots plan doctor  some, by name, with the help pictures of the nodes in them
    scripts/screenshots TesseraBake  a node's help picture by its id: as it opens, connected where an example has it

Two models: the tiny one of the tests, which draws shapes, and one of 34 blocks made of its layers, which draws nothing
but has a map like a large model's. Names, figures and pictures are what ComfyUI showed.
"""

import argparse
import contextlib
import io
import re
import sys
import time
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from comfy_host import TINY, load_pack  # noqa: E402

load_pack("tessera", ROOT)
from browser import EXAMPLES, Builder, Studio, example, for_tiny  # noqa: E402

GALLERY, HELP = ROOT / "docs" / "images", ROOT / "web" / "docs" / "images"
SMALL, LARGE = (1280, 800), (1920, 1080)
BLOCKS = 30
GALLERY_BYTES, HELP_BYTES = 190_000, 60_000  # the most a picture may take
HELP_WIDTH = 800
RUNNING = {  # nodes whose help pictures are taken while they show something
    "TesseraDiffusionModelLoader", "TesseraCorrectionLoRA", "TesseraInspect", "TesseraPlan", "TesseraQuantize",
    "TesseraLoRAStack",
}  # fmt: skip
SIZES = {"TesseraExtractLoRA": (460, 300)}  # of nodes that no example has


def deep(path):
    """A model with as many blocks as Z-Image, each the tiny model's with noise of its own."""
    torch.manual_seed(0)
    tensors, blocks = {}, {}
    for name, tensor in load_file(TINY).items():
        found = re.match(r"layers\.(\d+)\.(.*)", name)
        if found:
            blocks.setdefault(int(found[1]), {})[found[2]] = tensor
        else:
            tensors[name] = tensor
    for block in range(BLOCKS):
        for name, tensor in blocks[block % len(blocks)].items():
            rough = torch.randn_like(tensor.float()) * tensor.float().std() if tensor.ndim == 2 else 0
            rare = torch.rand(tensor.shape) < 0.002 * (block % 7) if tensor.ndim == 2 else 0
            tensors[f"layers.{block}.{name}"] = (tensor.float() + 0.3 * rough + 6 * rough * rare).to(tensor.dtype)
    save_file(tensors, path)


class Scenes:
    """Every picture by its name: a function that brings a page to where it is taken, and how it is taken."""

    def __init__(self, studio):
        self.studio, self.host = studio, studio.host

    @contextlib.contextmanager
    def page(self, renderer="nodes2", viewport=SMALL, dark=True):
        quiet = {"LiteGraph.Canvas.MinFontSizeForLOD": 0}
        with self.studio.page(renderer, viewport, dark, quiet) as page:
            yield page
            page.check()

    def opened(self, page, name, steps=8):
        workflow = example(name)
        self.studio.files.named_by(workflow, real=True)
        page.load(for_tiny(workflow, steps=steps), name=name)

    # The gallery

    def gallery_map(self):
        """Loader, correction and sampler after a run."""
        with self.page() as page:
            self.opened(page, "tessera_z_image_nvfp4")
            self.host.free()
            page.run(600)
            page.look()
            point_at_a_tile(page, "TesseraDiffusionModelLoader", 3)
            made = taken(page)
            for node in ("TesseraDiffusionModelLoader", "TesseraCorrectionLoRA", "TesseraInspect"):
                help_picture(page, node)
            return made

    def gallery_map_light(self):
        """The same in the light theme and the older renderer."""
        with self.page("litegraph", dark=False) as page:
            self.opened(page, "tessera_z_image_nvfp4")
            self.host.free()
            page.run(600)
            page.look()
            return taken(page)

    def gallery_plan(self):
        """A plan for a model of 34 blocks, with layers painted by hand."""
        with self.page() as page:
            self.plan(page)
            page.look("TesseraPlan", most=1.25)
            page.inside("TesseraPlan").locator("[data-part=brush-mxfp8]").click()
            for tile in page.inside("TesseraPlan").locator("[data-part=tile][aria-label*='nvfp4']").all()[40:46]:
                tile.click()
            made = taken(page)
            help_picture(page, "TesseraPlan")
            return made

    def plan(self, page):
        graph = Builder(self.host)
        model = graph.add("UNETLoader", ["deep.safetensors", "default"])
        graph.add("TesseraPlan", size=(640, 420), model=(model, 0))
        page.load(graph.workflow(), name="plan", look=["TesseraPlan"])
        wanted = {"target_size_gb": 0.04, "minutes": 0.0, "ranks": "0", "name": "deep_planned"}
        for widget, value in wanted.items():
            page.set("TesseraPlan", widget, value)
        page.run(600)

    def quantizing(self, page, filename):
        graph = Builder(self.host)
        graph.add("TesseraQuantize", size=(640, 380))
        page.load(graph.workflow(), name="quantize", look=["TesseraQuantize"])
        wanted = {"source": "diffusion_models/deep.safetensors", "recipe": "z_image_nvfp4", "filename": filename}
        for widget, value in wanted.items():
            page.set("TesseraQuantize", widget, value)
        page.start()
        page.inside("TesseraQuantize").get_by_role("gridcell").first.wait_for()

    def gallery_quantize(self):
        """A quantization at a third of its way."""
        with self.page() as page:
            self.quantizing(page, "shown")
            status = "document.querySelector('[data-part=job-status]').textContent.match(/Layer (\\d+)/)"
            page.at.wait_for_function(f"Number({status}?.[1]) > 70", timeout=600_000)
            page.look("TesseraQuantize", most=1.1)
            made = taken(page)
            help_picture(page, "TesseraQuantize")
            page.inside("TesseraQuantize").locator("[data-part=cancel]").click()
            page.inside("TesseraQuantize").get_by_text("was cancelled").wait_for(timeout=600_000)
            return made

    def gallery_sweep(self):
        """The correction at several strengths, as grid and curve."""
        with self.page(viewport=LARGE) as page:
            self.opened(page, "tessera_strength_sweep")
            page.run(600)
            page.look()
            return taken(page)

    def gallery_doctor(self):
        """The sidebar tab."""
        with self.page() as page:
            self.opened(page, "tessera_z_image_nvfp4")
            page.sidebar().click()
            page.at.locator("[data-part=doctor][data-state=ready]").wait_for()
            return taken(page)

    def gallery_stack(self):
        """Rows of LoRAs."""
        with self.page("litegraph") as page:
            self.stack(page)
            page.look("TesseraLoRAStack", most=1.6)
            made = taken(page)
            help_picture(page, "TesseraLoRAStack")
            return made

    def stack(self, page):
        for name in ("film_grain.safetensors", "ink_lines.safetensors", "soft_light.safetensors"):
            self.studio.files.lora(name)
        page.reload()
        text = "film_grain.safetensors : 0.8\n# ink_lines.safetensors : 1\nsoft_light.safetensors : 0.35 : 0"
        graph = Builder(self.host)
        model = graph.add("TesseraDiffusionModelLoader", ["tiny_nvfp4.safetensors"])
        clip = graph.add("TesseraCLIPLoader", ["qwen_3_4b.safetensors", "lumina2"])
        graph.add("TesseraLoRAStack", [text], size=(520, 240), model=(model, 0), clip=(clip, 0))
        page.load(graph.workflow(), name="stack", look=["TesseraLoRAStack"])


def as_they_open(studio, wanted):
    """Help pictures of nodes before a run."""
    calibrations = studio.host.base / "user" / "tessera" / "calibrations"
    calibrations.mkdir(parents=True, exist_ok=True)
    (calibrations / "z_image_turbo.safetensors").touch()
    with studio.page("nodes2") as page:
        for path in EXAMPLES:
            workflow = example(path.stem)
            kinds = [node["type"] for node in workflow["nodes"]]
            shown = sorted(kind for kind in wanted if kinds.count(kind) == 1)
            if shown:
                page.load(workflow, name=path.stem)
            for kind in shown:
                help_picture(page, kind)
                wanted = wanted - {kind}
        for kind in sorted(wanted):
            graph = Builder(studio.host)
            graph.add(kind, size=SIZES.get(kind, (400, 130)))
            page.load(graph.workflow(), name=kind)
            help_picture(page, kind)


def taken(page):
    """The picture, when no message of ComfyUI's hides a part of the page any more."""
    for said in page.at.get_by_text(re.compile("^(job queued|(\\d+ )?jobs? completed)$", re.IGNORECASE)).all():
        said.wait_for(state="hidden")
    return page.picture()


def help_picture(page, node):
    """A node by itself, as large as the window allows, without the tooltip of what the pointer is over."""
    page.at.mouse.move(0, 0)
    page.at.locator(".p-tooltip").wait_for(state="detached")
    page.look(node, most=1.6)
    taken(page)
    data = io.BytesIO(page.at.screenshot(clip=page.probe("box", node)))
    save(data, HELP / f"{node}.jpg", HELP_BYTES, HELP_WIDTH)


def point_at_a_tile(page, node, index):
    tile = page.inside(node).get_by_role("gridcell").nth(index)
    tile.wait_for()
    tile.hover()


def save(data, path, most, width=None):
    """A JPEG of at most so many bytes, in the best quality that allows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with Image.open(data) as image:
        image = image.convert("RGB")
        if width and image.width > width:
            image = image.resize((width, round(image.height * width / image.width)), Image.Resampling.LANCZOS)
        for quality in (88, 82, 76, 70, 62, 54, 46, 38):
            image.save(path, quality=quality, optimize=True, progressive=True)
            if path.stat().st_size <= most:
                break
    print(f"{path.relative_to(ROOT)}: {image.width} x {image.height}, {path.stat().st_size / 1e3:.0f} kB, {quality}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="pictures to take; default: all")
    wanted = parser.parse_args().names
    nodes = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    scenes = {name.removeprefix("gallery_") for name in dir(Scenes) if name.startswith("gallery_")}
    if unknown := set(wanted) - nodes - scenes:
        parser.error(f"no such picture: {', '.join(sorted(unknown))}; there are {', '.join(sorted(nodes | scenes))}")
    with Studio() as studio:
        studio.files.quantized()
        deep(studio.host.models("diffusion_models") / "deep.safetensors")
        for path in EXAMPLES:
            studio.files.named_by(example(path.stem))
        for name in sorted(scenes & set(wanted) if wanted else scenes):
            start = time.monotonic()
            save(getattr(Scenes(studio), f"gallery_{name}")(), GALLERY / f"{name}.jpg", GALLERY_BYTES)
            print(f"    {time.monotonic() - start:.0f} s", flush=True)
        as_they_open(studio, nodes & set(wanted) if wanted else nodes - RUNNING)


if __name__ == "__main__":
    main()
