// @ts-check
/** LoRA Stack (Tessera): rows over the text widget `stack`, which stays the value that is saved and sent. */
import { addStyle, after, button, element, keepInside, name, roomFor } from "./dom.js"
import { app } from "./frontend.js"
import { LIMIT, format, move, parse, strength } from "./lora_stack_text.js"
import { remount } from "./remount.js"
import { word } from "./words.js"

const NODE = "TesseraLoRAStack"
const ROW = 28 // pixels
/** @type {string[]} files in models/loras, as the host lists them for TesseraLoRA */
let files = []
/** @type {Set<() => void>} what draws each stack that is on a canvas */
const drawn = new Set()

app.registerExtension({
  name: "tessera.loraStack",
  setup() {
    addStyle("tessera-stack-style", STYLE)
  },
  beforeRegisterNodeDef(/** @type {any} */ _type, /** @type {any} */ definition) {
    if (definition.name === "TesseraLoRA") files = choices(definition)
  },
  refreshComboInNodes(/** @type {any} */ definitions) {
    files = choices(definitions.TesseraLoRA)
    drawn.forEach((draw) => draw())
  },
  nodeCreated(/** @type {any} */ node) {
    if (node.comfyClass === NODE) attach(node)
  },
})

/** @param {any} definition @returns {string[]} */
function choices(definition) {
  const [kind, options] = definition?.input?.required?.lora_name ?? [[]]
  return Array.isArray(kind) ? kind : (options?.options ?? [])
}

/** Puts the rows of a node over its text. @param {any} node */
function attach(node) {
  const text = node.widgets.find((/** @type {any} */ widget) => widget.name === "stack")
  const root = element("div", { className: "tessera-stack" })
  root.dataset.part = "lora-stack"
  const fit = roomFor(node, "rows")
  let rows = parse(text.value)
  let asText = false
  let saved = text.value // by us; another value comes from elsewhere, e.g. a loaded workflow

  /** @param {typeof rows} changed @param {[number, string]} [focus] row and part that has the keyboard afterwards */
  function change(changed, focus) {
    rows = changed
    save()
    draw(focus)
  }

  function save() {
    saved = format(rows)
    text.value = saved
    node.graph?.setDirtyCanvas(true, true)
  }

  /** @param {[number, string]} [focus] */
  function draw(focus) {
    const linked = node.inputs?.find((/** @type {any} */ slot) => slot.name === "stack")?.link != null
    if (linked) root.replaceChildren(element("p", { textContent: word("stack_linked", "The stack comes from the connected node.") }))
    else if (asText) root.replaceChildren(editor(), footer())
    else root.replaceChildren(...(titled() ? [head()] : []), list(), footer())
    fit()
    if (focus) at(...focus)?.focus()
  }

  /** A row's part; where it cannot have the keyboard, another. @param {number} row @param {string} part */
  function at(row, part) {
    const parts = [...(root.querySelectorAll("li")[row]?.querySelectorAll("[data-part]:not(:disabled)") ?? [])]
    const found = parts.find((control) => control instanceof HTMLElement && control.dataset.part === part)
    return /** @type {HTMLElement | null} */ (found ?? parts.at(-1) ?? control(".add"))
  }

  /** @param {string} selector @returns {HTMLElement | null} */
  function control(selector) {
    return root.querySelector(selector)
  }

  function height() {
    return (asText ? 6 : rows.length + Number(titled())) * ROW + ROW + 12
  }

  function titled() {
    return rows.some((row) => "name" in row)
  }

  function head() {
    const titles = ["", "", "LoRA", word("stack_model", "model"), word("stack_clip", "clip")].map((title) => element("span", { textContent: title }))
    return element("div", { className: "head" }, titles)
  }

  function list() {
    const items = rows.map((row, index) => ("note" in row ? noteItem(row, index) : loraItem(row, index)))
    return element("ol", {}, items)
  }

  /** @param {import("./lora_stack_text.js").Note} row @param {number} index */
  function noteItem(row, index) {
    return item(index, row.note, [element("span", { className: "note", textContent: row.note, title: row.note })], true)
  }

  /** @param {import("./lora_stack_text.js").LoRA} row @param {number} index */
  function loraItem(row, index) {
    const on = element("input", { type: "checkbox", checked: row.on, title: word("stack_on", "On or muted") })
    name(on, "on", `${row.name}: on`)
    on.addEventListener("change", () => change(rows.with(index, { ...row, on: on.checked }), [index, "on"]))
    const item_ = item(index, row.name, [on, fileField(row, index), field(row, "model"), field(row, "clip")])
    item_.classList.toggle("off", !row.on)
    return item_
  }

  /** @param {import("./lora_stack_text.js").LoRA} row @param {number} index */
  function fileField(row, index) {
    const missing = !files.includes(row.name)
    const names = missing ? [row.name, ...files] : files
    const options = names.map((file) => element("option", { value: file, textContent: file }))
    const select = element("select", { title: missing ? word("stack_missing", "{0}: not in models/loras", row.name) : row.name }, options)
    name(select, "file", word("stack_file", "LoRA file"))
    select.value = row.name
    select.setAttribute("aria-invalid", String(missing))
    select.addEventListener("change", () => change(rows.with(index, { ...row, name: select.value }), [index, "file"]))
    return select
  }

  /** A strength; typing keeps the field, so only the text is written. @param {any} row @param {"model" | "clip"} part */
  function field(row, part) {
    const input = element("input", { type: "number", min: String(-LIMIT), max: String(LIMIT), step: "0.05" })
    const title =
      part === "model"
        ? word("stack_strength_model", "Strength of the diffusion model")
        : word("stack_strength_clip", "Strength of the text encoder; empty: as the model")
    name(input, part, `${row.name}: ${title}`)
    input.title = title
    input.placeholder = part === "clip" ? "=" : ""
    input.value = row[part] ?? ""
    input.addEventListener("input", () => {
      const value = strength(input.value)
      if (value === null && (part === "model" || input.validity.badInput)) return
      row[part] = value
      save()
    })
    input.addEventListener("change", () => (input.value = row[part] ?? ""))
    return input
  }

  /** @param {number} index @param {string} label @param {HTMLElement[]} parts @param {boolean} [wide] */
  function item(index, label, parts, wide) {
    const last = rows.length - 1
    const up = button("▴", "up", word("stack_up", "{0}: move up", label), () => change(move(rows, index, index - 1), [index - 1, "up"]))
    const down = button("▾", "down", word("stack_down", "{0}: move down", label), () => change(move(rows, index, index + 1), [index + 1, "down"]))
    const remove = button("✕", "remove", word("stack_remove", "{0}: remove", label), () => {
      change(rows.toSpliced(index, 1), [Math.min(index, last - 1), "remove"])
    })
    up.disabled = index === 0
    down.disabled = index === last
    const made = element("li", { className: wide ? "wide" : "" }, [handle(index), ...parts, up, down, remove])
    made.addEventListener("keydown", (event) => {
      const to = index + ({ ArrowUp: -1, ArrowDown: 1 }[event.key] ?? 0)
      if (!event.altKey || to === index || to < 0 || to > last) return
      event.preventDefault()
      const part = event.target instanceof HTMLElement ? (event.target.dataset.part ?? "on") : "on"
      change(move(rows, index, to), [to, part])
    })
    return made
  }

  /** Dragging: the row goes wherever the pointer is, and stays there. @param {number} from */
  function handle(from) {
    const grip = element("span", { className: "grip", textContent: "⠿", title: word("stack_drag", "Drag to reorder; keyboard: Alt + arrow") })
    grip.addEventListener("pointerdown", (down) => {
      down.preventDefault()
      down.stopPropagation()
      let place = from
      /** @param {PointerEvent} event */
      const drag = (event) => {
        const items = [...root.querySelectorAll("li")]
        const below = items.findIndex((item) => event.clientY < item.getBoundingClientRect().bottom)
        const to = below < 0 ? items.length - 1 : below
        if (to !== place) change(move(rows, place, to))
        place = to
        root.querySelectorAll("li")[place]?.classList.add("dragged")
      }
      const end = () => {
        window.removeEventListener("pointermove", drag, true)
        draw()
      }
      window.addEventListener("pointermove", drag, true)
      window.addEventListener("pointerup", end, { capture: true, once: true })
    })
    return grip
  }

  function footer() {
    const mode = button(asText ? word("stack_rows", "Rows") : word("stack_text", "Text"), "mode", word("stack_mode", "Edit the stack as text or as rows"), () => {
      asText = !asText
      draw()
      control(asText ? "textarea" : ".add")?.focus()
    })
    return element("div", { className: "foot" }, asText ? [mode] : [...adder(), mode])
  }

  /** A search field over the files; choosing one, or Enter on the only one that fits, adds it. */
  function adder() {
    const found = element("datalist", { id: `tessera-loras-${node.id}-${++lists}` })
    found.append(...files.map((file) => element("option", { value: file })))
    const input = element("input", { className: "add", placeholder: word("stack_adder", "Add a LoRA: type or choose") })
    input.setAttribute("list", found.id)
    name(input, "add", word("stack_add", "Add a LoRA"))
    const add = (/** @type {string} */ file) => {
      change([...rows, { on: true, name: file, model: 1, clip: null }])
      control(".add")?.focus()
    }
    input.addEventListener("input", () => files.includes(input.value) && add(input.value))
    input.addEventListener("keydown", (event) => {
      const fitting = files.filter((file) => file.toLowerCase().includes(input.value.toLowerCase()))
      if (event.key === "Enter" && input.value && fitting.length) add(fitting[0])
    })
    return [input, found]
  }

  function editor() {
    const area = element("textarea", { value: text.value, spellcheck: false, placeholder: "name.safetensors : 0.8" })
    area.setAttribute("aria-label", word("stack_area", "The stack as text"))
    area.addEventListener("input", () => {
      text.value = saved = area.value
      rows = parse(area.value)
    })
    return area
  }

  function read() {
    saved = text.value
    rows = parse(text.value)
    draw()
  }

  text.hidden = text.options.hidden = true // in LiteGraph, in Nodes 2.0
  const options = { serialize: false, hideInPanel: true, getMinHeight: height, getHeight: height, margin: 6 }
  node.addDOMWidget("rows", "tessera_stack", root, options)
  keepInside(root)
  after(text, "callback", () => text.value !== saved && read())
  after(node, "onConfigure", () => {
    read()
    remount(node, root)
  })
  after(node, "onConnectionsChange", read)
  after(node, "onRemoved", () => drawn.delete(read))
  drawn.add(read)
  if (node.size[0] < 460) node.setSize([460, node.size[1]])
  draw()
}

let lists = 0 // datalists made, for their ids

const STYLE = `
.tessera-stack { display: flex; flex-direction: column; gap: 2px; width: 100%; box-sizing: border-box;
  font: 12px Inter, Arial, sans-serif; color: var(--input-text, #ddd); }
.tessera-stack ol { list-style: none; margin: 0; padding: 0; }
.tessera-stack li, .tessera-stack .head { display: grid; grid-template-columns: 14px 18px 1fr 58px 58px 20px 20px 20px; gap: 4px;
  align-items: center; height: ${ROW}px; }
.tessera-stack li.wide { grid-template-columns: 14px 1fr 20px 20px 20px; }
.tessera-stack .head, .tessera-stack .note, .tessera-stack p { color: var(--descrip-text, #999); font-size: 11px; margin: 0; }
.tessera-stack .note { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; font-style: italic; }
.tessera-stack li.off select, .tessera-stack li.off input[type="number"] { opacity: 0.45; }
.tessera-stack li.dragged { outline: 1px solid var(--p-primary-color, #4a90e2); border-radius: 4px; }
.tessera-stack .grip { cursor: grab; touch-action: none; color: var(--descrip-text, #999); text-align: center; }
.tessera-stack input, .tessera-stack select, .tessera-stack textarea, .tessera-stack button { min-width: 0; box-sizing: border-box;
  height: 22px; margin: 0; padding: 0 6px; border: 1px solid var(--border-color, #4e4e4e); border-radius: 4px;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: inherit; }
.tessera-stack input[type="checkbox"] { width: 14px; height: 14px; padding: 0; accent-color: var(--p-primary-color, #4a90e2); }
.tessera-stack select { padding-right: 2px; text-overflow: ellipsis; }
.tessera-stack select[aria-invalid="true"] { border-color: var(--error-text, #ff4444); color: var(--error-text, #ff4444); }
.tessera-stack button { padding: 0; cursor: pointer; }
.tessera-stack button:disabled { opacity: 0.3; cursor: default; }
.tessera-stack :is(input, select, textarea, button):focus-visible { outline: 2px solid var(--p-primary-color, #4a90e2); outline-offset: 0; }
.tessera-stack .foot { display: flex; gap: 4px; margin-top: 4px; }
.tessera-stack .foot .add { flex: 1; }
.tessera-stack .foot button { padding: 0 8px; margin-left: auto; }
.tessera-stack textarea { width: 100%; height: ${6 * ROW - 4}px; padding: 4px 6px; resize: none; font-family: monospace; }
`
