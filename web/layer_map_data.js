// @ts-check
/** A layer map as data: the payload that Python sends (tiles.py), read into layers, and the layers put into grids. */
import { word } from "./translation.js"

/**
 * @typedef {{ format: string, rank: number, nbytes: number, damage: number }} Option
 * @typedef {{ index: number, name: string, format: string, shape: number[], bits: number, nbytes: number,
 *   error: number | null, corrected: number | null, sensitivity: number | null, kernel: string,
 *   ran: [string, number][] | null, path: string, reason: string, rank: number, strength: number | null,
 *   edited: boolean, kept: string, added: number | null, planned: string, plannedRank: number,
 *   options: Option[] | null, state: string }} Layer
 * @typedef {{ title: string, kind: string, measure: string, facts: [string, string][], layers: Layer[],
 *   editable: boolean, fixed: number, edits: string }} LayerMap
 * @typedef {{ stack: string, columns: { number: number | null, cells: (number | undefined)[] }[] }} Band
 * @typedef {{ rows: string[], bands: Band[] }} Panel
 */

/** The layers of a payload. Whatever is missing or strange in it is nothing, not an error. @param {any} payload @returns {LayerMap} */
export function parse(payload) {
  const columns = payload?.layers ?? {}
  const words = (/** @type {any} */ list, /** @type {any} */ index) => String(list?.[index] ?? "")
  const names = Array.isArray(columns.name) ? columns.name : []
  const layers = names.map((/** @type {any} */ name, /** @type {number} */ index) => {
    const of = (/** @type {string} */ column) => columns[column]?.[index]
    const format = words(payload.formats, of("format")) || "keep"
    return {
      index, name: String(name), format, shape: of("shape") ?? [], bits: number(of("bits")) ?? 0,
      nbytes: number(of("nbytes")) ?? 0, error: number(of("error")), corrected: number(of("corrected")),
      sensitivity: number(of("sensitivity")), kernel: words(payload.kernels, of("kernel")),
      ran: of("ran")?.map((/** @type {any[]} */ [kernel, calls]) => [words(payload.kernels, kernel), calls]) ?? null,
      path: of("path") ?? "", reason: words(payload.reasons, of("reason")), rank: of("rank") ?? 0,
      strength: number(of("strength")), edited: Boolean(of("edited")), kept: words(payload.formats, of("kept")),
      added: number(of("added")), planned: words(payload.formats, of("planned")) || format,
      plannedRank: of("planned") >= 0 ? (of("planned_rank") ?? 0) : (of("rank") ?? 0),
      options: payload.options?.[index]?.map((/** @type {any[]} */ [place, rank, nbytes, damage]) => {
        return { format: words(payload.formats, place), rank, nbytes, damage }
      }) ?? null,
      state: of("done") === 0 ? "waiting" : "",
    }
  }) // prettier-ignore
  return {
    title: String(payload?.title ?? ""),
    kind: String(payload?.kind ?? ""),
    measure: String(payload?.measure ?? "weight error"),
    facts: (payload?.facts ?? []).map((/** @type {any} */ [label, value]) => [String(label), String(value)]),
    layers,
    editable: Array.isArray(payload?.options),
    fixed: number(payload?.fixed?.nbytes) ?? 0,
    edits: String(payload?.edits ?? ""),
  }
}

/** @param {any} value @returns {number | null} */
function number(value) {
  return typeof value === "number" && Number.isFinite(value) ? value : null
}

/**
 * Grids of blocks and kinds of layers. Of the numbers in a name the one counts blocks whose grid is fullest; stacks of
 * blocks with the same kinds stand beside each other; layers without a number come last, in one row.
 * @param {string[]} names @returns {Panel[]}
 */
export function arrange(names) {
  const places = choosePlaces(names)
  /** @type {Map<string, { number: number, kind: string, index: number }[]>} */
  const stacks = new Map()
  /** @type {number[]} */
  const other = []
  names.forEach((name, index) => {
    const place = places[index]
    if (!place) return other.push(index)
    const members = stacks.get(place.stack) ?? []
    stacks.set(place.stack, members)
    members.push({ ...place, index })
  })
  const panels = besides([...stacks].map(([stack, members]) => asBand(stack, members)))
  const last = { stack: "", columns: other.map((index) => ({ number: null, cells: [index] })) }
  return other.length ? [...panels, { rows: ["other"], bands: [last] }] : panels
}

/** @typedef {{ at: number, stack: string, number: number, kind: string }} Place */

/** Where every name stands, by the number in it that counts blocks. @param {string[]} names @returns {(Place | null)[]} */
function choosePlaces(names) {
  const candidates = names.map(readings)
  const templates = names.map((name) => name.replace(/(^|\.)\d+(?=\.|$)/g, "$1#"))
  const members = tally(candidates.flat(), (place) => place.stack)
  /** @type {Map<string, { cells: number, stacks: Map<string, [Set<number>, Set<string>]> }>} by template and position */
  const grids = new Map()
  names.forEach((_, index) => {
    candidates[index].forEach((place) => {
      const key = `${place.at} ${templates[index]}` // names alike but for numbers, read at the same place
      const grid = grids.get(key) ?? { cells: 0, stacks: new Map() }
      const [columns, rows] = grid.stacks.get(place.stack) ?? [new Set(), new Set()]
      grid.cells += 1
      grid.stacks.set(place.stack, [columns.add(place.number), rows.add(place.kind)])
      grids.set(key, grid)
    })
  })
  return names.map((_, index) => {
    /** @type {Place | null} */
    let best = null
    let most = 0
    for (const place of candidates[index]) {
      const { cells, stacks } = /** @type {any} */ (grids.get(`${place.at} ${templates[index]}`))
      const sizes = [...stacks.values()].map(([columns, rows]) => [columns.size, rows.size])
      const area = sizes.reduce((sum, [columns, rows]) => sum + columns * rows, 0)
      const repeated = sizes.some(([columns]) => columns > 1)
      const alone = (members.get(place.stack) ?? 0) >= 3 // a block that no other is like
      const fullness = repeated ? 1 + Math.round((10 * cells) / area) : Number(alone) / 2
      if (fullness > most) [best, most] = [place, fullness] // the outermost of equals
    }
    return best
  })
}

/** Every way to read a name as stack, number and kind. @param {string} name @returns {Place[]} */
function readings(name) {
  const parts = name.split(".")
  const found = parts.flatMap((part, at) => {
    if (!/^\d{1,6}$/.test(part) || at === parts.length - 1) return [] // a last number is a place in a Sequential
    return [{ at, stack: parts.slice(0, at).join("."), number: Number(part), kind: parts.slice(at + 1).join(".") }]
  })
  return found
}

/** @param {string} stack @param {{ number: number, kind: string, index: number }[]} members @returns {Band & { kinds: string[] }} */
function asBand(stack, members) {
  const kinds = [...new Set(members.map((member) => member.kind))]
  const numbers = [...new Set(members.map((member) => member.number))].sort((a, b) => a - b)
  const columns = new Map(numbers.map((number) => [number, /** @type {Map<string, number>} */ (new Map())]))
  members.forEach(({ number, kind, index }) => columns.get(number)?.set(kind, index))
  return { stack, kinds, columns: [...columns].map(([number, cells]) => ({ number, cells: kinds.map((kind) => cells.get(kind)) })) }
}

/** Bands whose kinds are mostly the same share their rows. @param {(Band & { kinds: string[] })[]} bands @returns {Panel[]} */
function besides(bands) {
  /** @type {(Band & { kinds: string[] })[][]} */
  const groups = []
  for (const band of bands) {
    const group = groups.find((others) => {
      const shared = others[0].kinds.filter((kind) => band.kinds.includes(kind)).length
      return shared > 0.6 * Math.max(Math.min(others[0].kinds.length, band.kinds.length), 1)
    })
    if (group) group.push(band)
    else groups.push([band])
  }
  return groups.map((group) => {
    const fullest = group.reduce((a, b) => (b.kinds.length > a.kinds.length ? b : a))
    const rows = [...new Set([...fullest.kinds, ...group.flatMap((band) => band.kinds)])]
    const bands = group.map(({ stack, kinds, columns }) => {
      const places = rows.map((row) => kinds.indexOf(row))
      return { stack, columns: columns.map(({ number, cells }) => ({ number, cells: places.map((at) => cells[at]) })) }
    })
    return { rows, bands: bands.sort((a, b) => natural(a.stack, b.stack)) }
  })
}

/** Names of stacks without what ends all of them: input_blocks.4 for input_blocks.4.1.transformer_blocks. @param {string[]} stacks */
export function shortNames(stacks) {
  const parts = stacks.map((stack) => stack.split("."))
  let drop = 0
  const ends = () => new Set(parts.map((words) => words.at(-1 - drop)))
  while (stacks.length > 1 && ends().size === 1 && parts.every((words) => words.length > drop + 1)) drop += 1
  return parts.map((words) => words.slice(0, words.length - drop).join("."))
}

const collator = new Intl.Collator("en", { numeric: true })

/** @param {string} a @param {string} b */
export function natural(a, b) {
  return collator.compare(a, b)
}

/**
 * A panel's columns on as few lines as fit, as even as they get; no tile is narrower than `least`.
 * @param {Panel} panel @param {number} room @param {number} least @param {number} gap between bands, in pixels
 * @returns {Band[][]}
 */
export function lines(panel, room, least, gap) {
  const most = Math.max(4, Math.floor(room / least))
  const pieces = panel.bands.flatMap((band) => {
    const size = Math.ceil(band.columns.length / Math.ceil(band.columns.length / most))
    const starts = Array.from({ length: Math.ceil(band.columns.length / size) }, (_, n) => n * size)
    return starts.map((start) => ({ stack: band.stack, columns: band.columns.slice(start, start + size) }))
  })
  /** @type {Band[][]} */
  const found = [[]]
  let used = 0
  for (const piece of pieces) {
    const wide = piece.columns.length * least
    const before = found[found.length - 1]
    if (before.length && used + gap + wide > room) {
      found.push([piece])
      used = wide
    } else {
      used += wide + (before.length ? gap : 0)
      before.push(piece)
    }
  }
  return found
}

/**
 * Levels of labels above bands, 0 nearest, so that none covers another or its leader.
 * @param {{ x: number, width: number }[]} labels @param {number} room
 * @returns {{ x: number, left: number, width: number, level: number }[]}
 */
export function flags(labels, room) {
  /** @type {{ x: number, left: number, width: number, level: number }[]} */
  const placed = []
  for (const { x, width } of [...labels].reverse()) {
    const left = Math.max(0, Math.min(x, room - width))
    const over = (/** @type {number} */ at, /** @type {any} */ flag) => at >= flag.left - 2 && at < flag.left + flag.width + 2
    const mine = { x, left, width, level: 0 }
    const free = () => placed.every((flag) => {
      if (flag.level === mine.level) return left + width + 4 < flag.left || flag.left + flag.width + 4 < left
      return flag.level > mine.level ? !over(flag.x, mine) : !over(x, flag)
    }) // prettier-ignore
    while (!free() && mine.level < 6) mine.level += 1
    placed.unshift(mine)
  }
  return placed
}

/** How many of each, most first. @template T @param {T[]} items @param {(item: T) => string} by @returns {Map<string, number>} */
export function tally(items, by) {
  /** @type {Map<string, number>} */
  const counts = new Map()
  items.forEach((item) => counts.set(by(item), (counts.get(by(item)) ?? 0) + 1))
  return new Map([...counts].sort((a, b) => b[1] - a[1]))
}

/** A layer in words: name, what it is, what it cost, how it runs, why. @param {Layer} layer @param {LayerMap} map @returns {{ name: string, lines: string[] }} */
export function describe(layer, map) {
  const bits = word("map_bits", "{0} bits per weight", layer.bits.toFixed(2))
  const what = [format(layer), bits, bytes(layer.nbytes), layer.shape.join(" × ")]
  const cost = []
  if (layer.error !== null) cost.push(`${called(map.measure)} ${percent(layer.error)}${corrected(layer)}`)
  else if (layer.rank) cost.push(branch(layer))
  if (layer.added) cost.push(word("map_added", "turning it into {0} added {1}", layer.kept, percent(layer.added)))
  if (layer.sensitivity !== null) cost.push(word("map_coarsest", "in the coarsest format {0}", percent(layer.sensitivity)))
  return { name: layer.name, lines: [what, cost, runs(layer)].map((words) => words.filter(Boolean).join(" · ")).filter(Boolean) }
}

/** How a layer runs, and why so. @param {Layer} layer */
function runs(layer) {
  const said = []
  const turned = layer.kept && layer.kept !== layer.format
  if (layer.path) said.push(turned ? word("map_path_as", "{0} as {1}", called(layer.path), layer.kept) : called(layer.path))
  if (layer.kernel) said.push(word("map_runs_by", "kernel {0}", layer.kernel))
  const ran = layer.ran?.map(([name, calls]) => `${name} × ${calls}`).join(", ")
  if (layer.ran) said.push(ran ? word("map_ran", "ran {0}", ran) : word("map_silent", "has not run yet"))
  return layer.reason ? [...said, layer.reason] : said
}

/** @param {Layer} layer */
function format(layer) {
  const named = (/** @type {string} */ label, /** @type {number} */ rank) => (rank ? word("map_ranked", "{0} rank {1}", label, rank) : label)
  const planned = word("map_planned", "planned: {0}", named(layer.planned, layer.plannedRank))
  return layer.edited ? `${named(layer.format, layer.rank)} (${planned})` : layer.format
}

/** @param {Layer} layer */
function corrected(layer) {
  if (layer.corrected !== null) return word("map_with", " → {0} with {1}", percent(layer.corrected), branch(layer))
  return layer.rank ? `, ${branch(layer)}` : ""
}

/** @param {Layer} layer */
function branch(layer) {
  if (layer.strength === null) return word("map_branch", "correction of rank {0}", layer.rank)
  return word("map_branch_at", "correction of rank {0} at strength {1}", layer.rank, +layer.strength.toFixed(3))
}

/** A label of Python's in the page's language: of a fact, of a measure, of a path (mosaic.py, maps.py, dispatch.py). @param {string} label */
export function called(label) {
  /** @type {Record<string, () => string>} */
  const known = {
    "size": () => word("map_fact_size", "size"),
    "file": () => word("map_fact_file", "file"),
    "layers": () => word("map_fact_layers", "layers"),
    "layers in memory": () => word("map_fact_memory", "layers in memory"),
    "bits per weight": () => word("map_fact_bits", "bits per weight"),
    "expected error": () => word("map_fact_expected", "expected error"),
    "asked for": () => word("map_fact_wish", "asked for"),
    "recipe": () => word("map_fact_recipe", "recipe"),
    "of the source": () => word("map_fact_source", "of the source"),
    "correction LoRA": () => word("map_fact_lora", "correction LoRA"),
    "with correction": () => word("map_fact_corrected", "with correction"),
    "LoRAs beside it": () => word("map_fact_beside", "LoRAs beside it"),
    "weight error": () => word("map_weight_error", "weight error"),
    "output error": () => word("map_output_error", "output error"),
    "share of the model's error": () => word("map_share_error", "share of the model's error"),
    "native": () => word("map_native", "native"),
    "transcode": () => word("map_transcode", "transcode"),
    "weight-only": () => word("map_weight_only", "weight-only"),
    "decode": () => word("map_decode", "decode"),
  } // prettier-ignore
  return Object.hasOwn(known, label) ? known[label]() : label
}

/** @param {number} value */
export function percent(value) {
  const share = 100 * value
  return `${share === 0 || share >= 0.01 ? +share.toPrecision(3) : share.toExponential(1)} %`
}

/** @param {number} value */
export function bytes(value) {
  const [unit, size] = value >= 1e9 ? ["GB", 1e9] : value >= 1e6 ? ["MB", 1e6] : value >= 1e3 ? ["kB", 1e3] : ["bytes", 1]
  return `${size === 1 ? value : (value / size).toFixed(2)} ${unit}`
}

/** The layers whose error is largest, correction included. @param {LayerMap} map @param {number} count */
export function costliest(map, count) {
  const error = (/** @type {Layer} */ layer) => layer.corrected ?? layer.error ?? 0
  return map.layers.filter((layer) => error(layer)).sort((a, b) => error(b) - error(a)).slice(0, count)
}
