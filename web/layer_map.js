// @ts-check
/** The layer map: what each layer of a model is stored in, what that costs and how it runs, to look at and, in a plan, to paint. */
import { addStyle, button, element, keepInside, name } from "./dom.js"
import { brush } from "./layer_map_brush.js"
import { schemes } from "./layer_map_colours.js"
import { called, costliest, describe, parse, percent } from "./layer_map_data.js"
import { tileGrid } from "./layer_map_grid.js"
import { STYLE } from "./layer_map_style.js"
import { word } from "./translation.js"

/**
 * @typedef {{ get: () => string, set: (text: string) => void }} Edits
 * @typedef {import("./layer_map_data.js").Layer} Layer
 * `width` is the map's while it is not on the page; with `onFold` it can be folded to its facts.
 * @param {{ editable?: Edits, onHeight?: () => void, width?: () => number, onFold?: (folded: boolean) => void }} [options]
 */
export function layerMap({ editable, onHeight = () => {}, width: guess = () => 440, onFold } = {}) {
  addStyle("tessera-map-style", STYLE)
  const [message, facts, bar, legend, details, notes] = ["p", "dl", "div", "div", "div", "p"].map((tag) => document.createElement(tag))
  for (const [part, made] of Object.entries({ message, facts, bar, legend, details, notes })) made.className = made.dataset.part = part
  const grid = tileGrid({ point: tell, stroke, end: () => editor?.end(), escape: () => editor?.drop() })
  const editor = editable && brush(editable, { redraw, say: note })
  const inner = element("div", { className: "inner" })
  const root = keepInside(element("div", { className: "tessera-map" }, [inner]))
  root.dataset.part = "layer-map"
  const group = `tessera-map-${++made}`

  /** @type {import("./layer_map_data.js").LayerMap | null} */
  let map = null
  /** @type {import("./layer_map_colours.js").Scheme[]} */
  let ways = []
  let by = "format"
  let width = 0
  let high = 20 // of a line
  let folded = false

  /** @param {any} payload as in tiles.py; null: nothing is known yet */
  function show(payload) {
    map = payload ? parse(payload) : null
    grid.show(map ? map.layers.map((layer) => layer.name) : [])
    editor?.load(map)
    message.textContent = ""
    arrangeParts()
    if (map) {
      recolour()
      place()
      tell(null)
    }
    measure()
  }

  function arrangeParts() {
    const paints = Boolean(editor && map?.editable)
    const parts = [bar, ...(paints && editor ? [editor.tools] : []), grid.element, legend, notes, details]
    const shown = map ? [facts, ...(folded ? [] : parts)] : []
    inner.replaceChildren(...(message.textContent ? [message] : []), ...shown) // what grows under the brush is below it
    inner.classList.toggle("editable", paints)
  }

  /** A sentence instead of the map, or above it. @param {string[]} words @param {"error" | "note"} tone */
  function say(words, tone = "note") {
    message.textContent = words.join("\n")
    message.classList.toggle("error", tone === "error")
    message.setAttribute("role", tone === "error" ? "alert" : "status")
    arrangeParts()
    measure()
  }

  /** @param {string[]} problems @param {string} [hint] */
  function note(problems, hint = "") {
    notes.textContent = problems.join("\n") || hint
    notes.classList.toggle("error", problems.length > 0)
    notes.hidden = !notes.textContent
  }

  /** What the layers are coloured by: choices, legend, tiles. @param {number[]} [only] */
  function recolour(only) {
    if (!map) return
    const before = JSON.stringify(ways.find((one) => one.id === by)?.scale)
    const ids = ways.map((one) => one.id).join()
    ways = schemes(map)
    if (!ways.some((one) => one.id === by)) by = "format"
    drawFacts()
    if (ways.map((one) => one.id).join() !== ids || !only) drawChoices()
    drawLegend()
    paint(JSON.stringify(way().scale) === before ? only : undefined)
  }

  function way() {
    return ways.find((one) => one.id === by) ?? ways[0]
  }

  function drawFacts() {
    const rows = editor && map?.editable ? editor.facts() : (map?.facts ?? []).map(([label, value]) => [label, value, ""])
    const shown = rows.map(([label, value, change]) => {
      const [said, labelled] = [element("dd", { textContent: value, title: value }), element("dt", { textContent: called(label) })]
      const meaning = word("map_change", "compared with the plan before edits")
      if (change) labelled.append(element("b", { textContent: change, title: meaning }))
      said.dataset.part = `fact-${label.replaceAll(" ", "-")}`
      return element("div", {}, [labelled, said])
    })
    facts.replaceChildren(...shown, ...(onFold ? [folder(onFold)] : []))
  }

  /** @param {(folded: boolean) => void} hear */
  function folder(hear) {
    const made = button(`${word("job_layers", "Layers")} ${folded ? "▸" : "▾"}`, "fold", folded ? word("map_unfold", "Show the layers") : word("map_fold", "Hide the layers"), () => {
      hear(!folded)
      fold(!folded)
      facts.querySelector("button")?.focus()
    })
    made.setAttribute("aria-expanded", String(!folded))
    return made
  }

  /** Leaves only the facts, or shows the layers again. @param {boolean} on */
  function fold(on) {
    if (on === folded) return
    folded = on
    arrangeParts()
    drawFacts()
    measure()
  }

  function drawChoices() {
    const choices = name(element("span", { className: "by" }), "by", word("map_by", "Colour by"))
    choices.setAttribute("role", "radiogroup")
    const labels = ways.map((one) => {
      const radio = element("input", { type: "radio", name: group, value: one.id, checked: one.id === by })
      return element("label", {}, [name(radio, `by-${one.id}`, word("map_by_one", "Colour by {0}", one.label.toLowerCase())), one.label])
    })
    choices.append(...labels)
    bar.replaceChildren(element("span", { className: "quiet", textContent: word("map_colour", "Colour") }), choices)
    bar.hidden = ways.length < 2
  }

  function drawLegend() {
    const { entries, scale } = way()
    const shown = entries.map(({ style, mark, label, count, key }) => entry(style, mark, label, count, key))
    if (scale) {
      const ramp = element("span", { className: "ramp" })
      shown.push(element("span", { className: "entry" }, [scale.low, ramp, scale.high, scale.log ? word("map_log", "(logarithmic)") : ""]))
      if (scale.none) shown.push(entry("none", "", word("map_unknown", "unknown"), scale.none, "none"))
    }
    const [branches, edited] = [map?.layers.filter((layer) => layer.rank), map?.layers.filter((layer) => layer.edited)]
    if (branches?.length) shown.push(entry("branch", "", word("map_corrected", "with a correction"), branches.length, "branch"))
    if (edited?.length) shown.push(entry("edited", "", word("map_edited", "edited"), edited.length, "edited"))
    legend.replaceChildren(...shown)
  }

  /** @param {string} style @param {string} mark @param {string} label @param {number} count @param {string} key */
  function entry(style, mark, label, count, key) {
    const swatch = element("span", { className: `swatch ${style}`, textContent: mark })
    const number = element("b", { textContent: String(count) })
    const made = element("span", { className: "entry" }, [swatch, element("span", { textContent: label }), number])
    made.dataset.part = "legend-entry"
    made.dataset.key = key
    return made
  }

  function place() {
    if (map && grid.place(width || guess())) paint()
  }

  /** @param {Iterable<number>} [only] */
  function paint(only = grid.tiles().keys()) {
    if (!map) return
    const { of } = way()
    const tiles = grid.tiles()
    for (const index of only) {
      const [layer, made] = [map.layers[index], tiles[index]]
      if (!layer || !made) continue
      const [style, mark] = of(layer)
      const marks = [layer.rank && "branch", layer.edited && "edited", editor?.fixed(index) && "fixed", layer.state, made.classList.contains("gathered") && "gathered"]
      made.className = ["tile", style, ...marks].filter(Boolean).join(" ")
      made.textContent = mark
      made.setAttribute("aria-label", `${layer.name}: ${describe(layer, map).lines.join("; ")}`)
    }
  }

  /** After edits: these layers, or all, look different. @param {number[]} [only] */
  function redraw(only) {
    if (only?.length !== 0) recolour(only)
    grid.element.classList.toggle("painting", Boolean(editor?.held()))
    measure()
  }

  /** @param {number[]} layers @param {boolean} erase */
  function stroke(layers, erase) {
    if (!editor || !map?.editable || (!erase && !editor.held())) return false
    editor.paint(layers, erase)
    if (layers.length === 1) tell(layers[0])
    return true
  }

  /** @param {number | null} index */
  function tell(index) {
    const layer = index === null ? null : map?.layers[index]
    if (!map) return
    if (!layer) return details.replaceChildren(...idle(map))
    const { name, lines } = describe(layer, map)
    const refusal = editor?.refusal(layer.index)
    const told = refusal ? [...lines.filter((line) => !layer.reason || !line.includes(layer.reason)), refusal] : lines
    details.replaceChildren(
      element("div", { className: "name", textContent: name, title: name }),
      ...told.map((text, n) => element("div", { className: n === told.length - 1 ? "last" : "", textContent: text, title: text })),
    )
  }

  /** What is worth knowing while nothing is pointed at. @param {import("./layer_map_data.js").LayerMap} map */
  function idle(map) {
    const worst = costliest(map, 3).map((layer) => {
      const share = element("b", { textContent: percent(layer.corrected ?? layer.error ?? 0) })
      return element("div", {}, [share, ` ${layer.name}`])
    })
    const hint = element("div", { className: "last", textContent: editor && map.editable ? paintHint() : readHint() })
    return worst.length > 1 ? [element("div", { textContent: word("map_largest", "Largest {0}:", called(map.measure)) }), ...worst.slice(0, editor && map.editable ? 2 : 3), hint] : [hint]
  }

  /** One layer has changed, for instance as a job has done it. @param {string} layerName @param {Partial<Layer>} values */
  function tile(layerName, values) {
    const layer = map?.layers.find((one) => one.name === layerName)
    if (!layer) return
    Object.assign(layer, { state: "" }, values)
    const weights = layer.shape.reduce((product, size) => product * size, 1)
    if (values.nbytes && values.bits === undefined) layer.bits = (8 * values.nbytes) / weights
    recolour([layer.index])
  }

  function measure() {
    const now = inner.offsetHeight || high
    if (now === high) return
    high = now
    onHeight()
  }

  bar.addEventListener("change", (event) => {
    if (!(event.target instanceof HTMLInputElement)) return
    by = event.target.value
    drawLegend()
    paint()
    measure()
  })
  new ResizeObserver(() => {
    if (root.clientWidth < 80 || root.clientWidth === width) return // hidden
    width = root.clientWidth
    place()
  }).observe(root)
  new ResizeObserver(measure).observe(inner)

  note([])
  return { element: root, show, tile, say, fold, height: () => high, look: () => editor?.look() }
}

function readHint() {
  return word("map_hint", "Point at a tile, or walk with the arrow keys, to read about a layer.")
}

function paintHint() {
  return word("map_paint_hint", "Choose a format to paint with, then click or drag over tiles, a row's name or a block's number. Right-click: as planned.")
}

let made = 0 // maps on the page, for the names of their radio groups
