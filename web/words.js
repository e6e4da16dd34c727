// @ts-check
/** The page's language for what Tessera itself says: `locales/<language>/main.json`, as the host serves it. */
import { api, app } from "./frontend.js"

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
  },
})

/**
 * A text in the page's language, `{0}`, `{1}` filled in. @param {string} key @param {string} english @param {...unknown} values
 */
export function word(key, english, ...values) {
  const language = app.extensionManager?.setting?.get("Comfy.Locale") ?? "en"
  const text = translations[language]?.tessera?.[key] ?? english
  return text.replace(/\{(\d)\}/g, (/** @type {string} */ _, /** @type {string} */ at) => String(values[Number(at)]))
}
