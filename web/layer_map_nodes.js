// @ts-check
/** Puts the layer map into the nodes that show one. */
import { after } from "./dom.js"
import { api, app } from "./frontend.js"
import { layerMap } from "./layer_map.js"

const NODES = {
  TesseraDiffusionModelLoader: "Run to see what each layer is stored in and how it runs here.",
  TesseraCLIPLoader: "Run to see what each layer is stored in and how it runs here.",
  TesseraPlan: "Run to see what each layer would be packed in; then change it here, layer by layer.",
  TesseraInspect: "Run to see which kernel each layer runs by.",
}
const WIDE = 420 // pixels, the least a map is good in
/** @type {Set<(id: string, node: any) => any>} */
const failed = new Set()

app.registerExtension({
  name: "tessera.layerMap",
  setup() {
    api.addEventListener("execution_error", (/** @type {any} */ { detail }) => failed.forEach((hear) => hear(detail.node_id, detail)))
  },
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass in NODES) attach(node, /** @type {keyof typeof NODES} */ (node.comfyClass))
  },
})

/** @param {any} node @param {keyof typeof NODES} kind */
function attach(node, kind) {
  const view = layerMap({ onHeight: fit })
  view.say([NODES[kind]])
  node.addDOMWidget("map", "tessera_map", view.element, {
    serialize: false, hideInPanel: true, getMinHeight: () => view.height() + 12, margin: 6,
  }) // prettier-ignore

  /** Makes room for the map, and gives it back unless the user has made the node taller. */
  function fit() {
    if (!node.widgets?.some((/** @type {any} */ widget) => widget.name === "map")) return
    const [width, now] = node.size
    const wanted = node.computeSize()[1]
    if (now < wanted || now - fitted < 28) node.setSize([width, wanted])
    fitted = wanted
  }
  let fitted = Infinity

  function show(/** @type {any} */ payload) {
    if (node.size[0] < WIDE) node.setSize([WIDE, node.size[1]])
    view.show(payload)
  }
  after(node, "onExecuted", (output) => output?.tessera_map?.[0] && show(output.tessera_map[0]))
}
