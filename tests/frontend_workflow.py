"""A workflow as the frontend saves it, turned into what POST /prompt takes: what happens when one presses Run."""

import importlib.resources
import json

NOTES = {"Note", "MarkdownNote"}
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
DISPLAYS = {"IMAGECOMPARE": {"__value__": ["", ""]}}  # widgets that only show; what the frontend sends for them
INPUT, OUTPUT = -10, -20  # the two ends of a subgraph


def api_format(workflow, object_info):
    """{node id: {class_type, inputs}}; a node in subgraph instance 57 becomes `57:30`, as in the frontend.

    `object_info` is the host's, or a dict of the nodes in use. Raises KeyError for a node the host does not have.
    """
    subgraphs = {s["id"]: s for s in workflow.get("definitions", {}).get("subgraphs", [])}
    return dict(_Graph(workflow, subgraphs).prompt(object_info))


def official(name):
    """One of ComfyUI's own templates."""
    folder = importlib.resources.files("comfyui_workflow_templates_json") / "templates"
    return json.loads((folder / f"{name}.json").read_text("utf-8"))


def widgets(schema):
    """[(input name or None for "control after generate", default)] in the order of a node's `widgets_values`."""
    found = []
    for name, (kind, options) in _inputs(schema).items():
        if not isinstance(kind, list) and kind in DISPLAYS:
            found.append((name, DISPLAYS[kind]))
            continue
        if not isinstance(kind, list) and (kind not in WIDGETS or options.get("forceInput")):
            continue
        choices = (kind if isinstance(kind, list) else options.get("options")) or [None]
        found.append((name, options.get("default", choices[0])))
        if options.get("control_after_generate", kind == "INT" and name in ("seed", "noise_seed")):
            found.append((None, "randomize"))
    return found


def _inputs(schema):
    groups = [schema["input"].get(group, {}) for group in ("required", "optional")]
    return {name: (spec[0], spec[1] if len(spec) > 1 else {}) for group in groups for name, spec in group.items()}


class _Graph:
    """The workflow, or one instance of a subgraph in it."""

    def __init__(self, graph, subgraphs, prefix="", parent=None, instance=None):
        self.graph, self.prefix, self.parent, self.instance = graph, prefix, parent, instance
        self.nodes = {node["id"]: node for node in graph["nodes"]}
        self.links = dict(_link(link) for link in graph["links"])
        self.children = {
            id: _Graph(subgraphs[node["type"]], subgraphs, f"{prefix}{id}:", self, node)
            for id, node in self.nodes.items() if node["type"] in subgraphs
        }  # fmt: skip

    def prompt(self, object_info):
        for id, node in self.nodes.items():
            if id in self.children:
                yield from self.children[id].prompt(object_info)
            elif node["type"] not in NOTES:
                yield f"{self.prefix}{id}", {"class_type": node["type"], "inputs": self._values(node, object_info)}

    def _values(self, node, object_info):
        schema = object_info[node["type"]]
        given = list(node.get("widgets_values") or [])
        fields = widgets(schema)
        given += [default for _, default in fields[len(given) :]]
        values = {name: value for (name, _), value in zip(fields, given, strict=False) if name}
        linked = {slot["name"]: self._source(slot["link"]) for slot in node.get("inputs", [])}
        return values | {name: source for name, source in linked.items() if source}

    def _source(self, link):
        """[node id, output] that feeds a link, through subgraph borders; None if nothing does."""
        if link is None:
            return None
        node, slot = self.links[link][:2]
        if node == INPUT:
            name = self.graph["inputs"][slot]["name"]
            outer = [i for i in self.instance["inputs"] if i["name"] == name]
            return self.parent._source(outer[0]["link"]) if outer else None
        if node in self.children:
            return self.children[node]._output(slot)
        return [f"{self.prefix}{node}", slot]

    def _output(self, slot):
        return next(self._source(id) for id, link in self.links.items() if link[2:] == (OUTPUT, slot))


def _link(link):
    """(id, (origin node, origin slot, target node, target slot)) of either of the two ways links are saved."""
    if isinstance(link, dict):
        return link["id"], tuple(link[k] for k in ("origin_id", "origin_slot", "target_id", "target_slot"))
    return link[0], tuple(link[1:5])
