// @ts-check
/** Words in the page's language, for modules that need no page: words.js says which language that is. */

/** @type {() => Record<string, string> | undefined} */
let spoken = () => undefined

/** From now on words come from what this gives. @param {typeof spoken} translations */
export function speak(translations) {
  spoken = translations
}

/**
 * A text in the page's language, `{0}`, `{1}` filled in. @param {string} key @param {string} english @param {...unknown} values
 */
export function word(key, english, ...values) {
  const text = spoken()?.[key] ?? english
  return text.replace(/\{(\d)\}/g, (/** @type {string} */ _, /** @type {string} */ at) => String(values[Number(at)]))
}
