// @ts-check
/** The grid of a layer map: blocks along x, kinds of layers along y, a tile per layer; walked by keys, painted by strokes. */
import { element } from "./dom.js"
import { arrange, flags, lines, shortNames } from "./layer_map_data.js"
import { word } from "./translation.js"

/** @typedef {import("./layer_map_data.js").Band} Band @typedef {import("./layer_map_data.js").Panel} Panel */

const GAP = 9 // between bands, in pixels
const TILE = { least: 7, most: 22, letter: 9.5 } // widths
const DENSE = 60 // rows, above which they are thinner

/**
 * `point` is told which layer is in hand or pointed at; `stroke` gets the layers that a press, a drag or a key names,
 * and says whether it takes them; `end` comes after each stroke.
 * @param {{ point: (layer: number | null) => void, stroke: (layers: number[], erase: boolean) => boolean, end: () => void,
 *   escape: () => void }} hear
 */
export function tileGrid({ point, stroke, end, escape }) {
  const root = element("div", { className: "grid" })
  root.dataset.part = "grid"
  root.setAttribute("role", "grid")
  root.setAttribute("aria-label", word("map_grid", "Layers: blocks along x, kinds of layers along y"))
  root.setAttribute("aria-multiselectable", "true")
  /** @type {Panel[]} */
  let panels = []
  /** @type {HTMLElement[]} by layer */
  let tiles = []
  /** @type {number[][]} layers as they stand on the page, row by row, -1 for none */
  let places = []
  let inHand = 0 // the layer that has the keyboard
  /** @type {number[]} layers that Shift and arrows have gathered */
  let gathered = []
  let anchor = 0
  let built = "" // how the lines were split

  function show(/** @type {string[]} */ names) {
    panels = arrange(names)
    inHand = panels[0]?.bands[0]?.columns[0]?.cells.find((cell) => cell !== undefined) ?? 0
    gathered = []
    built = ""
    tiles = []
    places = []
  }

  /** Builds the lines where they have changed, and gives every column its width; true if tiles are new. @param {number} width */
  function place(width) {
    const longest = Math.max(0, ...panels.flatMap((panel) => panel.rows.map((row) => row.length)))
    const label = Math.round(Math.min(Math.max(40, 5.3 * longest + 8), 0.27 * width))
    const room = width - label - 2
    const dense = panels.reduce((sum, panel) => sum + panel.rows.length, 0) > DENSE
    const split = panels.map((panel) => lines(panel, room, dense ? 5 : TILE.least, GAP))
    const fits = split.flat().map((line) => {
      return (room - GAP * (line.length - 1)) / line.reduce((sum, band) => sum + band.columns.length, 0)
    })
    const wide = Math.max(3, Math.floor(4 * Math.min(TILE.most, ...fits)) / 4)
    const tall = dense ? 9 : Math.min(18, Math.max(13, Math.round(wide)))
    for (const [word, size] of Object.entries({ label, wide, high: tall, gap: GAP })) root.style.setProperty(`--${word}`, `${size}px`)
    root.classList.toggle("small", wide < TILE.letter || dense)
    root.classList.toggle("dense", dense)
    const now = JSON.stringify([wide >= 13, split.map((some) => some.map((line) => line.map((band) => band.columns.length)))])
    const fresh = now !== built
    if (fresh) build(split, wide)
    built = now
    plantFlags(split, wide, room)
    return fresh
  }

  function build(/** @type {Band[][][]} */ split, /** @type {number} */ wide) {
    const all = document.createDocumentFragment()
    tiles = []
    places = []
    split.forEach((some, at) => some.forEach((line) => all.append(lineOf(panels[at], line, wide))))
    root.replaceChildren(all)
  }

  function lineOf(/** @type {Panel} */ panel, /** @type {Band[]} */ line, /** @type {number} */ wide) {
    const box = element("div", { className: "panel" }, [element("div", { className: "flags" })])
    box.setAttribute("role", "rowgroup")
    const numbers = element("div", { className: "numbers" }, [element("span", { className: "rowlabel" })])
    numbers.setAttribute("role", "row")
    line.forEach((band, n) => {
      if (n) numbers.append(element("span", { className: "space" }))
      numbers.append(...band.columns.map((column) => numberOf(column, band, wide)))
    })
    if (line.some((band) => band.stack)) box.append(numbers)
    panel.rows.forEach((kind, row) => {
      const said = line.some((band) => band.stack) ? kind : word("map_other", "other")
      const label = element("span", { className: "rowlabel", textContent: said, title: said })
      label.setAttribute("role", "rowheader")
      label.dataset.part = "row"
      const shown = element("div", { className: "line" }, [label])
      shown.setAttribute("role", "row")
      const cells = line.flatMap((band, n) => {
        if (n) shown.append(element("span", { className: "space" }))
        return band.columns.map(({ cells }) => {
          const layer = cells[row] ?? -1
          shown.append(layer < 0 ? element("span", { className: "hole" }) : tileOf(layer))
          return layer
        })
      })
      label.dataset.layers = cells.filter((layer) => layer >= 0).join(" ")
      places.push(cells)
      box.append(shown)
    })
    return box
  }

  function numberOf(/** @type {Band["columns"][0]} */ column, /** @type {Band} */ band, /** @type {number} */ wide) {
    const text = String(column.number ?? "")
    const shown = wide >= 13 || (column.number ?? 1) % 5 === 0
    const made = element("span", { className: shown ? "shown" : "", textContent: text, title: `${band.stack}.${text}` })
    made.setAttribute("role", "columnheader")
    made.dataset.part = "column"
    made.dataset.layers = column.cells.filter((cell) => cell !== undefined).join(" ")
    return made
  }

  function tileOf(/** @type {number} */ layer) {
    const made = document.createElement("span")
    made.setAttribute("role", "gridcell")
    made.tabIndex = layer === inHand ? 0 : -1
    made.dataset.part = "tile"
    made.dataset.layer = String(layer)
    tiles[layer] = made
    return made
  }

  /** Names of bands above their columns. @param {Band[][][]} split @param {number} wide @param {number} room */
  function plantFlags(split, wide, room) {
    const boxes = [...root.querySelectorAll(".flags")]
    split.forEach((some, at) => {
      const names = shortNames(panels[at].bands.map((band) => band.stack))
      const called = new Map(panels[at].bands.map((band, n) => [band.stack, names[n]]))
      for (const line of some) {
        const box = boxes.shift()
        if (box instanceof HTMLElement) plant(box, line, called, wide, room)
      }
    })
  }

  /** @param {HTMLElement} box @param {Band[]} line @param {Map<string, string>} called @param {number} wide @param {number} room */
  function plant(box, line, called, wide, room) {
    let x = 0
    const wanted = line.map((band) => {
      const start = x
      x += band.columns.length * wide + GAP
      return { x: start, width: 5.3 * (called.get(band.stack)?.length ?? 0) + 8 }
    })
    const placed = flags(wanted, room)
    const levels = Math.max(0, ...placed.map((flag) => flag.level)) + 1
    const shown = placed.flatMap(({ x, left, level }, n) => {
      const textContent = called.get(line[n].stack)
      if (!textContent) return []
      const [leader, label] = [element("i"), element("span", { textContent, title: line[n].stack })]
      const top = `${12 * (levels - 1 - level)}px`
      Object.assign(label.style, { left: `${left}px`, top, maxWidth: `${room - left}px` })
      Object.assign(leader.style, { left: `${x}px`, top, height: `${12 * (level + 1) + 8}px` })
      return [leader, label]
    })
    box.style.height = shown.length ? `${12 * levels}px` : "0"
    box.replaceChildren(...shown)
  }

  function layerAt(/** @type {EventTarget | null} */ target) {
    const found = target instanceof Element ? target.closest("[data-layer]") : null
    return found instanceof HTMLElement && root.contains(found) ? Number(found.dataset.layer) : null
  }

  /** The layers that a place on the grid means: a tile's, a row's, a block's. @param {EventTarget | null} target */
  function layersAt(target) {
    const layer = layerAt(target)
    if (layer !== null) return [layer]
    const found = target instanceof Element ? target.closest("[data-layers]") : null
    return found instanceof HTMLElement && root.contains(found) ? (found.dataset.layers ?? "").split(" ").filter(Boolean).map(Number) : []
  }

  /** @param {EventTarget | null} target */
  function partOf(target) {
    return target instanceof HTMLElement && root.contains(target) ? target.dataset.part : undefined
  }

  root.addEventListener("pointerover", (event) => {
    const layer = layerAt(event.target)
    if (layer !== null) point(layer)
  })
  root.addEventListener("pointerleave", () => point(root.contains(document.activeElement) ? inHand : null))
  root.addEventListener("focusin", (event) => {
    const layer = layerAt(event.target)
    if (layer === null) return
    if (tiles[inHand]) tiles[inHand].tabIndex = -1
    inHand = layer
    tiles[layer].tabIndex = 0
    point(layer)
  })

  root.addEventListener("pointerdown", (down) => {
    const erase = down.button === 2
    const layers = layersAt(down.target)
    if (down.button === 1 || !layers.length || !stroke(layers, erase)) return
    down.stopPropagation() // the mouse events that follow go on: the frontend notes what has changed at each release
    const kind = partOf(down.target)
    if (kind === "tile") tiles[layers[0]].focus({ preventScroll: true })
    let [x, y] = [down.clientX, down.clientY]
    const drag = (/** @type {PointerEvent} */ move) => {
      const steps = Math.ceil(Math.hypot(move.clientX - x, move.clientY - y) / 3) // what a fast hand passes over
      for (let n = 1; n <= steps; n += 1) {
        const under = document.elementFromPoint(x + ((move.clientX - x) * n) / steps, y + ((move.clientY - y) * n) / steps)
        if (partOf(under) === kind) stroke(layersAt(under), erase)
      }
      ;[x, y] = [move.clientX, move.clientY]
    }
    const done = () => {
      window.removeEventListener("pointermove", drag, true)
      window.removeEventListener("pointerup", done, true)
      window.removeEventListener("pointercancel", done, true)
      end()
    }
    window.addEventListener("pointermove", drag, true)
    window.addEventListener("pointerup", done, true)
    window.addEventListener("pointercancel", done, true)
  })
  root.addEventListener("contextmenu", (event) => {
    if (!layersAt(event.target).length || !stroke([], true)) return
    event.preventDefault()
    event.stopPropagation() // no menu of the node either
  })

  root.addEventListener("keydown", (event) => {
    if (layerAt(event.target) === null) return
    const to = step(event.key, event.ctrlKey)
    const [paints, erases] = [[" ", "Enter"].includes(event.key), ["Delete", "Backspace"].includes(event.key)]
    if (to !== null) {
      if (!event.shiftKey || !gathered.length) anchor = inHand
      gather(event.shiftKey ? between(anchor, to) : [])
      tiles[to]?.focus()
    } else if (paints || erases) {
      if (stroke(gathered.length ? gathered : [inHand], erases)) end()
    } else if (event.key === "Escape") {
      gather([])
      escape()
    } else return
    event.preventDefault()
  })

  function gather(/** @type {number[]} */ layers) {
    const mark = (/** @type {number} */ layer, /** @type {boolean} */ on) => {
      tiles[layer]?.classList.toggle("gathered", on)
      tiles[layer]?.setAttribute("aria-selected", String(on))
    }
    gathered.forEach((layer) => mark(layer, false))
    gathered = layers
    gathered.forEach((layer) => mark(layer, true))
  }

  function whereIs(/** @type {number} */ layer) {
    const row = places.findIndex((cells) => cells.includes(layer))
    return [row, places[row]?.indexOf(layer) ?? -1]
  }

  /** The layers of the rectangle that two tiles span. @param {number} one @param {number} other */
  function between(one, other) {
    const [[r, c], [s, d]] = [whereIs(one), whereIs(other)]
    const rows = places.slice(Math.min(r, s), Math.max(r, s) + 1)
    return rows.flatMap((cells) => cells.slice(Math.min(c, d), Math.max(c, d) + 1)).filter((layer) => layer >= 0)
  }

  /** The layer that a key leads to from the one in hand; null for any other key. @param {string} key @param {boolean} far */
  function step(key, far) {
    const [row, column] = whereIs(inHand)
    if (row < 0) return null
    const near = (/** @type {number} */ r, /** @type {number} */ c) => {
      const there = (places[r] ?? []).map((layer, at) => [Math.abs(at - c), layer]).filter(([, layer]) => layer >= 0)
      return there.length ? there.reduce((a, b) => (b[0] < a[0] ? b : a))[1] : inHand
    }
    const along = (/** @type {number} */ by) => {
      let at = column + by
      while (places[row][at] === -1) at += by
      return places[row][at] ?? inHand
    }
    const last = places.length - 1
    if (key === "ArrowLeft") return along(-1)
    if (key === "ArrowRight") return along(1)
    if (key === "ArrowUp") return near(Math.max(0, row - 1), column)
    if (key === "ArrowDown") return near(Math.min(last, row + 1), column)
    if (key === "Home") return near(far ? 0 : row, 0)
    if (key === "End") return near(far ? last : row, 1e6)
    return null
  }

  return { element: root, show, place, tiles: () => tiles, inHand: () => inHand }
}
