// @ts-check
/** The layer map's view: blocks along x, kinds of layers along y, a tile per layer, and what is known of the one in hand. */
import { addStyle, element, keepInside, name } from "./dom.js"
import { schemes } from "./layer_map_colours.js"
import { arrange, describe, flags, lines, parse, shortNames } from "./layer_map_data.js"
import { STYLE } from "./layer_map_style.js"

const GAP = 9 // between bands
const TILE = { least: 8, most: 18, letter: 10 } // widths in pixels
const HINT = "Point at a tile, or walk with the arrow keys, to read about a layer."

/**
 * @typedef {{ get: () => string, set: (text: string) => void }} Edits
 * @param {{ editable?: Edits, onHeight?: () => void }} [options]
 */
export function layerMap({ editable, onHeight = () => {} } = {}) {
  addStyle("tessera-map-style", STYLE)
  const part = (/** @type {string} */ word, tag = "div") => {
    const made = document.createElement(tag)
    made.className = made.dataset.part = word
    return made
  }
  const message = part("message", "p")
  const facts = part("facts", "dl")
  const bar = part("bar")
  const legend = part("legend")
  const grid = part("grid")
  const details = part("details")
  const inner = element("div", { className: "inner" })
  const root = keepInside(element("div", { className: "tessera-map" }, [inner]))
  root.dataset.part = "layer-map"
  grid.setAttribute("role", "grid")

  /** @type {import("./layer_map_data.js").LayerMap | null} */
  let map = null
  /** @type {import("./layer_map_data.js").Panel[]} */
  let panels = []
  /** @type {import("./layer_map_colours.js").Scheme[]} */
  let ways = []
  let by = "format"
  /** @type {HTMLElement[]} by layer */
  let tiles = []
  /** @type {number[][]} layers as they stand on the page, row by row, -1 for none */
  let places = []
  let inHand = 0 // the layer that has the keyboard
  let width = 460
  let shape = "" // of the lines as they are built
  let high = 40

  function show(/** @type {any} */ payload) {
    map = payload ? parse(payload) : null
    panels = map ? arrange(map.layers.map((layer) => layer.name)) : []
    inHand = panels[0]?.bands[0]?.columns[0]?.cells.find((cell) => cell !== undefined) ?? 0
    shape = ""
    say([])
    draw()
  }

  function draw() {
    if (!map) inner.replaceChildren(message)
    else inner.replaceChildren(...(message.textContent ? [message] : []), facts, bar, legend, grid, details)
    if (map) {
      recolour()
      place()
      tell(null)
    }
    measure()
  }

  function say(/** @type {string[]} */ words, /** @type {"error" | "note"} */ tone = "note") {
    message.textContent = words.join("\n")
    message.classList.toggle("error", tone === "error")
    message.setAttribute("role", tone === "error" ? "alert" : "status")
    if (!map || Boolean(message.textContent) !== message.isConnected) arrangeParts()
    measure()
  }

  function arrangeParts() {
    if (map) message.textContent ? inner.prepend(message) : message.remove()
    else inner.replaceChildren(message)
  }

  /** What the layers are coloured by: choices, legend, tiles. */
  function recolour() {
    if (!map) return
    ways = schemes(map)
    if (!ways.some((way) => way.id === by)) by = "format"
    facts.replaceChildren(...map.facts.map(([label, value]) => {
      return element("div", {}, [element("dt", { textContent: label }), element("dd", { textContent: value, title: value })])
    })) // prettier-ignore
    const group = name(element("span", { className: "by" }), "by", "Colour by")
    group.setAttribute("role", "radiogroup")
    group.append(...ways.map((way) => {
      const radio = element("input", { type: "radio", name: group_, value: way.id, checked: way.id === by })
      return element("label", {}, [name(radio, `by-${way.id}`, `Colour by ${way.label.toLowerCase()}`), way.label])
    })) // prettier-ignore
    bar.replaceChildren(...(ways.length > 1 ? [group] : []))
    drawLegend()
    paint()
  }
  const group_ = `tessera-map-${++made}`

  function way() {
    return ways.find((one) => one.id === by) ?? ways[0]
  }

  function drawLegend() {
    if (!map) return
    const { entries, scale } = way()
    const item = (/** @type {string} */ style, /** @type {string} */ mark, /** @type {string} */ label, /** @type {number} */ count, key = label) => {
      const made = element("span", { className: "entry" }, [
        element("span", { className: `swatch ${style}`, textContent: mark }),
        element("span", { textContent: label }),
        element("b", { textContent: String(count) }),
      ])
      made.dataset.part = "legend-entry"
      made.dataset.key = key
      return made
    }
    const shown = entries.map(({ style, mark, label, count, key }) => item(style, mark, label, count, key))
    if (scale) {
      shown.push(
        element("span", { className: "entry" }, [scale.low, element("span", { className: "ramp" }), scale.high, scale.log ? "(log scale)" : ""]),
      )
      if (scale.none) shown.push(item("none", "", "not known", scale.none))
    }
    const branches = map.layers.filter((layer) => layer.rank).length
    if (branches) shown.push(item("branch f-keep", "", "with a correction", branches, "branch"))
    legend.replaceChildren(...shown)
  }

  /** Builds the lines where they have changed, and gives every column its width. */
  function place() {
    if (!map) return
    const longest = Math.max(...panels.flatMap((panel) => panel.rows.map((row) => row.length)))
    const label = Math.round(Math.min(Math.max(44, 5.4 * longest + 8), 0.29 * width))
    const room = width - label - 2
    const rows = panels.reduce((sum, panel) => sum + panel.rows.length, 0)
    const dense = rows > 60
    const split = panels.map((panel) => lines(panel, room, dense ? 5 : TILE.least, GAP))
    const fits = split.flat().map((line) => {
      const columns = line.reduce((sum, band) => sum + band.columns.length, 0)
      return (room - GAP * (line.length - 1)) / columns
    })
    const wide = Math.max(3, Math.floor(2 * Math.min(TILE.most, ...fits)) / 2)
    const tall = dense ? 9 : Math.min(16, Math.max(13, Math.round(wide)))
    grid.style.setProperty("--label", `${label}px`)
    grid.style.setProperty("--wide", `${wide}px`)
    grid.style.setProperty("--high", `${tall}px`)
    grid.style.setProperty("--gap", `${GAP}px`)
    grid.classList.toggle("small", wide < TILE.letter || dense)
    grid.classList.toggle("dense", dense)
    const now = JSON.stringify([dense, wide >= 13, split.map((some) => some.map((line) => line.map((band) => band.columns.length)))])
    if (now !== shape) build(split, wide)
    shape = now
    plantFlags(split, wide, room)
  }

  /** @param {import("./layer_map_data.js").Band[][][]} split @param {number} wide */
  function build(split, wide) {
    const all = document.createDocumentFragment()
    tiles = []
    places = []
    split.forEach((some, at) => some.forEach((line) => all.append(buildLine(panels[at], line, wide))))
    grid.replaceChildren(all)
    paint()
  }

  /** @param {import("./layer_map_data.js").Panel} panel @param {import("./layer_map_data.js").Band[]} line @param {number} wide */
  function buildLine(panel, line, wide) {
    const box = element("div", { className: "panel" })
    box.setAttribute("role", "rowgroup")
    box.append(element("div", { className: "flags" }))
    const numbers = element("div", { className: "numbers" })
    numbers.setAttribute("role", "row")
    numbers.append(element("span", { className: "rowlabel" }))
    const counted = line.some((band) => band.columns.some((column) => column.number !== null))
    line.forEach((band, n) => {
      if (n) numbers.append(element("span", { className: "space" }))
      numbers.append(...band.columns.map((column) => number(column, band, wide)))
    })
    if (counted) box.append(numbers)
    panel.rows.forEach((kind, row) => {
      const shown = element("div", { className: "line" })
      shown.setAttribute("role", "row")
      const label = element("span", { className: "rowlabel", textContent: kind, title: kind })
      label.setAttribute("role", "rowheader")
      label.dataset.part = "row"
      shown.append(label)
      /** @type {number[]} */
      const cells = []
      line.forEach((band, n) => {
        if (n) shown.append(element("span", { className: "space" }))
        for (const column of band.columns) {
          const layer = column.cells[row]
          cells.push(layer ?? -1)
          shown.append(layer === undefined ? element("span", { className: "hole" }) : tile_(layer))
        }
      })
      places.push(cells)
      box.append(shown)
    })
    return box
  }

  /** @param {{ number: number | null, cells: (number | undefined)[] }} column @param {import("./layer_map_data.js").Band} band @param {number} wide */
  function number(column, band, wide) {
    const text = column.number === null ? "" : String(column.number)
    const shown = wide >= 13 || (column.number ?? 1) % 5 === 0
    const made = element("span", { textContent: shown ? text : "", title: band.stack ? `${band.stack}.${text}` : "" })
    made.setAttribute("role", "columnheader")
    made.dataset.part = "column"
    made.dataset.layers = column.cells.filter((cell) => cell !== undefined).join(" ")
    return made
  }

  function tile_(/** @type {number} */ layer) {
    const made = document.createElement("span")
    made.setAttribute("role", "gridcell")
    made.tabIndex = layer === inHand ? 0 : -1
    made.dataset.part = "tile"
    made.dataset.layer = String(layer)
    tiles[layer] = made
    return made
  }

  /** Names of bands above their columns. @param {import("./layer_map_data.js").Band[][][]} split @param {number} wide @param {number} room */
  function plantFlags(split, wide, room) {
    const boxes = [...grid.querySelectorAll(".flags")]
    split.forEach((some, at) => {
      const names = shortNames(panels[at].bands.map((band) => band.stack))
      const called = new Map(panels[at].bands.map((band, n) => [band.stack, names[n]]))
      for (const line of some) {
        const box = /** @type {HTMLElement} */ (boxes.shift())
        let x = 0
        const starts = line.map((band) => {
          const start = x
          x += band.columns.length * wide + GAP
          return { x: start, width: 5.6 * (called.get(band.stack)?.length ?? 0) + 8 }
        })
        const placed = flags(starts, room)
        const levels = Math.max(0, ...placed.map((flag) => flag.level)) + 1
        const shown = placed.flatMap((flag, n) => {
          const text = called.get(line[n].stack) ?? ""
          if (!text) return []
          const label = element("span", { textContent: text, title: line[n].stack })
          const top = 12 * (levels - 1 - flag.level)
          Object.assign(label.style, { left: `${flag.left}px`, top: `${top}px`, maxWidth: `${room - flag.left}px` })
          const leader = element("i")
          Object.assign(leader.style, { left: `${flag.x}px`, top: `${top}px`, height: `${12 * (flag.level + 1) + 9}px` })
          return [leader, label]
        })
        box.style.height = shown.length ? `${12 * levels}px` : "0"
        box.replaceChildren(...shown)
      }
    })
  }

  function paint(only = tiles.keys()) {
    if (!map) return
    const { of } = way()
    for (const index of only) {
      const [layer, made] = [map.layers[index], tiles[index]]
      if (!layer || !made) continue
      const [style, mark] = of(layer)
      const marks = [layer.rank && "branch", layer.edited && "edited", layer.state].filter(Boolean)
      made.className = ["tile", style, ...marks].join(" ")
      made.textContent = mark
      made.setAttribute("aria-label", `${layer.name}: ${describe(layer, map).lines.join("; ")}`)
    }
  }

  /** @param {number | null} index */
  function tell(index) {
    if (!map) return
    const layer = index === null ? null : map.layers[index]
    if (!layer) return details.replaceChildren(element("div", { textContent: HINT }))
    const { name, lines } = describe(layer, map)
    details.replaceChildren(
      element("div", { className: "name", textContent: name }),
      ...lines.map((text, n) => element("div", { className: n === lines.length - 1 ? "last" : "", textContent: text, title: text })),
    )
  }

  function measure() {
    const now = inner.offsetHeight || high
    if (now !== high) {
      high = now
      onHeight()
    }
  }

  function layerAt(/** @type {EventTarget | null} */ target) {
    const found = target instanceof Element ? target.closest("[data-layer]") : null
    return found instanceof HTMLElement ? Number(found.dataset.layer) : null
  }

  grid.addEventListener("pointerover", (event) => {
    const layer = layerAt(event.target)
    if (layer !== null) tell(layer)
  })
  grid.addEventListener("pointerleave", () => tell(grid.contains(document.activeElement) ? inHand : null))
  grid.addEventListener("focusin", (event) => {
    const layer = layerAt(event.target)
    if (layer === null) return
    if (tiles[inHand]) tiles[inHand].tabIndex = -1
    inHand = layer
    tiles[layer].tabIndex = 0
    tell(layer)
  })
  grid.addEventListener("keydown", (event) => {
    const to = step(event.key, event.ctrlKey)
    if (to === null) return
    event.preventDefault()
    tiles[to]?.focus()
  })
  bar.addEventListener("change", (event) => {
    if (!(event.target instanceof HTMLInputElement)) return
    by = event.target.value
    drawLegend()
    paint()
    measure()
  })

  /** The layer that a key leads to from the one in hand; null for any other key. @param {string} key @param {boolean} far */
  function step(key, far) {
    const row = places.findIndex((cells) => cells.includes(inHand))
    if (row < 0) return null
    const column = places[row].indexOf(inHand)
    const there = (/** @type {number} */ r, /** @type {number} */ c) => {
      const cells = places[r] ?? []
      const near = cells.map((layer, at) => [Math.abs(at - c), layer]).filter(([, layer]) => layer >= 0)
      return near.length ? near.reduce((a, b) => (b[0] < a[0] ? b : a))[1] : inHand
    }
    const along = (/** @type {number} */ by) => {
      let at = column + by
      while (places[row][at] === -1) at += by
      return places[row][at] ?? inHand
    }
    const row_ = places[row].filter((layer) => layer >= 0)
    if (key === "ArrowLeft") return along(-1)
    if (key === "ArrowRight") return along(1)
    if (key === "ArrowUp") return row ? there(row - 1, column) : inHand
    if (key === "ArrowDown") return row < places.length - 1 ? there(row + 1, column) : inHand
    if (key === "Home") return far ? there(0, 0) : row_[0]
    if (key === "End") return far ? there(places.length - 1, 1e6) : (row_.at(-1) ?? inHand)
    return null
  }

  /** One layer has changed: what a job sends when it is done. @param {string} layerName @param {Partial<import("./layer_map_data.js").Layer>} values */
  function tile(layerName, values) {
    const layer = map?.layers.find((one) => one.name === layerName)
    if (!map || !layer) return
    Object.assign(layer, { state: "" }, values)
    if (values.nbytes && layer.shape.length === 2) layer.bits = (8 * values.nbytes) / (layer.shape[0] * layer.shape[1])
    const before = JSON.stringify(way().scale)
    ways = schemes(map)
    drawLegend()
    paint(JSON.stringify(way().scale) === before ? [layer.index] : undefined)
  }

  new ResizeObserver(() => {
    if (root.clientWidth > 80 && root.clientWidth !== width) {
      width = root.clientWidth
      place()
    }
    measure()
  }).observe(root)
  new ResizeObserver(measure).observe(inner)

  say([])
  return { element: root, show, tile, say, height: () => high }
}

let made = 0 // maps on the page, for the names of their radio groups
