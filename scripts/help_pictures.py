"""Pictures of help pages for the nodes that scripts/screenshots takes none of while they run: each as it opens.

    TESSERA_BROWSER=... COMFYUI_PATH=... python scripts/help_pictures.py [NodeId ...]

Writes web/docs/images/<NodeId>.jpg; without names, those that are not there. A node is shown as an example workflow
has it, connected; by itself where none has it.
"""

import contextlib
import json
import sys

from screenshots import EXAMPLES, HELP, ROOT, Builder, Studio, help_picture

SIZES = {"TesseraExtractLoRA": (460, 300)}


def main():
    pages = {path.stem for path in (ROOT / "web" / "docs").glob("*.md")}
    wanted = set(sys.argv[1:]) or {name for name in pages if not (HELP / f"{name}.jpg").exists()}
    workflows = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in EXAMPLES}
    with contextlib.ExitStack() as cleanup:
        studio = cleanup.enter_context(Studio())
        for workflow in workflows.values():
            studio.files.named_by(workflow)
        calibrations = studio.host.base / "user" / "tessera" / "calibrations"
        calibrations.mkdir(parents=True, exist_ok=True)
        (calibrations / "z_image_turbo.safetensors").touch()
        page = cleanup.enter_context(studio.page("nodes2"))  # after the files, which it asks for once
        for name, workflow in workflows.items():
            kinds = [node["type"] for node in workflow["nodes"]]
            shown = sorted(kind for kind in wanted if kinds.count(kind) == 1)
            if shown:
                page.load(workflow, name=name)
            for kind in shown:
                help_picture(page, kind)
                wanted.discard(kind)
        for kind in sorted(wanted):
            graph = Builder(studio.host)
            graph.add(kind, size=SIZES.get(kind, (400, 130)))
            page.load(graph.workflow(), name=kind)
            help_picture(page, kind)


if __name__ == "__main__":
    main()
