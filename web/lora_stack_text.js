// @ts-check
/**
 * A stack of LoRAs as text: one a line, `name.safetensors : strength_model [: strength_clip]`, a leading # mutes it.
 * The same rules as lora_stack.py, which reads the text for the host; here lines become rows and rows become lines.
 *
 * @typedef {{on: boolean, name: string, model: number, clip: number | null}} LoRA clip: null is as model
 * @typedef {{note: string}} Note a comment, kept as it is
 */

export const LIMIT = 100 // of a strength
const NUMBER = "[+-]?(?:\\d+\\.?\\d*|\\.\\d+)(?:[eE][+-]?\\d+)?"
const LINE = new RegExp(`^(.+?)\\s*(?::\\s*(${NUMBER}))?\\s*(?::\\s*(${NUMBER}))?$`) // the shortest name that fits
const FILE = /\.(safetensors|sft|ckpt|pth?|bin)$/i

/** Rows of a text, blank lines left out. @param {string} text @returns {(LoRA | Note)[]} */
export function parse(text) {
  return text.split(/\r\n|\r|\n/).map((line) => line.trim()).filter(Boolean).map(row)
}

/** The text of rows. @param {(LoRA | Note)[]} rows */
export function format(rows) {
  return rows.map(line).join("\n")
}

/** Rows with one at another place. @template T @param {T[]} rows @param {number} from @param {number} to */
export function move(rows, from, to) {
  const moved = rows.slice()
  moved.splice(to, 0, ...moved.splice(from, 1))
  return moved
}

/** The number that a field holds, within the limits of a strength; null if it holds none. @param {string} text */
export function strength(text) {
  const value = Number(text)
  return text.trim() === "" || !Number.isFinite(value) ? null : Math.min(LIMIT, Math.max(-LIMIT, value))
}

/** @param {string} text */
function row(text) {
  const on = !text.startsWith("#")
  const [, name = "", model, clip] = LINE.exec(text.replace(/^[#\s]+/, "")) ?? []
  if (!on && model === undefined && !FILE.test(name)) return { note: text }
  return { on, name: bare(name), model: Number(model ?? 1), clip: clip === undefined ? null : Number(clip) }
}

/** @param {LoRA | Note} row */
function line(row) {
  if ("note" in row) return row.note
  const name = row.name.startsWith("#") ? `./${row.name}` : row.name // not a muted line
  return `${row.on ? "" : "# "}${name} : ${row.model}${row.clip === null ? "" : ` : ${row.clip}`}`
}

/** @param {string} name */
function bare(name) {
  return name.replace(/^\.\//, "")
}
