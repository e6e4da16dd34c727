// @ts-check
/**
 * What the server says of a quantization, in words and numbers to show.
 *
 * @typedef {{ lines: string[], columns: string[], rows: string[][] }} Report
 * @typedef {{ filename: string, subfolder: string, type: string }} SavedFile
 * @typedef {{ job: string, count: number, node: string, prompt: string | null, workflow: string,
 *   state: "running" | "done" | "failed" | "cancelled", title: string, index: number, total: number,
 *   verifying: boolean, seconds_left: number | null, share: number, nbytes: number, target_bytes: number,
 *   source_bytes: number, source: string, measure: string, error: number | null, corrected: number | null,
 *   layer: string, format: string, last: any, message: string, report: Report | null, file: SavedFile | null,
 *   map?: any }} Job
 */

/** Bytes as the report says them. @param {number} bytes */
export function size(bytes) {
  return bytes >= 1e8 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(2)} MB`
}

/** @param {number} seconds */
export function duration(seconds) {
  const whole = Math.max(0, Math.round(seconds))
  const [hours, minutes, rest] = [Math.floor(whole / 3600), Math.floor(whole / 60) % 60, whole % 60]
  const two = (/** @type {number} */ n) => String(n).padStart(2, "0")
  return hours ? `${hours}:${two(minutes)}:${two(rest)}` : `${minutes}:${two(rest)}`
}

/** A relative error. @param {number} value */
export function percent(value) {
  return `${Number((100 * value).toPrecision(3))} %`
}

/**
 * Of several jobs the one to show in each node: the newest, but one that this page has queued before all others.
 * @param {Job[]} jobs the newest first @param {Set<string | null>} mine prompts @returns {Job[]}
 */
export function newest(jobs, mine) {
  /** @type {Map<string, Job>} */
  const found = new Map()
  for (const job of jobs) {
    const place = JSON.stringify([job.workflow, job.node])
    const before = found.get(place)
    if (!before || (mine.has(job.prompt) && !mine.has(before.prompt))) found.set(place, job)
  }
  return [...found.values()]
}

/** The whole report as a table for a forum or an issue. @param {Report} report */
export function markdown({ lines, columns, rows }) {
  const row = (/** @type {string[]} */ cells) => `| ${cells.map((cell) => cell.replaceAll("|", "\\|")).join(" | ")} |`
  const rule = `|${columns.map((_, n) => (n < 2 ? "-" : "-:")).join("|")}|`
  const table = columns.length ? ["", row(columns), rule, ...rows.map(row)] : []
  return [...lines.map((line) => `- ${line}`), ...table].join("\n")
}

/** Lines that say what was made, and those that only note something. @param {Report} report */
export function sorted({ lines }) {
  const note = (/** @type {string} */ line) => line.startsWith("note: ")
  return { made: lines.filter((line) => !note(line)), notes: lines.filter(note).map((line) => line.slice(6)) }
}
