// @ts-check
/** Edits of a plan as text, `PATTERN = FORMAT rN` per line (edits.py), and what they make of its layers. */
import { arrange, natural } from "./layer_map_data.js"
import { word } from "./translation.js"

/** @typedef {import("./layer_map_data.js").Layer} Layer @typedef {import("./layer_map_data.js").Option} Option */

const LINE = /^(.+?)\s*=\s*(\w+)(?:\s+r(\d{1,4}))?$/

/**
 * What a text makes of the layers: later lines win. `others` are lines that mean none of these layers, comments among
 * them; `problems` says of which lines Python will complain.
 * @param {string} text @param {Layer[]} layers
 * @returns {{ chosen: Map<number, Option>, others: string[], problems: string[] }}
 */
export function read(text, layers) {
  /** @type {Map<number, Option>} */
  const chosen = new Map()
  /** @type {string[]} */
  const others = []
  /** @type {string[]} */
  const problems = []
  text.split(/\r?\n/).forEach((line, at) => {
    const words = line.split("#")[0].trim()
    if (!words) return line.trim() && others.push(line)
    const say = (/** @type {string} */ problem) => problems.push(word("map_line", "Line {0}, {1}: {2}", at + 1, words.slice(0, 60), problem))
    const [, pattern, format, rank] = words.match(LINE) ?? []
    if (!pattern) {
      others.push(line)
      return say(word("map_syntax", "write PATTERN = FORMAT or PATTERN = FORMAT rN."))
    }
    const named = layers.filter(matcher(pattern))
    const taken = named.flatMap((layer) => {
      const option = find(layer, format, Number(rank ?? 0))
      return option ? [/** @type {const} */ ([layer.index, option])] : []
    })
    if (!taken.length) others.push(line)
    if (!named.length) say(word("map_no_layer", "names no layer of this model."))
    else if (!taken.length && !(format === "keep" && named.every(locked))) say(word("map_unmeasured", "is nothing that this plan has measured for these layers."))
    taken.forEach(([index, option]) => chosen.set(index, option))
  })
  return { chosen, others, problems }
}

/** Whether a plan leaves a layer no choice. @param {Layer} layer */
export function locked(layer) {
  return (layer.options?.length ?? 0) < 2
}

/** The test of a pattern: a layer's own name, or a glob as in recipes (quantization/patterns.py). @param {string} pattern @returns {(layer: Layer) => boolean} */
function matcher(pattern) {
  const words = /** @type {Record<string, string>} */ ({ "**": ".*", "**.": "(?:[^.]+\\.)*", ".**": "(?:\\.[^.]+)*" })
  const strange = /[^\w.*{},/-]/.test(pattern) || (pattern.match(/\*/g)?.length ?? 0) > 12
  const tokens = pattern.match(/\*\*\.|\.\*\*|\*\*|\{[^}]*\}|[^{}]/g) ?? []
  const glob = strange ? null : new RegExp(`^${tokens.map((token) => words[token] ?? alternatives(token)).join("")}$`)
  return (layer) => layer.name === pattern || Boolean(glob?.test(layer.name))
}

/** `{a,b,0-9}` or one character as an expression. @param {string} token */
function alternatives(token) {
  const texts = token.replace(/[{}]/g, "").split(",").flatMap((text) => {
    const [, low, high] = text.match(/^(\d{1,6})-(\d{1,6})$/) ?? []
    const counts = token.length > 1 && low !== undefined && Number(high) - Number(low) < 10_000
    return counts ? Array.from({ length: Math.max(0, Number(high) - Number(low) + 1) }, (_, n) => String(Number(low) + n)) : [text]
  }) // prettier-ignore
  return `(?:${texts.map((text) => text.replace(/[.*+?^${}()|[\]\\/-]/g, "\\$&").replaceAll("\\*", "[^.]*")).join("|")})`
}

/** The option that a line means for a layer. @param {Layer} layer @param {string} format @param {number} rank */
function find(layer, format, rank) {
  const asked = ["bf16", "fp16", "fp32"].includes(format) ? "keep" : format
  const fits = (/** @type {Option} */ option) => option.format === format || brushOf(option.format) === asked
  return layer.options?.find((option) => option.rank === rank && fits(option))
}

/** The word by which an edit asks for a format: int8_convrot leaves the group to the layer's shape. @param {string} format */
export function brushOf(format) {
  return format.replace(/^int8_convrot_\d+$/, "int8_convrot")
}

/** The formats that some layer may take. @param {Layer[]} layers */
export function brushes(layers) {
  return [...new Set(layers.flatMap((layer) => layer.options?.map((option) => brushOf(option.format)) ?? []))]
}

/** The ranks that some layer may take. @param {Layer[]} layers */
export function ranks(layers) {
  return [...new Set(layers.flatMap((layer) => layer.options?.map((option) => option.rank) ?? []))].sort((a, b) => a - b)
}

/** What a brush makes of a layer: its format, in the rank that is nearest. @param {Layer} layer @param {string} brush @param {number | null} rank null: the layer's own @returns {Option | undefined} */
export function brushed(layer, brush, rank) {
  const wanted = rank ?? layer.rank
  const fitting = layer.options?.filter((option) => brushOf(option.format) === brush) ?? []
  return [...fitting].sort((a, b) => Math.abs(a.rank - wanted) - Math.abs(b.rank - wanted))[0]
}

/** What was planned for a layer. @param {Layer} layer */
export function planned(layer) {
  return layer.options?.find((option) => option.format === layer.planned && option.rank === layer.plannedRank)
}

/** Gives layers what was chosen for them, and all others what was planned. @param {Layer[]} layers @param {Map<number, Option>} chosen */
export function apply(layers, chosen) {
  for (const layer of layers) {
    const before = planned(layer)
    const option = chosen.get(layer.index) ?? before
    if (!option || !layer.options) continue
    const plain = layer.options.find((other) => other.format === option.format && !other.rank)
    const weights = layer.shape.reduce((product, size) => product * size, 1)
    layer.edited = option !== before && chosen.has(layer.index)
    layer.format = option.format
    layer.rank = option.rank
    layer.nbytes = option.nbytes
    layer.bits = (8 * option.nbytes) / Math.max(1, weights)
    layer.error = plain ? Math.sqrt(plain.damage) : null
    layer.corrected = option.rank ? Math.sqrt(option.damage) : null
  }
}

/** Bytes of the files and error to expect, of what is chosen and of what was planned. @param {import("./layer_map_data.js").LayerMap} map @param {Map<number, Option>} chosen */
export function forecast(map, chosen) {
  const sum = (/** @type {(layer: Layer) => Option | undefined} */ of) => {
    const options = map.layers.flatMap((layer) => of(layer) ?? [])
    const nbytes = options.reduce((total, option) => total + option.nbytes, map.fixed)
    return { nbytes, error: Math.sqrt(options.reduce((total, option) => total + option.damage, 0)) }
  }
  return { now: sum((layer) => chosen.get(layer.index) ?? planned(layer)), plan: sum(planned) }
}

/**
 * Edits as few lines: a row, a column or a whole band of the map becomes one pattern where every layer that it matches
 * is the same, by an edit or by the plan.
 * @param {Layer[]} layers @param {Map<number, Option>} chosen @param {string[]} others lines to keep as they are
 */
export function write(layers, chosen, others = []) {
  const value = (/** @type {Option} */ option) => brushOf(option.format) + (option.rank ? ` r${option.rank}` : "")
  /** @type {Map<string, { edited: Set<number>, same: Set<number> }>} */
  const groups = new Map()
  for (const layer of layers) {
    const [before, now] = [planned(layer), chosen.get(layer.index) ?? planned(layer)]
    if (!now) continue
    const group = groups.get(value(now)) ?? { edited: new Set(), same: new Set() }
    groups.set(value(now), group)
    group.same.add(layer.index)
    if (now !== before) group.edited.add(layer.index)
  }
  const panels = arrange(layers.map((layer) => layer.name))
  const written = [...groups].flatMap(([value, { edited, same }]) => {
    return edited.size ? patterns(layers, panels, edited, same).map((pattern) => `${pattern} = ${value}`) : []
  })
  return [...others, ...written].join("\n")
}

/**
 * Patterns that match all of these layers and, besides, only such as are the same.
 * @param {Layer[]} layers @param {import("./layer_map_data.js").Panel[]} panels @param {Set<number>} edited @param {Set<number>} same
 */
function patterns(layers, panels, edited, same) {
  const left = new Set(edited)
  /** @type {string[]} */
  const found = []
  const take = (/** @type {string} */ pattern) => {
    const matched = layers.filter(matcher(pattern)).map((layer) => layer.index)
    if (!matched.some((index) => left.has(index)) || !matched.every((index) => same.has(index))) return
    found.push(pattern)
    matched.forEach((index) => left.delete(index))
  }
  const there = (/** @type {(number | undefined)[]} */ cells) => /** @type {number[]} */ (cells.filter((cell) => cell !== undefined))
  const whole = (/** @type {(number | undefined)[]} */ cells) => {
    const some = there(cells)
    return some.length > 1 && some.every((cell) => same.has(cell)) && some.some((cell) => left.has(cell))
  }
  for (const { rows, bands } of panels) {
    for (const { stack, columns } of bands.filter((band) => band.stack)) {
      if (whole(columns.flatMap(({ cells }) => cells))) take(`${stack}.**`)
      rows.forEach((kind, row) => whole(columns.map(({ cells }) => cells[row])) && take(`${stack}.*.${kind}`))
      const full = columns.filter(({ cells }) => whole(cells))
      if (full.length) take(`${stack}.${numbers(full.map((column) => Number(column.number)))}.**`)
      /** @type {Map<string, string[]>} kinds by the blocks that they are edited in */
      const rest = new Map()
      rows.forEach((kind, row) => {
        const some = columns.filter(({ cells }) => left.has(cells[row] ?? -1)).map((column) => Number(column.number))
        if (some.length) rest.set(numbers(some), [...(rest.get(numbers(some)) ?? []), kind])
      })
      rest.forEach((kinds, blocks) => take(`${stack}.${blocks}.${kinds.length > 1 ? `{${kinds.join(",")}}` : kinds[0]}`))
    }
  }
  return [...found, ...[...left].map((index) => layers[index].name).sort(natural)]
}

/** Ascending numbers as a pattern: [3] is `3`, [0, 1, 2, 5] is `{0-2,5}`. @param {number[]} values */
export function numbers(values) {
  /** @type {[number, number][]} */
  const spans = []
  for (const value of values) {
    const last = spans[spans.length - 1]
    if (last && value === last[1] + 1) last[1] = value
    else spans.push([value, value])
  }
  const texts = spans.map(([low, high]) => (low < high ? `${low}-${high}` : String(low)))
  return values.length > 1 ? `{${texts.join(",")}}` : texts[0]
}
