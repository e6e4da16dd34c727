// @ts-check
/** The clipboard, also on pages without TLS, where browsers offer it only to what is selected. */
import { button, element } from "./dom.js"
import { word } from "./translation.js"

/** @param {string} text @returns {Promise<boolean>} whether it is there */
async function copy(text) {
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

/** A button that copies a text, and says whether it did. @param {string} sign @param {string} part @param {string} label @param {() => string} text */
export function copyButton(sign, part, label, text) {
  const made = button(sign, part, label, async () => {
    made.textContent = (await copy(text())) ? word("copied", "Copied") : word("not_copied", "The browser refused")
    setTimeout(() => (made.textContent = sign), 2000)
  })
  return made
}
