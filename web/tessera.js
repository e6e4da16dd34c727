// @ts-check
/** Tessera's settings. Python reads MergeGuard and CacheLimit from the user's comfy.settings.json. */
import { element } from "./dom.js"
import { api, app } from "./frontend.js"
import { word } from "./words.js"

/** New nodes' inputs that the user has a default for. @type {Record<string, Record<string, string>>} */
const DEFAULTS = {
  TesseraDiffusionModelLoader: { speed: "Tessera.Speed", cache: "Tessera.Cache" },
  TesseraCLIPLoader: { speed: "Tessera.Speed", cache: "Tessera.Cache" },
  TesseraQuantize: { rank: "Tessera.Rank" },
  TesseraBake: { rank: "Tessera.Rank" },
}

app.registerExtension({
  name: "tessera.settings",
  settings: [
    {
      id: "Tessera.MergeGuard",
      category: ["Tessera", "LoRA", "Merge guard"],
      name: "Run LoRAs of ComfyUI's own nodes beside quantized weights",
      tooltip:
        "On: Load LoRA and other nodes act on models and text encoders from Tessera's loaders without merging, as " +
        "exactly as Load LoRA (Tessera). Off: ComfyUI merges them into the quantized weights, which loses most of a " +
        "weak LoRA. Takes effect when the node runs next.",
      type: "boolean",
      defaultValue: true,
    },
    {
      id: "Tessera.Speed",
      category: ["Tessera", "New nodes", "Speed"],
      name: "speed of new loaders",
      tooltip: "What speed is set to in loaders that you add from now on. Nodes that are there stay as they are.",
      type: "combo",
      options: [
        { text: "auto", value: "auto" },
        { text: "exact", value: "exact" },
      ],
      defaultValue: "auto",
    },
    {
      id: "Tessera.Cache",
      category: ["Tessera", "New nodes", "Cache"],
      name: "cache of new loaders",
      tooltip:
        "Whether loaders that you add from now on keep layers that were turned into another format on disk, so that " +
        "the next start only reads them.",
      type: "boolean",
      defaultValue: false,
    },
    {
      id: "Tessera.Rank",
      category: ["Tessera", "New nodes", "Rank"],
      name: "rank of new quantize nodes",
      tooltip:
        "Rank of the error-correction LoRA in Quantize and Save and in Bake LoRAs and Save, where you add them from " +
        "now on. 0 makes no LoRA.",
      type: "number",
      attrs: { min: 0, max: 256, step: 1, showButtons: true },
      defaultValue: 32,
    },
    {
      id: "Tessera.CacheLimit",
      category: ["Tessera", "Cache", "Limit"],
      name: "Largest size of the transcoding cache, in GB",
      tooltip:
        "After a loader with cache has written, files that were used longest ago are deleted until the rest fits; " +
        "the one in use stays. They are made anew when they are needed. 0: no limit.",
      type: "number",
      attrs: { min: 0, max: 100000, step: 1, maxFractionDigits: 3, showButtons: true },
      defaultValue: 100,
    },
    {
      id: "Tessera.CacheFolder",
      category: ["Tessera", "Cache", "Folder"],
      name: "The transcoding cache now",
      tooltip: "Where it is and what it takes. Its files may be deleted at any time while no model is loading.",
      type: cacheFolder,
      defaultValue: "",
    },
  ],
  nodeCreated(/** @type {any} */ node) {
    if (app.configuringGraph) return // a workflow that is loaded says itself what its nodes are set to
    for (const [input, setting] of Object.entries(DEFAULTS[node.comfyClass] ?? {})) {
      const widget = node.widgets?.find((/** @type {any} */ widget) => widget.name === input)
      const value = app.extensionManager?.setting?.get(setting)
      if (widget && value != null) widget.value = value
    }
  },
})

/** A line of text that says where the cache is and how large. */
function cacheFolder() {
  const line = element("span", { className: "tessera-cache-folder", textContent: "user/tessera/transcoded" })
  line.style.cssText = "overflow-wrap: anywhere; color: var(--descrip-text, #999); font-size: 12px; max-width: 24rem"
  api
    .fetchApi("/tessera/doctor")
    .then((answer) => answer.json())
    .then(({ diagnosis: { comfyui } }) => {
      const { cache_bytes: bytes, cache_files: files, cache_folder: folder } = comfyui
      const size = (bytes / 1e9).toFixed(bytes < 1e8 ? 3 : 1)
      line.textContent = files
        ? word("cache_now", "{0} GB in {1} files, {2}", size, files, folder)
        : word("cache_empty", "empty, {0}", folder)
    })
    .catch(() => {}) // an older server still runs: the folder's name alone
  return line
}
