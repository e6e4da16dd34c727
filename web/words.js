// @ts-check
/** The page's language for what Tessera itself says: `locales/<language>/main.json`, as the host serves it. */
import { api, app } from "./frontend.js"
import { speak } from "./translation.js"

export { word } from "./translation.js"

/** @type {Record<string, any>} */
let translations = {}

app.registerExtension({
  name: "tessera.words",
  /** Asks the host once, before other extensions are set up. In a language that is not there, words are English. */
  async init() {
    try {
      translations = await (await api.fetchApi("/i18n")).json()
    } catch {
      translations = {}
    }
    speak(() => translations[app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"]?.tessera)
  },
})
