"""Writes example_workflows/*.json: the graphs are in scripts/example_graphs.py, a real ComfyUI names their slots.

    COMFYUI_PATH=... python scripts/example_workflows.py [NAME ...]

So a node that got another input, or a column that needs more room, is one edit and one run for all examples.
"""

import json
import re
import sys
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "scripts")]
from frontend_workflow import WIDGETS, widgets  # noqa: E402
from host_server import HostServer  # noqa: E402

FOLDER = ROOT / "example_workflows"
NAMESPACE = uuid.UUID("5d2f7a0e-6c1b-4b8e-9b57-0a4a5f0c1e00")
NOTE = "MarkdownNote"
COLOR = "#3f789e"  # ComfyUI's own for groups


class Output:
    """One output of a node, to be given as an input of another."""

    def __init__(self, node, slot):
        self.node, self.slot = node, slot


class Node:
    """A node in a graph; `node["MODEL"]` is its output of that name, `node[0]` the first."""

    def __init__(self, graph, data, outputs):
        self.graph, self.data, self.outputs = graph, data, outputs

    def __getitem__(self, name):
        return Output(self, name if isinstance(name, int) else self.outputs.index(name))


class Graph:
    """A workflow as the frontend saves it, node by node."""

    def __init__(self, name, object_info):
        self.name, self.info = name, object_info
        self.nodes, self.links, self.groups = [], [], []

    def note(self, text, place):
        """What to do, in a few lines; one per graph. Lines are joined, but for numbered ones and behind empty ones."""
        text = re.sub(r"(?<!\n)\n(?!\n|\d\. )", " ", text.strip())
        self._append(NOTE, place, [], [], [text], {}, "How to use")

    def add(self, kind, place, title=None, **inputs):
        """A node at (x, y, width, height): inputs are values of widgets, or outputs of other nodes."""
        schema = self.info[kind]
        specs = schema["input"].get("required", {}) | schema["input"].get("optional", {})
        unknown = inputs.keys() - specs.keys() - {"control_after_generate"}
        if unknown:
            raise KeyError(f"{self.name}: {kind} has no input {', '.join(sorted(unknown))}; it has {', '.join(specs)}")
        values = [inputs.get(name or "control_after_generate", default) for name, default in widgets(schema)]
        values = [default or "" if isinstance(value, Output) else value
                  for value, (_, default) in zip(values, widgets(schema), strict=True)]  # fmt: skip
        outputs = [{"name": name, "type": type_, "links": []}
                   for name, type_ in zip(schema["output_name"], schema["output"], strict=True)]  # fmt: skip
        pack = schema["python_module"].startswith("custom_nodes")
        properties = {"Node name for S&R": kind, "cnr_id": "tessera" if pack else "comfy-core"}
        slots = [_slot(name, spec) for name, spec in specs.items() if _has_slot(spec)]
        data = self._append(kind, place, slots, outputs, values, properties, title)
        for slot in slots:
            if isinstance(source := inputs.get(slot["name"]), Output):
                self._link(source, data, slots.index(slot))
        return Node(self, data, schema["output_name"])

    def group(self, title, x, y, width, height):
        number = len(self.groups) + 1
        self.groups.append({"id": number, "title": title, "bounding": [x, y, width, height], "color": COLOR,
                            "font_size": 24, "flags": {}})  # fmt: skip

    def _append(self, kind, place, inputs, outputs, values, properties, title):
        data = {"id": len(self.nodes) + 1, "type": kind, "pos": list(place[:2]), "size": list(place[2:]), "flags": {},
                "order": len(self.nodes), "mode": 0, "inputs": inputs, "outputs": outputs, "properties": properties,
                "widgets_values": values}  # fmt: skip
        if title:
            data["title"] = title
        self.nodes.append(data)
        return data

    def _link(self, source, target, slot):
        number, output = len(self.links) + 1, source.node.data["outputs"][source.slot]
        output["links"].append(number)
        target["inputs"][slot]["link"] = number
        self.links.append([number, source.node.data["id"], source.slot, target["id"], slot, output["type"]])

    def workflow(self):
        return {
            "id": str(uuid.uuid5(NAMESPACE, self.name)), "revision": 0, "last_node_id": len(self.nodes),
            "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links, "groups": self.groups,
            "config": {}, "extra": {"ds": self._view()}, "version": 0.4,
        }  # fmt: skip

    def _view(self, screen=(1280, 800), chrome=(70, 110)):
        """The whole graph on a small screen beside the frontend's own bars, or as much as leaves words readable."""
        boxes = [[*node["pos"], *node["size"]] for node in self.nodes] + [group["bounding"] for group in self.groups]
        left, top = (min(box[axis] for box in boxes) - 30 for axis in (0, 1))
        right, bottom = (max(box[axis] + box[axis + 2] for box in boxes) + 30 for axis in (0, 1))
        scale = min((screen[0] - chrome[0]) / (right - left), (screen[1] - chrome[1]) / (bottom - top), 1)
        scale = max(scale, 0.58)  # below it LiteGraph leaves out the words
        return {"scale": round(scale, 3), "offset": [round(chrome[0] / scale - left), round(chrome[1] / scale - top)]}


def _has_slot(spec):
    return not (isinstance(spec[0], str) and spec[0] == "IMAGECOMPARE")


def _slot(name, spec):
    """An input as the frontend saves it: a widget's has its name twice."""
    kind, options = ("COMBO" if isinstance(spec[0], list) else spec[0]), (spec[1] if len(spec) > 1 else {})
    slot = {"name": name, "type": kind, "link": None}
    if kind in WIDGETS and not options.get("forceInput"):
        slot["widget"] = {"name": name}
    return slot


def main(names):
    from example_graphs import GRAPHS

    with HostServer(cpu=True, timeout=400) as host:
        object_info = host.object_info()
    for name, draw in GRAPHS.items():
        if names and name not in names:
            continue
        graph = Graph(name, object_info)
        draw(graph)
        (FOLDER / f"{name}.json").write_text(json.dumps(graph.workflow(), indent=1, ensure_ascii=False) + "\n")
        print(f"{name}: {len(graph.nodes)} nodes")


if __name__ == "__main__":
    main(sys.argv[1:])
