// @ts-check
/** Puts the layer map into the nodes that show one. */
import { after, roomFor } from "./dom.js"
import { api, app, nodeAt } from "./frontend.js"
import { layerMap } from "./layer_map.js"
import { remount } from "./remount.js"
import { word } from "./words.js"

const LOADER = () => word("map_run_loader", "Run to see its layers.")
/** What a map says before there is one, in a line. */
const NODES = {
  TesseraDiffusionModelLoader: LOADER,
  TesseraCLIPLoader: LOADER,
  TesseraPlan: () => word("map_run_plan", "Run to see and change what each layer becomes."),
  TesseraInspect: () => word("map_run_inspect", "Run to see how each layer runs."),
}
const WIDE = 460 // pixels, the least a map is good in
const TALL = 330 // about, of a map
const FOLDED = "Layer map folded" // property of a node, once its user has said so
/** @type {Map<any, { fail: (message: string) => void, start: () => void, look: () => void,
 *   cached: (id: string) => void }>} by node */
const maps = new Map()

app.registerExtension({
  name: "tessera.layerMap",
  setup() {
    api.addEventListener("execution_error", (/** @type {any} */ { detail }) => {
      maps.get(nodeAt(detail.node_id))?.fail(detail.exception_message?.trim() || detail.exception_type)
    })
    api.addEventListener("execution_cached", (/** @type {any} */ { detail }) => {
      detail.nodes?.forEach((/** @type {any} */ id) => maps.get(nodeAt(id))?.cached(id))
    })
    api.addEventListener("execution_start", () => maps.forEach((map) => map.start()))
  },
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass in NODES) attach(node, /** @type {keyof typeof NODES} */ (node.comfyClass))
  },
  /** Another workflow has come to the front, with what its nodes have made. */
  onNodeOutputsUpdated() {
    maps.forEach((map) => map.look())
  },
})

/** @type {Map<string, any>} by workflow and node: nodes are made anew when another workflow comes to the front, and on undo */
const memory = new Map()

/** @param {any} node */
function key(node) {
  return `${node.graph?.id}/${node.id}`
}

/** What a node has last made, by the frontend's memory or ours. @param {any} node */
function remembered(node) {
  const outer = node.graph?.rootGraph ?? node.graph
  const id = !node.graph || outer === node.graph ? node.id : `${node.graph.id}:${node.id}`
  return app.nodeOutputs?.[id]?.tessera_map?.[0] ?? memory.get(key(node))
}

/** Whether a node that grows so would cover no other. @param {any} node @param {number} width @param {number} height */
function hasRoom(node, width, height) {
  const [x, y] = node.pos
  const covered = (/** @type {any} */ other) => {
    const [[left, top], [wide, high]] = [other.pos, other.size]
    return left < x + width && left + wide > x && top - 30 < y + height && top + high > y // 30: a title
  }
  return !node.graph?.nodes?.some((/** @type {any} */ other) => other !== node && covered(other))
}

/** What the server remembers of a node that it need not run again; a page that was reloaded has forgotten. @param {string} id @param {string} kind */
async function fromHistory(id, kind) {
  const answer = await api.fetchApi("/history?max_items=20")
  const entries = Object.values(answer.ok ? await answer.json() : {})
  const made = entries.filter((entry) => entry.prompt?.[2]?.[id]?.class_type === kind && entry.outputs?.[id]?.tessera_map)
  return made.at(-1)?.outputs[id].tessera_map[0]
}

/** @param {any} node @param {keyof typeof NODES} kind */
function attach(node, kind) {
  const text = node.widgets?.find((/** @type {any} */ widget) => widget.name === "edits")
  /** @type {any} */
  let shown = null
  let failed = false
  const editable = text && {
    get: () => String(text.value ?? ""),
    set: (/** @type {string} */ value) => {
      text.value = value
      node.graph?.setDirtyCanvas(true, true)
    },
  }
  const view = layerMap({ editable, onHeight: roomFor(node, "map"), width: () => node.size[0] - 24, onFold: fold })

  function show(/** @type {any} */ payload) {
    if (!open) arrange() // one that is open stays so
    shown = payload
    memory.set(key(node), payload)
    failed = false
    view.show(payload)
    say()
  }

  /** Folds a map as its user has last said, else a loader's where it would cover another node. */
  function arrange() {
    const [width, height] = [Math.max(node.size[0], WIDE), Math.max(node.size[1], node.computeSize()[1] + TALL)]
    const folded = node.properties?.[FOLDED] ?? (kind.endsWith("Loader") && !hasRoom(node, width, height))
    if (!folded) widen()
    view.fold(folded)
    open = !folded
  }
  let open = false

  function widen() {
    if (node.size[0] < WIDE) node.setSize([WIDE, node.size[1]])
  }

  function fold(/** @type {boolean} */ folded) {
    node.setProperty(FOLDED, folded)
    open = !folded
    if (!folded) widen()
  }

  /** What there is to say besides the map. */
  function say() {
    if (failed) return
    const linked = node.inputs?.some((/** @type {any} */ slot) => slot.name === "edits" && slot.link != null)
    if (linked) view.say([word("map_linked", "The edits come from the connected node; what is painted here is not used.")])
    else view.say(shown ? [] : [NODES[kind]()])
  }

  function look() {
    const payload = remembered(node)
    if (payload && payload !== shown) show(payload)
    view.look()
  }

  maps.set(node, {
    look,
    fail(/** @type {string} */ message) {
      failed = true
      view.say([message], "error")
    },
    async cached(/** @type {string} */ id) {
      const payload = shown ? null : await fromHistory(id, kind)
      if (payload && !shown) show(payload)
    },
    start() {
      if (!failed) return
      failed = false
      say()
    },
  })
  if (text) {
    text.hidden = text.options.hidden = true // in LiteGraph, in Nodes 2.0
    after(text, "callback", view.look)
  }
  node.addDOMWidget("map", "tessera_map", view.element, {
    serialize: false, hideInPanel: true, getMinHeight: () => view.height() + (shown ? 12 : 0), margin: 6, // the host adds 12
  }) // prettier-ignore
  after(node, "onExecuted", (output) => output?.tessera_map?.[0] && show(output.tessera_map[0]))
  after(node, "onConfigure", () => {
    queueMicrotask(look) // when all nodes of the workflow have their places, which say whether there is room
    remount(node, view.element)
  })
  after(node, "onConnectionsChange", say)
  after(node, "onRemoved", () => maps.delete(node))
  say()
}
