// @ts-check
/** Quantize and Bake live: every layer as it is done, Cancel, and the report; what the server knows outlives the page. */
import { copyButton } from "./copying.js"
import { addStyle, after, button, element, keepInside, roomFor } from "./dom.js"
import { api, app, nodeAt, rootGraph } from "./frontend.js"
import { layerMap } from "./layer_map.js"
import { duration, markdown, newest, percent, size, sorted } from "./quantize_text.js"
import { remount } from "./remount.js"
import { word } from "./words.js"

/** @typedef {import("./quantize_text.js").Job} Job */

const NODES = ["TesseraQuantize", "TesseraBake"]
const EVENT = "tessera.job"
const WIDE = 460 // pixels, the least a map is good in
/** @type {Map<any, (job: Job) => void>} what draws a job in a node that is there */
const drawn = new Map()
/** @type {Set<string | null>} prompts that this page has queued */
const mine = new Set()
/** @type {Set<string>} jobs that ran in another workflow while this page was open */
const elsewhere = new Set()

api.addEventListener(EVENT, (/** @type {any} */ { detail }) => hear(detail)) // at once: the server may be telling already

app.registerExtension({
  name: "tessera.quantize",
  setup() {
    addStyle("tessera-job-style", STYLE)
    api.addEventListener("execution_start", (/** @type {any} */ { detail }) => mine.add(detail.prompt_id))
    api.addEventListener("reconnected", refresh)
  },
  nodeCreated(/** @type {any} */ node) {
    if (NODES.includes(node.comfyClass)) attach(node)
  },
  afterConfigureGraph() {
    refresh()
  },
})

/** Draws a job where it belongs, if that is on this page. @param {Job} job */
function hear(job) {
  if (job.workflow !== String(rootGraph()?.id ?? "")) elsewhere.add(job.job)
  else drawn.get(nodeAt(job.node))?.(job)
}

let asking = false
let again = false

/** Draws what the server knows: after a reload, a lost connection, or the change to another workflow. */
async function refresh() {
  again = true
  if (asking) return
  asking = true
  while (again && drawn.size) {
    again = false
    try {
      const answer = await api.fetchApi("/tessera/jobs")
      if (answer.ok) newest((await answer.json()).jobs, mine).forEach(hear)
    } catch {
      // the server is away; the frontend says so, and fires `reconnected` when it is back
    }
  }
  asking = false
}

/** @param {any} node */
function attach(node) {
  const fit = roomFor(node, "job")
  const view = layerMap({ onHeight: fit })
  const part = (/** @type {keyof HTMLElementTagNameMap} */ tag, /** @type {string} */ name_) => {
    const made = element(tag)
    made.dataset.part = name_
    return made
  }
  const hint = part("p", "job-hint")
  hint.textContent = word("job_hint", "Run: every layer appears here as it is done.")
  const status = part("span", "job-status")
  status.setAttribute("role", "status")
  const cancel = button(word("job_cancel", "Cancel"), "cancel", word("job_cancel_long", "Cancel: nothing is left behind"), () => {
    cancel.disabled = true
    cancel.textContent = word("job_cancelling", "Cancelling after this layer")
    api.interrupt(job?.prompt ?? null)
  })
  const filled = element("i")
  const bar = part("div", "job-bar")
  bar.append(filled)
  bar.setAttribute("role", "progressbar")
  bar.setAttribute("aria-label", word("job_progress", "Progress"))
  const facts = part("dl", "job-facts")
  const error = part("p", "job-error")
  error.setAttribute("role", "alert")
  const result = part("div", "job-result")
  const head = element("div", { className: "head" }, [status, cancel])
  const inner = element("div", { className: "inner" }, [hint, head, error, bar, facts, view.element, result])
  const root = keepInside(element("div", { className: "tessera-job" }, [inner]))
  root.dataset.part = "job"

  /** @type {Job | null} */
  let job = null
  let mapped = false // the view shows this job's layers
  let asked = false // the server for them
  /** @type {any[]} layers that were done before the map was there */
  let waiting = []
  let high = 30

  /** @param {Job} next */
  function take(next) {
    const other = next.job !== job?.job
    if (other && job?.state === "running" && mine.has(job.prompt) && !mine.has(next.prompt)) return
    if (other) begin()
    const late = !other && job !== null && next.count < job.count
    if (next.map && !(late && mapped)) {
      if (node.size[0] < WIDE) node.setSize([WIDE, node.size[1]])
      view.show(next.map)
      mapped = true
      waiting.splice(0).forEach(fill)
    }
    if (late) return
    if (next.last) mapped ? fill(next.last) : waiting.push(next.last)
    job = next
    if (mapped && next.state === "running" && !next.verifying) view.tile(next.layer, { state: "now" })
    draw(next)
    if (!mapped && next.total && !asked) {
      asked = true
      refresh()
    }
  }

  function begin() {
    job = null
    mapped = asked = false
    waiting = []
    view.show(null)
    cancel.disabled = false
    cancel.textContent = word("job_cancel", "Cancel")
  }

  function fill(/** @type {any} */ { name: layer, format, shape, nbytes, rank, error, corrected }) {
    view.tile(layer, { format, shape, nbytes, rank, error, corrected })
  }

  /** @param {Job} now */
  function draw(now) {
    root.dataset.state = now.state
    const running = now.state === "running"
    hint.hidden = true
    head.hidden = false
    status.textContent = said(now)
    cancel.hidden = !running
    bar.hidden = !running
    filled.style.width = `${100 * now.share}%`
    bar.setAttribute("aria-valuenow", String(Math.round(100 * now.share)))
    const known = numbers(now)
    facts.hidden = !known.length
    facts.replaceChildren(...known.map(([label, value, key]) => {
      const made = element("div", {}, [element("dt", { textContent: label }), element("dd", { textContent: value, title: value })])
      made.dataset.part = `job-${key}`
      return made
    })) // prettier-ignore
    error.hidden = !now.message
    error.textContent = now.message
    view.element.hidden = !mapped
    if (result.dataset.job !== `${now.job} ${now.state}`) result.replaceChildren(...(now.report ? reported(now, now.report) : []))
    result.dataset.job = `${now.job} ${now.state}`
    result.hidden = !now.report
    measure()
  }

  function measure() {
    const now = inner.offsetHeight || high
    if (now === high) return
    high = now
    fit()
  }

  head.hidden = bar.hidden = facts.hidden = error.hidden = result.hidden = view.element.hidden = true
  new ResizeObserver(measure).observe(inner)
  node.addDOMWidget("job", "tessera_job", root, {
    serialize: false, hideInPanel: true, getMinHeight: () => high + 12, margin: 6,
  }) // prettier-ignore
  drawn.set(node, take)
  after(node, "onRemoved", () => drawn.delete(node))
  after(node, "onConfigure", () => remount(node, root))
  after(node, "onExecuted", (output) => {
    const done = output?.tessera_job?.[0]
    if (done && !elsewhere.has(done.job)) take({ ...done, map: output.tessera_map?.[0] })
  })
}

/** Where a job is, in a few words. @param {Job} job */
function said(job) {
  const name = job.title || word("job_untitled", "The job")
  if (job.state === "done") return word("job_done", "{0} is made and checked", name)
  if (job.state === "failed") return word("job_failed", "{0} failed", name)
  if (job.state === "cancelled") return word("job_cancelled", "{0} was cancelled, nothing is left behind", name)
  if (!job.total) return word("job_reading", "Reading the source")
  const [at, of] = [Math.min(job.index + 1, job.total), job.total]
  if (job.verifying) return word("job_checking", "Checking layer {0} of {1} on disk", at, of)
  return word("job_layer", "Layer {0} of {1}", at, of)
}

/** Label, value and a name of the numbers to show. @param {Job} job @returns {[string, string, string][]} */
function numbers(job) {
  if (!job.total) return []
  const running = job.state === "running"
  const [written, whole] = [size(job.nbytes), size(job.target_bytes)]
  const measure = job.measure === "output error" ? word("job_output_error", "mean output error") : word("job_weight_error", "mean weight error")
  /** @type {[string, string | false, string][]} */
  const all = [
    [word("job_now", "in hand"), running && [job.layer, job.format].filter(Boolean).join(", "), "layer"],
    [word("job_left", "left"), running && job.seconds_left !== null && duration(job.seconds_left), "left"],
    [word("job_share", "done"), running && `${Math.round(100 * job.share)} %`, "share"],
    [word("job_size", "size"), job.state === "done" ? whole : running && word("job_of", "{0} of {1}", written, whole), "size"],
    [word("job_source", "of the source's {0}", size(job.source_bytes)), (running || job.state === "done") && of(job), "source"],
    [measure, job.error !== null && percent(job.error), "mean-error"],
    [word("job_corrected", "with correction"), job.corrected !== null && percent(job.corrected), "corrected"],
  ]
  return /** @type {[string, string, string][]} */ (all.filter(([, value]) => value))
}

/** @param {Job} job */
function of(job) {
  return job.source_bytes ? `${Math.round((100 * job.target_bytes) / job.source_bytes)} %` : false
}

/** @param {Job} job @param {import("./quantize_text.js").Report} report */
function reported(job, report) {
  const { made, notes } = sorted(report)
  const list = (/** @type {string[]} */ lines, /** @type {string} */ part) => {
    const shown = element("ul", {}, lines.map((line) => element("li", { textContent: line })))
    shown.dataset.part = part
    return shown
  }
  const copied = copyButton(word("copy_markdown", "Copy as markdown"), "copy-markdown", word("copy_report", "Copy the report as markdown"), () => markdown(report))
  const title = word("job_report", "Report: {0} layers", report.rows.length || job.total)
  const more = element("details", {}, [element("summary", { textContent: title }), ...(notes.length ? [list(notes, "job-notes")] : []), table(report)])
  more.dataset.part = "report"
  const foot = element("div", { className: "foot" }, [copied, ...(job.file ? [link(job.file)] : [])])
  return [list(made, "job-lines"), more, foot]
}

/** @param {import("./quantize_text.js").Report} report */
function table({ columns, rows }) {
  const row = (/** @type {"th" | "td"} */ tag, /** @type {string[]} */ cells) =>
    element("tr", {}, cells.map((cell) => element(tag, { textContent: cell, title: cell })))
  const made = element("table", {}, [element("thead", {}, [row("th", columns)]), element("tbody", {}, rows.map((cells) => row("td", cells)))])
  made.dataset.part = "report-table"
  const box = element("div", { className: "scroll", tabIndex: 0 }, [made])
  box.setAttribute("role", "region")
  box.setAttribute("aria-label", word("job_layers", "Layers"))
  return box
}

/** @param {import("./quantize_text.js").SavedFile} file */
function link(file) {
  const query = new URLSearchParams({ ...file })
  const made = element("a", { href: api.apiURL(`/view?${query}`), target: "_blank", rel: "noopener", textContent: word("job_json", "JSON report") })
  made.title = `output/${file.subfolder}/${file.filename}`
  made.dataset.part = "report-file"
  return made
}

const STYLE = `
.tessera-job { width: 100%; box-sizing: border-box; overflow: hidden; color: var(--input-text, #ddd); font: 12px/1.35 Inter, Arial, sans-serif;
  --quiet: var(--descrip-text, #999); --line: var(--border-color, #4e4e4e); --accent: var(--p-primary-color, #4a90e2); }
.tessera-job .inner, .tessera-job [data-part="job-result"] { display: flex; flex-direction: column; gap: 8px; }
.tessera-job .inner { padding: 2px 0; }
.tessera-job [hidden] { display: none; }
.tessera-job p, .tessera-job ul { margin: 0; }
.tessera-job [data-part="job-hint"], .tessera-job li { color: var(--quiet); }
.tessera-job .head { display: flex; gap: 8px; align-items: center; justify-content: space-between; min-height: 22px; }
.tessera-job [data-part="job-status"] { font-weight: 600; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.tessera-job[data-state="failed"] [data-part="job-status"], .tessera-job [data-part="job-error"] { color: var(--error-text, #ff4444); }
.tessera-job [data-part="job-error"] { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid currentColor; padding-left: 8px; max-height: 190px; overflow: auto; user-select: text; }
.tessera-job [data-part="job-bar"] { height: 6px; border-radius: 3px; overflow: hidden; background: var(--comfy-input-bg, #222); box-shadow: inset 0 0 0 1px var(--line); }
.tessera-job [data-part="job-bar"] i { display: block; height: 100%; background: var(--accent); }
.tessera-job dl { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 0; }
.tessera-job dl div { display: flex; flex-direction: column-reverse; min-width: 0; }
.tessera-job dl [data-part="job-layer"] { flex-basis: 100%; }
.tessera-job dt { color: var(--quiet); font-size: 10px; }
.tessera-job dd { margin: 0; font-size: 14px; font-weight: 600; font-variant-numeric: tabular-nums; overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.tessera-job [data-part="job-layer"] dd { font-weight: 400; font-size: 12px; }
.tessera-job ul { list-style: none; padding: 0; font-size: 11px; }
.tessera-job li { overflow-wrap: anywhere; user-select: text; }
.tessera-job summary { cursor: pointer; font-weight: 600; }
.tessera-job details ul { margin: 6px 0; max-height: 96px; overflow: auto; }
.tessera-job .scroll { max-height: 240px; overflow: auto; margin-top: 6px; border: 1px solid var(--line); border-radius: 5px; }
.tessera-job table { border-collapse: collapse; width: 100%; font-size: 11px; font-variant-numeric: tabular-nums; user-select: text; }
.tessera-job th { position: sticky; top: 0; background: var(--comfy-input-bg, #222); text-align: right; font-weight: 600; }
.tessera-job th, .tessera-job td { padding: 2px 8px; white-space: nowrap; }
.tessera-job td { text-align: right; border-top: 1px solid color-mix(in srgb, var(--line) 50%, transparent); }
.tessera-job :is(th, td):nth-child(-n + 2) { text-align: left; }
.tessera-job .foot { display: flex; gap: 12px; align-items: center; }
.tessera-job .foot a { color: var(--input-text, #ddd); text-decoration: underline; }
.tessera-job .head button, .tessera-job .foot button { flex: none; box-sizing: border-box; height: 22px; padding: 0 10px; border: 1px solid var(--line);
  border-radius: 5px; background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: 11px Inter, Arial, sans-serif; cursor: pointer; }
.tessera-job button:disabled { opacity: 0.6; cursor: default; }
.tessera-job :is(button, summary, a, .scroll):focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
`
