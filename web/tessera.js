// @ts-check
/** Tessera's settings. Python reads them from the user's comfy.settings.json. */
import { app } from "./frontend.js"

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
  ],
})
