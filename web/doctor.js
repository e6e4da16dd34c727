// @ts-check
/** The sidebar tab Tessera: what this machine does with each format, what to install, and all of it for an issue report. */
import { copyButton } from "./copying.js"
import { addStyle, button, element } from "./dom.js"
import { PATHS, byPath, byTarget, grade, health, machine, reasons } from "./doctor_text.js"
import { api, app } from "./frontend.js"
import { word } from "./words.js"

/** @typedef {import("./doctor_text.js").Diagnosis} Diagnosis */

app.registerExtension({
  name: "tessera.doctor",
  setup() {
    addStyle("tessera-doctor-style", STYLE)
    app.extensionManager?.registerSidebarTab?.({
      id: "tessera",
      icon: "pi pi-wrench",
      title: "Tessera",
      tooltip: word("doctor_tooltip", "Tessera: what this machine does with each format"),
      type: "custom",
      render: open,
    })
  },
})

/** Fills the tab. @param {HTMLElement} container */
function open(container) {
  const body = element("div", { className: "body" })
  body.setAttribute("aria-live", "polite")
  const foot = element("div", { className: "foot" })
  const root = element("section", { className: "tessera-doctor" }, [body, foot])
  root.dataset.part = "doctor"
  const again = button(word("doctor_refresh", "Refresh"), "doctor-refresh", word("doctor_refresh_long", "Look again"), look)
  container.replaceChildren(root)
  look()

  async function look() {
    again.disabled = true
    if (!body.childElementCount) body.replaceChildren(text("p", "doctor-wait", word("doctor_wait", "Looking at this machine...")))
    root.dataset.state = "busy"
    try {
      const answer = await api.fetchApi("/tessera/doctor")
      if (!answer.ok) throw Error(`${answer.status} ${answer.statusText}`)
      const { diagnosis, markdown } = await answer.json()
      body.replaceChildren(...screen(diagnosis))
      foot.replaceChildren(copyButton(word("copy_markdown", "Copy as markdown"), "doctor-copy", word("doctor_copy", "Copy for an issue report"), () => markdown), again)
      root.dataset.state = "ready"
    } catch (problem) {
      body.replaceChildren(text("p", "doctor-error", word("doctor_error", "The server gave no answer ({0}). Restart ComfyUI, then look again.", problem instanceof Error ? problem.message : problem)))
      foot.replaceChildren(again)
      root.dataset.state = "failed"
    }
    again.disabled = false
  }
}

/** @param {Diagnosis} found */
function screen(found) {
  const verdict = text("p", "doctor-verdict", found.verdict)
  verdict.dataset.health = health(found)
  return [
    text("h2", "doctor-version", `Tessera ${found.version}`),
    verdict,
    ...(found.fixes.length ? [section(word("doctor_fixes", "To do"), "doctor-fixes", found.fixes.map(fix))] : []),
    section(word("doctor_formats", "Formats here"), "doctor-formats", byPath(found).flatMap(([path, labels]) => formats(found, path, labels))),
    section(word("doctor_machine", "This machine"), "doctor-machine", [facts(machine(found))]),
    section(word("doctor_backends", "comfy-kitchen backends"), "doctor-backends", found.backends.map(backend)),
  ]
}

/** @param {import("./doctor_text.js").Fix} fix */
function fix({ what, command, optional }) {
  const said = element("p", { textContent: optional ? word("doctor_optional", "Optional: {0}", what) : what })
  if (!command) return element("div", { className: "fix" }, [said])
  const line = element("code", { textContent: command, tabIndex: 0 })
  line.dataset.part = "doctor-command"
  const press = copyButton(word("copy", "Copy"), "doctor-copy-command", word("doctor_copy_command", "Copy the command"), () => command)
  const where = element("small", { textContent: word("doctor_where", "In the Python environment of ComfyUI; then restart it.") })
  return element("div", { className: "fix" }, [said, element("div", { className: "command" }, [line, press]), where])
}

/** All formats of one path, with what is true of all of them said once. @param {Diagnosis} found @param {string} path @param {string[]} labels */
function formats({ plans }, path, labels) {
  return byTarget(plans, labels).map(([target, some]) => {
    const badge = element("span", { className: `badge ${grade(path)}`, textContent: PATHS[path] ?? path })
    const names = element("span", {}, [element("b", { textContent: some.join(", ") })])
    if (target) names.append(` ${word("doctor_into", "to {0}", target)}`)
    const said = reasons(some.map((label) => plans[label].reason))
    const row = element("div", { className: "format" }, [
      element("div", { className: "line" }, [badge, names]), ...said.map((reason) => element("small", { textContent: reason })),
    ]) // prettier-ignore
    row.dataset.part = "doctor-format"
    row.dataset.path = path
    row.dataset.formats = some.join(" ")
    return row
  })
}

/** @param {import("./doctor_text.js").Backend} one */
function backend({ name, on, why }) {
  const badge = element("span", { className: `badge ${on ? "good" : "off"}`, textContent: on ? word("on", "on") : word("off", "off") })
  const row = element("div", { className: "line" }, [badge, element("b", { textContent: name }), element("small", { textContent: why })])
  row.dataset.part = "doctor-backend"
  return row
}

/** @param {[string, string][]} pairs */
function facts(pairs) {
  return element("dl", {}, pairs.flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value, title: value })]))
}

/** @param {string} title @param {string} part @param {(Node | string)[]} children */
function section(title, part, children) {
  const made = element("div", { className: "part" }, [element("h3", { textContent: title }), ...children])
  made.dataset.part = part
  return made
}

/** @param {keyof HTMLElementTagNameMap} tag @param {string} part @param {string} words */
function text(tag, part, words) {
  const made = element(tag)
  made.textContent = words
  made.dataset.part = part
  return made
}

const STYLE = `
.tessera-doctor { height: 100%; box-sizing: border-box; display: flex; flex-direction: column; color: var(--input-text, #ddd);
  background: var(--comfy-menu-bg, #353535); font: 13px/1.4 Inter, Arial, sans-serif; --quiet: var(--descrip-text, #999); --line: var(--border-color, #4e4e4e); }
.tessera-doctor .body { flex: 1; min-height: 0; overflow: auto; padding: 12px; display: flex; flex-direction: column; gap: 12px; }
.tessera-doctor .foot { display: flex; gap: 8px; padding: 8px 12px; border-top: 1px solid var(--line); }
.tessera-doctor :is(p, h2, h3, dl, dd) { margin: 0; }
.tessera-doctor h2 { font-size: 15px; font-weight: 600; }
.tessera-doctor h3 { font-size: 11px; font-weight: 600; letter-spacing: 0.04em; text-transform: uppercase; color: var(--quiet); }
.tessera-doctor [data-part="doctor-verdict"] { font-size: 14px; font-weight: 600; padding: 8px 10px; border-radius: 6px; border-left: 4px solid var(--tone);
  background: color-mix(in srgb, var(--tone) 14%, transparent); }
.tessera-doctor [data-health="good"] { --tone: #2f9e6e; }
.tessera-doctor [data-health="mend"] { --tone: #d98200; }
.tessera-doctor [data-health="slow"] { --tone: #8a8a8a; }
.tessera-doctor [data-part="doctor-error"] { color: var(--error-text, #ff4444); }
.tessera-doctor .part { display: flex; flex-direction: column; gap: 6px; }
.tessera-doctor .fix, .tessera-doctor .format { display: flex; flex-direction: column; gap: 3px; }
.tessera-doctor .line { display: flex; flex-wrap: wrap; gap: 4px 8px; align-items: baseline; }
.tessera-doctor small { font-size: 11px; color: var(--quiet); overflow-wrap: anywhere; }
.tessera-doctor .line small { flex: 1; min-width: 120px; }
.tessera-doctor .format .line { flex-wrap: nowrap; }
.tessera-doctor b { font-weight: 600; }
.tessera-doctor .badge { flex: none; box-sizing: border-box; padding: 0 7px; border-radius: 9px; font-size: 11px; line-height: 18px; color: #fff; background: #6b6b6b; }
.tessera-doctor .badge.good { background: #1f7a52; }
.tessera-doctor .badge.fair { background: #1f6a9e; }
.tessera-doctor .badge.slow { background: #a35a00; }
.tessera-doctor .command { display: flex; gap: 6px; align-items: stretch; }
.tessera-doctor code { flex: 1; min-width: 0; padding: 5px 8px; border: 1px solid var(--line); border-radius: 5px; background: var(--comfy-input-bg, #222);
  font: 11px/1.4 monospace; overflow-wrap: anywhere; user-select: all; }
.tessera-doctor dl { display: grid; grid-template-columns: minmax(72px, max-content) minmax(0, 1fr); gap: 2px 10px; font-size: 12px; }
.tessera-doctor dt { color: var(--quiet); }
.tessera-doctor dd { overflow-wrap: anywhere; user-select: text; }
.tessera-doctor button { flex: none; box-sizing: border-box; min-height: 26px; padding: 0 10px; border: 1px solid var(--line); border-radius: 5px;
  background: var(--comfy-input-bg, #222); color: var(--input-text, #ddd); font: 12px Inter, Arial, sans-serif; cursor: pointer; }
.tessera-doctor button:disabled { opacity: 0.5; cursor: default; }
.tessera-doctor :is(button, code):focus-visible { outline: 2px solid var(--p-primary-color, #4a90e2); outline-offset: 1px; }
`
