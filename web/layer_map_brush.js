// @ts-check
/** The brush of an editable layer map: formats to paint layers with, undo, and the text that the edits are saved as. */
import { button, element, name } from "./dom.js"
import { FORMATS, family } from "./layer_map_colours.js"
import { bytes, percent } from "./layer_map_data.js"
import { apply, brushed, brushes, forecast, locked, planned, ranks, read, write } from "./layer_map_edits.js"
import { word } from "./translation.js"

const ERASER = "as planned"
const UNDO = 50 // strokes

/**
 * @param {import("./layer_map.js").Edits} edits
 * @param {{ redraw: (layers?: number[]) => void, say: (problems: string[], hint?: string) => void }} view
 */
export function brush(edits, view) {
  /** @type {import("./layer_map_data.js").LayerMap | null} */
  let map = null
  /** @type {Map<number, import("./layer_map_data.js").Option>} */
  let chosen = new Map()
  /** @type {string[]} */
  let others = []
  /** @type {string[]} texts before the last strokes */
  let history = []
  let inHand = "" // of the brush in hand
  /** @type {number | null} */
  let rank = null
  let asText = false
  let saved = "" // by us; another value comes from elsewhere
  let changed = false // by the stroke that is going on

  const tools = element("div", { className: "tools" })
  tools.dataset.part = "brushes"
  tools.setAttribute("role", "toolbar")
  tools.setAttribute("aria-label", word("map_brushes", "Paint layers with"))
  const area = element("textarea", { className: "text", spellcheck: false, placeholder: "layers.3.attention.qkv = mxfp8 r32" })
  name(area, "text", word("map_area", "The edits as text"))
  area.addEventListener("input", () => {
    save(area.value)
    look()
    view.redraw()
  })

  function load(/** @type {import("./layer_map_data.js").LayerMap | null} */ shown) {
    map = shown?.editable ? shown : null
    history = []
    inHand = ""
    rank = null
    look()
  }

  /** Reads the text into the layers. */
  function look() {
    saved = edits.get()
    if (!map) return
    const found = read(saved, map.layers)
    ;({ chosen, others } = found)
    apply(map.layers, chosen)
    if (!asText) area.value = saved
    view.say(found.problems, saved === map.edits ? "" : word("map_next_run", "Edits go into the recipe on the next run."))
    draw()
  }

  function save(/** @type {string} */ text) {
    if (text === saved) return
    history = [...history.slice(1 - UNDO), saved]
    saved = text
    edits.set(text)
  }

  function draw() {
    if (!map) return tools.replaceChildren()
    const undo = button(word("map_undo", "Undo"), "undo", word("map_undo_long", "Take the last stroke back"), () => {
      const before = history.pop()
      if (before === undefined) return
      edits.set(before)
      look()
      view.redraw()
    })
    const reset = button(word("map_reset", "Reset"), "reset", word("map_reset_long", "As planned: remove all edits"), () => {
      save(others.filter((line) => line.trim().startsWith("#")).join("\n"))
      look()
      view.redraw()
    })
    const text = button(word("map_text", "Text"), "mode", word("map_text_long", "Show the edits as text"), () => {
      asText = !asText
      area.value = edits.get()
      draw()
      view.redraw([])
      if (asText) area.focus()
    })
    text.setAttribute("aria-pressed", String(asText))
    undo.disabled = !history.length
    reset.disabled = !chosen.size
    const held = document.activeElement instanceof HTMLElement && tools.contains(document.activeElement) ? document.activeElement.dataset.part : ""
    tools.replaceChildren(
      element("span", { className: "quiet", textContent: word("map_paint", "Paint") }),
      ...brushes(map.layers).map((format) => brushButton(format)),
      brushButton(ERASER),
      ...rankField(),
      element("span", { className: "push" }, [undo, reset, text]),
      ...(asText ? [area] : []),
    )
    const again = held ? tools.querySelector(`[data-part="${held}"]`) : null
    if (again instanceof HTMLElement) again.focus()
  }

  function brushButton(/** @type {string} */ format) {
    const kind = format === ERASER ? "none" : `f-${family(format)}`
    const mark = format === ERASER ? "↺" : FORMATS[family(format)][1]
    const label = format === ERASER ? word("map_erase", "Remove edits: as planned") : word("map_paint_with", "Paint layers with {0}", format)
    const made = button("", `brush-${format.replace(" ", "-")}`, label, () => hold(inHand === format ? "" : format))
    made.replaceChildren(element("span", { className: `swatch ${kind}`, textContent: mark }), format === ERASER ? word("map_as_planned", "as planned") : format)
    made.classList.add("brush")
    made.setAttribute("aria-pressed", String(inHand === format))
    return made
  }

  function rankField() {
    const all = map ? ranks(map.layers) : []
    if (all.length < 2) return []
    const choices = [["", word("map_own_rank", "own rank")], ...all.map((one) => [String(one), one ? word("map_rank", "rank {0}", one) : word("map_no_rank", "no correction")])]
    const select = element("select", { title: word("map_rank_long", "Rank of the correction that painted layers get") })
    select.append(...choices.map(([value, textContent]) => element("option", { value, textContent })))
    select.value = rank === null ? "" : String(rank)
    select.addEventListener("change", () => (rank = select.value === "" ? null : Number(select.value)))
    return [name(select, "rank", word("map_rank_field", "Rank of painted layers"))]
  }

  function hold(/** @type {string} */ format) {
    inHand = format
    draw()
    view.redraw([])
  }

  /** Paints layers, or with `erase` gives them back what was planned. @param {number[]} indices @param {boolean} erase */
  function paint(indices, erase) {
    if (!map) return
    const done = []
    for (const index of indices) {
      const layer = map.layers[index]
      const wanted = erase || inHand === ERASER ? planned(layer) : brushed(layer, inHand, rank)
      if (!wanted || wanted === (chosen.get(index) ?? planned(layer))) continue
      if (wanted === planned(layer)) chosen.delete(index)
      else chosen.set(index, wanted)
      done.push(index)
    }
    if (!done.length) return
    changed = true
    apply(map.layers, chosen)
    view.redraw(done)
  }

  /** The end of a stroke: it is written, and can be undone as one. */
  function end() {
    if (!map || !changed) return
    changed = false
    save(write(map.layers, chosen, others))
    look()
  }

  /** Facts with what the edits change about them. @returns {[string, string, string][]} */
  function facts() {
    if (!map) return []
    const { now, plan } = forecast(map, chosen)
    const signed = (/** @type {number} */ change, /** @type {string} */ text) => (change ? `${change > 0 ? "+" : "−"}${text}` : "")
    const known = Object.fromEntries(map.facts)
    const wide = forecast(map, read(map.edits, map.layers).chosen).now.nbytes / (parseFloat(known["bits per weight"]) || Infinity)
    const bits = [now, plan].map(({ nbytes }) => nbytes / wide)
    const rows = map.facts.map(([label, value]) => {
      if (label === "size") return [label, bytes(now.nbytes), signed(now.nbytes - plan.nbytes, bytes(Math.abs(now.nbytes - plan.nbytes)))]
      if (label === "bits per weight") return [label, bits[0].toFixed(2), signed(bits[0] - bits[1], Math.abs(bits[0] - bits[1]).toFixed(2))]
      if (label === "expected error") return [label, percent(now.error), signed(now.error - plan.error, percent(Math.abs(now.error - plan.error)))]
      return [label, value, ""]
    })
    return /** @type {[string, string, string][]} */ (rows.filter(([label]) => label !== "edited")) // the legend says so
  }

  /** Why a layer cannot be painted with the brush in hand; nothing if it can. @param {number} index */
  function refusal(index) {
    const layer = map?.layers[index]
    if (!layer) return ""
    if (locked(layer)) return word("map_locked", "Cannot be changed: {0}", layer.reason.replace(/^kept: /, "") || word("map_no_other", "no other format fits its shape"))
    if (inHand && inHand !== ERASER && !brushed(layer, inHand, rank)) return word("map_refused", "Cannot be {0}: its shape does not fit, or the plan did not measure it", inHand)
    return ""
  }

  return {
    tools, load, paint, end, facts, refusal,
    look: () => edits.get() !== saved && look(),
    held: () => inHand,
    drop: () => inHand && hold(""),
    fixed: (/** @type {number} */ index) => Boolean(map && locked(map.layers[index])),
  } // prettier-ignore
}
