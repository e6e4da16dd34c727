// @ts-check
/**
 * ComfyUI's loaders of a saved workflow become Tessera's, which have the same inputs and outputs under the same names.
 *
 * A shape is what a fresh node of a type has: its slots as it saves them, and the names and values of its widgets.
 * @typedef {{ inputs: any[], outputs: any[], widgets: string[], values: any[], properties?: any }} Shape
 * @typedef {{ type: string, title: string, why: "unknown" | "pickle" | "slots" }} Left a loader that stays, and why
 * @typedef {{ nodes: Map<string, Set<string>>, subgraphs: Set<string> }} Chosen ids of nodes per graph ("" is the
 *   workflow itself), and subgraphs that are meant as a whole
 */

/** @type {Record<string, string>} */
export const COUNTERPARTS = {
  UNETLoader: "TesseraDiffusionModelLoader",
  CLIPLoader: "TesseraCLIPLoader",
  LoraLoader: "TesseraLoRA",
  LoraLoaderModelOnly: "TesseraLoRA",
}
const PICKLE = /\.(pt|pth|ckpt|bin)$/i // any program can be in it; TesseraLoRA opens none
const ORIGIN = ["cnr_id", "aux_id", "ver"] // of the pack that a node is from

/**
 * The workflow with Tessera's loaders; the one given stays as it was.
 * @param {any} workflow as the frontend saves it @param {Record<string, Shape>} shapes of all types in COUNTERPARTS
 * @param {Chosen | null} [chosen] nothing else is touched; null: everything
 * @returns {{ workflow: any, replaced: string[], left: Left[] }} replaced: the types that were
 */
export function swap(workflow, shapes, chosen = null) {
  const made = structuredClone(workflow)
  const replaced = /** @type {string[]} */ ([])
  const left = /** @type {Left[]} */ ([])
  for (const { graph, id, whole } of graphs(made, chosen)) {
    for (const [index, node] of graph.nodes.entries()) {
      if (!whole && !chosen?.nodes.get(id)?.has(String(node.id))) continue
      const why = reason(node, shapes)
      if (why) left.push({ type: node.type, title: node.title ?? "", why })
      if (why || !replaceable(node)) continue
      replaced.push(node.type)
      graph.nodes[index] = counterpart(node, shapes[node.type], shapes[COUNTERPARTS[node.type]])
      moveLinks(graph, graph.nodes[index])
    }
  }
  return { workflow: made, replaced, left }
}

/** Whether a saved or live node could be replaced. @param {any} node */
export function replaceable(node) {
  return Object.hasOwn(COUNTERPARTS, node.type)
}

/**
 * A workflow's graphs: itself, then every subgraph that it defines; `whole` where all nodes are meant.
 * @param {any} workflow @param {Chosen | null} chosen
 */
function* graphs(workflow, chosen) {
  yield { graph: workflow, id: "", whole: !chosen }
  const waiting = [...(workflow.definitions?.subgraphs ?? [])]
  const meant = new Set(chosen?.subgraphs)
  for (const graph of waiting) waiting.push(...(graph.definitions?.subgraphs ?? []))
  for (let before = -1; before !== meant.size; ) {
    before = meant.size // subgraphs inside a subgraph that is meant
    for (const graph of waiting) if (meant.has(graph.id)) graph.nodes.forEach((/** @type {any} */ n) => inside(n, meant))
  }
  for (const graph of waiting) yield { graph, id: graph.id, whole: !chosen || meant.has(graph.id) }
}

/** @param {any} node @param {Set<string>} meant */
function inside(node, meant) {
  if (/^[0-9a-f]{8}-/.test(node.type)) meant.add(node.type) // a subgraph's node has the subgraph's id for a type
}

/** Why a loader stays; "" for one that can be replaced, and for nodes that load nothing. @param {any} node @param {Record<string, Shape>} shapes */
function reason(node, shapes) {
  if (!replaceable(node)) return loads(node) ? "unknown" : ""
  const values = valuesOf(node, shapes[node.type])
  if (PICKLE.test(String(values.get("lora_name") ?? ""))) return "pickle"
  const names = new Set(shapes[COUNTERPARTS[node.type]].inputs.map((slot) => slot.name))
  const lost = (node.inputs ?? []).some((/** @type {any} */ slot) => slot.link != null && !names.has(slot.name))
  return lost ? "slots" : ""
}

/** Whether a node that is not Tessera's makes a model or text encoder from a file, or puts a LoRA on one. @param {any} node */
function loads(node) {
  if (/^Tessera|^[0-9a-f]{8}-/.test(node.type)) return false
  const types = (/** @type {any[]} */ slots) => (slots ?? []).map((slot) => slot.type)
  const given = types(node.inputs)
  const makes = types(node.outputs).some((type) => type === "MODEL" || type === "CLIP")
  return makes && (/lora/i.test(node.type) || (/load/i.test(node.type) && !given.includes("MODEL") && !given.includes("CLIP")))
}

/** @param {any} node @param {Shape} shape @returns {Map<string, any>} a saved node's widget values by name */
function valuesOf(node, shape) {
  const saved = node.widgets_values ?? []
  if (!Array.isArray(saved)) return new Map(Object.entries(saved))
  return new Map(saved.slice(0, shape.widgets.length).map((value, index) => [shape.widgets[index], value]))
}

/** @param {any} node @param {Shape} from @param {Shape} to */
function counterpart(node, from, to) {
  const type = COUNTERPARTS[node.type]
  const values = valuesOf(node, from)
  const slots = new Map((node.inputs ?? []).map((/** @type {any} */ slot) => [slot.name, slot]))
  const properties = Object.entries({ ...node.properties }).filter(([key]) => !ORIGIN.includes(key))
  return {
    ...node, // place, size, title, colour, mode, flags
    type,
    inputs: to.inputs.map((slot) => ({ ...slot, ...kept(slots.get(slot.name), ["link", "label"]) })),
    outputs: to.outputs.map((slot, index) => ({ ...slot, ...kept(node.outputs?.[index], ["links", "label"]) })),
    properties: { ...to.properties, ...Object.fromEntries(properties), "Node name for S&R": type },
    widgets_values: to.widgets.map((name, index) => values.get(name) ?? to.values[index]),
  }
}

/** @param {any} slot @param {string[]} keys */
function kept(slot, keys) {
  return Object.fromEntries(keys.filter((key) => slot?.[key] !== undefined).map((key) => [key, slot[key]]))
}

/** Links into a node end at the place that its input has now. @param {any} graph @param {any} node */
function moveLinks(graph, node) {
  const places = new Map(node.inputs.map((/** @type {any} */ slot, /** @type {number} */ index) => [slot.link, index]))
  for (const link of graph.links ?? []) {
    const id = Array.isArray(link) ? link[0] : link.id
    if (!places.has(id)) continue
    if (Array.isArray(link)) link[4] = places.get(id)
    else link.target_slot = places.get(id)
  }
}
