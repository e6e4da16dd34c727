// @ts-check
/** What the tiles of a layer map are coloured by: a class and a mark per layer, and the legend to both. */
import { bytes, percent, tally } from "./layer_map_data.js"
import { word } from "./translation.js"

/** Of Okabe and Ito's palette, told apart by the colour-blind; the same in pictures/mosaic_colours.py. */
export const FORMATS = {
  nvfp4: ["#D55E00", "4"],
  mxfp8: ["#0072B2", "8"],
  fp8: ["#56B4E9", "f"],
  int8_row: ["#009E73", "i"],
  int8_convrot: ["#44C9A0", "c"],
  keep: ["#8A8A8A", "·"],
  strange: ["#CC79A7", "?"],
}
export const KERNELS = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#8A8A8A"]
export const STEPS = ["#440154", "#482475", "#414487", "#355F8D", "#2A788E", "#21918C", "#22A884", "#44BF70", "#7AD151", "#BDDF26", "#FDE725"]

/**
 * @typedef {{ key: string, label: string, mark: string, count: number, style: string, title?: string }} Entry
 * @typedef {{ id: string, label: string, of: (layer: import("./layer_map_data.js").Layer) => [string, string],
 *   entries: Entry[], scale: { low: string, high: string, log: boolean, none: number } | null }} Scheme
 */

/** Every way to colour these layers that shows something. @param {import("./layer_map_data.js").LayerMap} map @returns {Scheme[]} */
export function schemes(map) {
  const { layers } = map
  const worst = (/** @type {any} */ layer) => layer.corrected ?? layer.error
  return [
    byFormat(layers),
    ...scaled("error", word("map_error", "Error"), layers, worst, percent),
    ...scaled("sensitivity", word("map_sensitivity", "Sensitivity"), layers, (layer) => layer.sensitivity, percent),
    ...scaled("size", word("map_size", "Size"), layers, (layer) => layer.nbytes || null, bytes),
    ...byKernel(layers),
  ]
}

/** The family of a format's label: what has one colour. @param {string} label @returns {keyof typeof FORMATS} */
export function family(label) {
  if (label.startsWith("int8_convrot")) return "int8_convrot"
  if (label.startsWith("int8")) return "int8_row"
  if (label.startsWith("fp8") || label.startsWith("float8")) return "fp8"
  if (["keep", "bf16", "fp16", "fp32"].includes(label)) return "keep"
  return label === "nvfp4" || label === "mxfp8" ? label : "strange"
}

/** @param {import("./layer_map_data.js").Layer[]} layers @returns {Scheme} */
function byFormat(layers) {
  const counts = tally(layers, (layer) => layer.format)
  const entries = [...counts].map(([label, count]) => {
    return { key: label, label, mark: FORMATS[family(label)][1], count, style: `f-${family(label)}` }
  })
  return { id: "format", label: word("map_format", "Format"), of: (layer) => [`f-${family(layer.format)}`, FORMATS[family(layer.format)][1]], entries, scale: null }
}

/** By the kernel that ran, else the one that is planned. @param {import("./layer_map_data.js").Layer[]} layers @returns {Scheme[]} */
function byKernel(layers) {
  const of = (/** @type {any} */ layer) => layer.ran?.[0]?.[0] || layer.kernel || ""
  const counts = tally(layers, of)
  const names = [...counts.keys()].filter(Boolean)
  if (!names.length) return []
  const mark = (/** @type {string} */ name) => (name ? "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[names.indexOf(name)] ?? "?" : "")
  const style = (/** @type {string} */ name) => (name ? `k-${Math.min(names.indexOf(name), KERNELS.length - 1)}` : "none")
  const entries = [...counts].map(([name, count]) => {
    return { key: name, label: name || word("map_plain", "not quantized"), mark: mark(name), count, style: style(name) }
  })
  return [{ id: "kernel", label: word("map_kernel", "Kernel"), of: (layer) => [style(of(layer)), mark(of(layer))], entries, scale: null }]
}

/** @param {string} id @param {string} label @param {import("./layer_map_data.js").Layer[]} layers @param {(layer: import("./layer_map_data.js").Layer) => number | null} value @param {(value: number) => string} write @returns {Scheme[]} */
function scaled(id, label, layers, value, write) {
  const known = layers.map(value).filter((number) => number !== null)
  if (!known.length) return []
  const above = known.filter((number) => number > 0)
  const [low, high] = [Math.min(...(above.length ? above : known)), Math.max(...known)]
  const log = low > 0 && high / low > 100
  const at = (/** @type {number} */ number) => {
    if (high <= low) return 0
    const share = log ? Math.log(Math.max(number, low) / low) / Math.log(high / low) : (number - low) / (high - low)
    return Math.max(0, Math.min(STEPS.length - 1, Math.round(share * (STEPS.length - 1))))
  }
  const of = (/** @type {any} */ layer) => {
    const number = value(layer)
    return /** @type {[string, string]} */ (number === null ? ["none", ""] : [`s-${at(number)}`, ""])
  }
  return [{ id, label, of, entries: [], scale: { low: write(low), high: write(high), log, none: layers.length - known.length } }]
}
