/** ComfyUI's loaders in a saved workflow become Tessera's, and nothing else changes. */
import assert from "node:assert/strict"
import { test } from "node:test"

import { replaceable, swap } from "../../web/swap_text.js"

const input = (name, type, widget) => ({ name, type, link: null, ...(widget && { widget: { name } }) })
const output = (name) => ({ name, type: name, links: null })
const shape = (slots, widgets, outputs) => ({
  inputs: [...slots, ...Object.keys(widgets).map((name) => input(name, "COMBO", true))],
  outputs: outputs.map(output),
  widgets: Object.keys(widgets),
  values: Object.values(widgets),
})
const MODEL = input("model", "MODEL")
const CLIP = input("clip", "CLIP")
const LORA = { lora_name: "a.safetensors", strength_model: 1 }
const SHAPES = {
  UNETLoader: shape([], { unet_name: "m", weight_dtype: "default" }, ["MODEL"]),
  TesseraDiffusionModelLoader: shape([], { unet_name: "m", weight_dtype: "default", speed: "auto", cache: false }, ["MODEL"]),
  CLIPLoader: shape([], { clip_name: "c", type: "sd3", device: "default" }, ["CLIP"]),
  TesseraCLIPLoader: shape([], { clip_name: "c", type: "sd3", device: "default", speed: "auto", cache: false }, ["CLIP"]),
  LoraLoader: shape([MODEL, CLIP], { ...LORA, strength_clip: 1 }, ["MODEL", "CLIP"]),
  LoraLoaderModelOnly: shape([MODEL], LORA, ["MODEL"]),
  TesseraLoRA: shape([MODEL, CLIP], { ...LORA, strength_clip: 1, curve: "" }, ["MODEL", "CLIP"]),
}
const SUBGRAPH = "11111111-2222-3333-4444-555555555555"

/** A saved node of a type, its slots as the type has them. */
function node(id, type, values, more = {}) {
  const { inputs, outputs } = structuredClone(SHAPES[type] ?? { inputs: [], outputs: [] })
  return { id, type, pos: [10 * id, 20], size: [300, 100], mode: 0, inputs, outputs, widgets_values: values, ...more }
}

function workflow() {
  const unet = node(1, "UNETLoader", ["x.safetensors", "fp8_e5m2"], {
    title: "My model", color: "#223", bgcolor: "#112", mode: 4, flags: { collapsed: true },
    properties: { cnr_id: "comfy-core", ver: "0.3.40", "Node name for S&R": "UNETLoader", models: [{ name: "x" }] },
  })
  const lora = node(2, "LoraLoaderModelOnly", ["b.safetensors", 0.4])
  unet.outputs[0].links = [7]
  lora.inputs[0].link = 7
  lora.inputs[2].link = 8 // strength_model, from a node
  lora.outputs[0].links = [9, 10]
  const number = { id: 3, type: "PrimitiveFloat", inputs: [], outputs: [{ ...output("FLOAT"), links: [8] }], widgets_values: [1] }
  const links = [[7, 1, 0, 2, 0, "MODEL"], [8, 3, 0, 2, 2, "FLOAT"], [9, 2, 0, 4, 0, "MODEL"], [10, 2, 0, 5, 0, "MODEL"]]
  const inner = node(1, "CLIPLoader", ["q.safetensors", "lumina2"])
  inner.inputs[0].link = 1
  const definition = { id: SUBGRAPH, nodes: [inner], links: [{ id: 1, origin_id: -10, origin_slot: 0, target_id: 1, target_slot: 0 }] }
  const nodes = [unet, lora, number, node(4, "Sampler"), node(5, "Sampler"), node(6, SUBGRAPH)]
  return { id: "w", nodes, links, groups: [{ title: "Loaders" }], definitions: { subgraphs: [definition] }, extra: { ds: {} } }
}

const types = (graph) => graph.nodes.map((node) => node.type)

test("values, place, look and mode of a node stay", () => {
  const [before] = workflow().nodes
  const after = swap(workflow(), SHAPES).workflow.nodes[0]
  assert.equal(after.type, "TesseraDiffusionModelLoader")
  assert.deepEqual(after.widgets_values, ["x.safetensors", "fp8_e5m2", "auto", false])
  for (const key of ["id", "pos", "size", "title", "color", "bgcolor", "mode", "flags"]) assert.deepEqual(after[key], before[key])
  assert.deepEqual(after.properties, { "Node name for S&R": "TesseraDiffusionModelLoader", models: [{ name: "x" }] })
})

test("links stay, also those into widgets, and end where the input is now", () => {
  const { workflow: made } = swap(workflow(), SHAPES)
  const lora = made.nodes[1]
  const at = Object.fromEntries(lora.inputs.map((slot, index) => [slot.name, index]))
  assert.equal(lora.type, "TesseraLoRA")
  assert.deepEqual([lora.inputs[at.model].link, lora.inputs[at.strength_model].link, lora.inputs[at.clip].link], [7, 8, null])
  assert.deepEqual(made.links[0], [7, 1, 0, 2, at.model, "MODEL"])
  assert.deepEqual(made.links[1], [8, 3, 0, 2, at.strength_model, "FLOAT"])
  assert.deepEqual(lora.outputs.map((slot) => slot.links), [[9, 10], null])
  assert.deepEqual(lora.widgets_values, ["b.safetensors", 0.4, 1, ""])
  assert.deepEqual(made.links.slice(2), workflow().links.slice(2))
})

test("a node in a subgraph is replaced, its link from the subgraph's input kept", () => {
  const { workflow: made, replaced } = swap(workflow(), SHAPES)
  const [definition] = made.definitions.subgraphs
  assert.deepEqual(types(definition), ["TesseraCLIPLoader"])
  assert.deepEqual(definition.nodes[0].widgets_values, ["q.safetensors", "lumina2", "default", "auto", false])
  assert.equal(definition.nodes[0].inputs[0].link, 1)
  assert.deepEqual(definition.links, workflow().definitions.subgraphs[0].links)
  assert.deepEqual(replaced, ["UNETLoader", "LoraLoaderModelOnly", "CLIPLoader"])
})

test("everything else is as it was, and the workflow given is not touched", () => {
  const given = workflow()
  const { workflow: made } = swap(given, SHAPES)
  assert.deepEqual(given, workflow())
  assert.deepEqual(made.nodes.slice(2), given.nodes.slice(2))
  assert.deepEqual([made.groups, made.extra, made.id], [given.groups, given.extra, given.id])
  assert.deepEqual(swap(made, SHAPES), { workflow: made, replaced: [], left: [] })
})

test("of chosen nodes only those, of a chosen subgraph all in it", () => {
  const one = swap(workflow(), SHAPES, { nodes: new Map([["", new Set(["1"])]]), subgraphs: new Set() })
  assert.deepEqual(one.replaced, ["UNETLoader"])
  const inside = swap(workflow(), SHAPES, { nodes: new Map([[SUBGRAPH, new Set(["1"])]]), subgraphs: new Set() })
  assert.deepEqual(inside.replaced, ["CLIPLoader"])
  const whole = swap(workflow(), SHAPES, { nodes: new Map(), subgraphs: new Set([SUBGRAPH]) })
  assert.deepEqual(whole.replaced, ["CLIPLoader"])
})

test("what cannot be replaced stays and is named with the reason", () => {
  const gguf = { id: 1, type: "UnetLoaderGGUF", title: "Mine", inputs: [], outputs: [output("MODEL")], widgets_values: ["x.gguf"] }
  const pickle = node(2, "LoraLoader", ["old.pt", 1, 1])
  const odd = node(3, "UNETLoader", ["m", "default"])
  odd.inputs.push({ ...input("other", "INT"), link: 5 })
  const shift = { id: 4, type: "ModelSamplingSD3", inputs: [MODEL], outputs: [output("MODEL")] }
  const given = { nodes: [gguf, pickle, odd, shift], links: [] }
  const { workflow: made, replaced, left } = swap(given, SHAPES)
  assert.deepEqual([made, replaced], [given, []])
  assert.deepEqual(left.map(({ type, title, why }) => [type, title, why]), [
    ["UnetLoaderGGUF", "Mine", "unknown"], ["LoraLoader", "", "pickle"], ["UNETLoader", "", "slots"],
  ])
})

test("objects as links and values by name are read too", () => {
  const lora = node(2, "LoraLoaderModelOnly", { strength_model: 0.3, lora_name: "b.safetensors" })
  lora.inputs[2].link = 8
  const given = { nodes: [lora], links: [{ id: 8, origin_id: 3, origin_slot: 0, target_id: 2, target_slot: 2 }] }
  const { nodes, links } = swap(given, SHAPES).workflow
  assert.deepEqual(nodes[0].widgets_values, ["b.safetensors", 0.3, 1, ""])
  assert.equal(nodes[0].inputs[links[0].target_slot].name, "strength_model")
})

test("only nodes with a counterpart are replaceable", () => {
  assert.deepEqual(["UNETLoader", "TesseraLoRA", "toString"].map((type) => replaceable({ type })), [true, false, false])
})
