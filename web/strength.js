// @ts-check
/** Runs the workflow when a strength slider is let go: the setting Tessera.QueueOnRelease. */
import { after } from "./dom.js"
import { api, app, changeTracker, lookForChanges } from "./frontend.js"
import { duty, release } from "./strength_data.js"

const SETTING = "Tessera.QueueOnRelease"
/** @type {Record<string, string[]>} node -> its strengths */
const STRENGTHS = {
  TesseraCorrectionLoRA: ["strength"],
  TesseraLoRA: ["strength_model", "strength_clip"],
}

const slider = release({ wanted, run: () => app.queuePrompt(0, 1) })

app.registerExtension({
  name: "tessera.strength",
  settings: [
    {
      id: SETTING,
      category: ["Tessera", "LoRA", "Run on release"],
      name: "Run when the strength slider is released",
      tooltip:
        "On: letting go of a strength of Error-Correction LoRA (Tessera) or Load LoRA (Tessera) runs the workflow, " +
        "again at the end if you moved on meanwhile. Where the Run button is set to run on change, that does it.",
      type: "boolean",
      defaultValue: false,
    },
  ],
  setup() {
    const early = { capture: true, passive: true }
    window.addEventListener("pointerdown", () => slider.press(), early)
    window.addEventListener("pointerup", (event) => event.buttons === 0 && slider.letGo(), early)
    window.addEventListener("pointercancel", () => slider.letGo(), early)
    window.addEventListener("blur", () => slider.letGo())
    window.addEventListener("keydown", () => slider.key(), early)
    api.addEventListener("status", (/** @type {any} */ event) => {
      slider.queue(event.detail?.exec_info?.queue_remaining ?? 0)
    })
  },
  nodeCreated(/** @type {any} */ node) {
    for (const name of STRENGTHS[node.comfyClass] ?? []) {
      const widget = node.widgets?.find((/** @type {any} */ other) => other.name === name)
      if (widget) watch(widget)
    }
  },
})

/** The callback comes with every move, and again with the same value. @param {any} widget */
function watch(widget) {
  let last = widget.value
  after(widget, "callback", () => {
    if (widget.value === last) return
    last = widget.value
    slider.change()
  })
}

function wanted() {
  const manager = app.extensionManager
  if (manager?.setting?.get(SETTING) !== true) return false
  const what = duty(manager.queueSettings?.mode)
  if (what === "look") lookForChanges(changeTracker()) // Nodes 2.0 misses a slider until the next click; what is seen runs once
  return what === "run"
}
