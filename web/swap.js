// @ts-check
/** "Use Tessera loaders": ComfyUI's loaders in the open workflow become Tessera's, in one step of undo. */
import { app, changeTracker, lookForChanges, rootGraph } from "./frontend.js"
import { COUNTERPARTS, replaceable, swap } from "./swap_text.js"
import { word } from "./words.js"

app.registerExtension({
  name: "tessera.swap",
  commands: [
    {
      id: "Tessera.UseLoaders",
      label: "Use Tessera loaders",
      icon: "pi pi-arrow-right-arrow-left",
      function: () => useLoaders(),
    },
  ],
  menuCommands: [{ path: ["Edit"], commands: ["Tessera.UseLoaders"] }],
  getCanvasMenuItems() {
    return everyNode(rootGraph()).some(replaceable) ? [null, item(() => useLoaders())] : []
  },
  getNodeMenuItems(/** @type {any} */ node) {
    if (!everyNode({ nodes: [node] }).some(replaceable)) return []
    return [item(() => useLoaders(selected(node)))]
  },
})

function title() {
  return word("use_loaders", "Use Tessera loaders")
}

/** @param {() => void} callback */
function item(callback) {
  return { content: title(), callback }
}

/** All nodes of a graph and of the subgraphs in it. @param {any} graph @returns {any[]} */
function everyNode(graph) {
  return [...graph.nodes].flatMap((node) => [node, ...(node.subgraph ? everyNode(node.subgraph) : [])])
}

/** What is selected, with the node whose menu was opened. @param {any} node @returns {import("./swap_text.js").Chosen} */
function selected(node) {
  const all = new Set([node, ...Object.values(app.canvas.selected_nodes ?? {})])
  const nodes = /** @type {Map<string, Set<string>>} */ (new Map())
  for (const one of all) {
    const id = one.graph === rootGraph() ? "" : String(one.graph.id)
    nodes.set(id, (nodes.get(id) ?? new Set()).add(String(one.id)))
  }
  return { nodes, subgraphs: new Set([...all].filter((one) => one.subgraph).map((one) => String(one.subgraph.id))) }
}

/** Replaces, says what it did. @param {import("./swap_text.js").Chosen | null} [chosen] null: in the whole workflow */
async function useLoaders(chosen = null) {
  const before = JSON.parse(JSON.stringify(rootGraph().serialize()))
  const { workflow, replaced, left } = swap(before, shapes(), chosen)
  if (replaced.length) await show(workflow)
  say(replaced, left)
}

/** What fresh nodes of all types look like here, whatever versions of ComfyUI and Tessera. */
function shapes() {
  const types = new Set(Object.entries(COUNTERPARTS).flat())
  return Object.fromEntries([...types].map((type) => [type, shape(type)]))
}

/** @param {string} type @returns {import("./swap_text.js").Shape} */
function shape(type) {
  const node = /** @type {any} */ (globalThis).LiteGraph.createNode(type)
  const { inputs = [], outputs = [], properties = {} } = JSON.parse(JSON.stringify(node.serialize()))
  const widgets = (node.widgets ?? []).filter((/** @type {any} */ widget) => widget.serialize !== false)
  const names = widgets.map((/** @type {any} */ widget) => widget.name)
  return { inputs, outputs, properties, widgets: names, values: widgets.map((/** @type {any} */ widget) => widget.value) }
}

/**
 * Puts a changed workflow in the place of the open one. It is what Redo would bring: so one Undo takes it back.
 * @param {any} workflow
 */
async function show(workflow) {
  const tracker = changeTracker()
  if (!tracker) return app.loadGraphData(workflow, false, false)
  lookForChanges(tracker)
  tracker.redoQueue.length = 0
  tracker.redoQueue.push(workflow)
  await tracker.redo()
  await frame()
  await frame() // nodes with more widgets have grown by now
  tracker.activeState = JSON.parse(JSON.stringify(rootGraph().serialize())) // else growing is a step
}

function frame() {
  return new Promise((drawn) => requestAnimationFrame(drawn))
}

/** @param {string[]} replaced @param {import("./swap_text.js").Left[]} left */
function say(replaced, left) {
  const lines = counted(replaced.map((type) => name(type))).map((text) => word("swap_done", "Replaced: {0}", text))
  const reasons = {
    unknown: word("swap_unknown", "Tessera has no node in its place"),
    pickle: word("swap_pickle", "Tessera opens LoRAs of type safetensors only"),
    slots: word("swap_slots", "it has a connected input that Tessera's node lacks"),
  }
  const stay = left.map(({ type, title, why }) => `${title || name(type)} (${reasons[why]})`)
  lines.push(...counted(stay).map((text) => word("swap_left", "Left as it is: {0}", text)))
  if (!lines.length) lines.push(word("swap_none", "There is no loader to replace."))
  const severity = replaced.length ? "success" : "info"
  app.extensionManager.toast.add({ severity, summary: title(), detail: lines.join("\n"), life: 8000 })
}

/** @param {string} type */
function name(type) {
  return /** @type {any} */ (globalThis).LiteGraph.registered_node_types[type]?.title ?? type
}

/** Equal texts once, with their number. @param {string[]} texts */
function counted(texts) {
  return [...new Set(texts)].map((text) => {
    const number = texts.filter((other) => other === text).length
    return number > 1 ? `${number} × ${text}` : text
  })
}
