// @ts-check
/** What went wrong in a Tessera node is said in the node, not only in a dialog; gone when something runs again. */
import { addStyle, after, element, keepInside } from "./dom.js"
import { api, app, nodeAt } from "./frontend.js"

/** Nodes whose layer map says it. */
const MAPS = /^Tessera(DiffusionModelLoader|CLIPLoader|Plan|Inspect)$/
const HEIGHT = 74
/** @type {Map<any, { show: (text: string) => void }>} views of nodes that have failed before */
const views = new Map()

app.registerExtension({
  name: "tessera.errors",
  setup() {
    addStyle("tessera-error-style", STYLE)
    api.addEventListener("execution_error", (/** @type {any} */ { detail }) => {
      if (!/^Tessera/.test(detail.node_type) || MAPS.test(detail.node_type)) return
      const node = nodeAt(detail.node_id)
      const message = detail.exception_message?.trim() || detail.exception_type
      if (node && !says(node, message)) view(node).show(message)
    })
    api.addEventListener("execution_start", () => views.forEach(({ show }) => show("")))
  },
})

/** Whether another part of the node says so already, as a job that failed does. @param {any} node @param {string} message */
function says(node, message) {
  return node.widgets?.some((/** @type {any} */ widget) => widget.name !== "error" && widget.element?.textContent.includes(message))
}

/** A node's place for a message, made when it first has one. @param {any} node */
function view(node) {
  const known = views.get(node)
  if (known) return known
  const line = element("div", { className: "tessera-error" })
  line.setAttribute("role", "alert")
  keepInside(line)
  const height = () => (line.textContent ? HEIGHT : 0)
  const options = { serialize: false, hideInPanel: true, getMinHeight: height, getHeight: height, margin: 6 }
  const widget = node.addDOMWidget("error", "tessera_error", line, options)
  const before = [...node.size]
  const made = {
    show(/** @type {string} */ text) {
      if (text === line.textContent) return
      line.textContent = text
      line.hidden = widget.hidden = widget.options.hidden = !text // in Nodes 2.0, in LiteGraph
      node.setSize([node.size[0], text ? Math.max(node.size[1], node.computeSize()[1]) : before[1]])
      node.graph?.setDirtyCanvas(true, true)
    },
  }
  views.set(node, made)
  after(node, "onRemoved", () => views.delete(node))
  return made
}

const STYLE = `
.tessera-error { box-sizing: border-box; width: 100%; max-height: ${HEIGHT}px; overflow: auto; padding: 4px 6px;
  font: 12px Inter, Arial, sans-serif; white-space: pre-wrap; overflow-wrap: anywhere; user-select: text;
  color: var(--error-text, #ff4444); border-left: 3px solid var(--error-text, #ff4444);
  background: var(--comfy-input-bg, #222); border-radius: 2px; }
.tessera-error[hidden] { display: none; }
`
