// @ts-check
/** The clipboard, also on pages without TLS, where browsers offer it only to what is selected. */
import { element } from "./dom.js"

/** @param {string} text @returns {Promise<boolean>} whether it is there */
export async function copy(text) {
  if (window.isSecureContext && navigator.clipboard) {
    try {
      await navigator.clipboard.writeText(text)
      return true
    } catch {
      // not allowed here: as below
    }
  }
  const before = document.activeElement
  const area = element("textarea", { value: text, readOnly: true })
  Object.assign(area.style, { position: "fixed", top: "0", left: "0", opacity: "0" })
  document.body.append(area)
  area.select()
  const done = document.execCommand("copy")
  area.remove()
  if (before instanceof HTMLElement) before.focus()
  return done
}
