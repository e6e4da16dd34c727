// @ts-check
/**
 * The doctor's diagnosis in the words of its panel.
 *
 * @typedef {{ path: string, target: string, kernel: string, reason: string, fix: string }} Plan
 * @typedef {{ what: string, command: string, optional: boolean }} Fix
 * @typedef {{ name: string, on: boolean, why: string }} Backend
 * @typedef {{ version: string, device: string, verdict: string, machine: [string, string][], plans: Record<string, Plan>,
 *   backends: Backend[], fixes: Fix[], comfyui: any }} Diagnosis
 */

/** What a path means for who reads it, the best first. @type {Record<string, string>} */
export const PATHS = {
  native: "native",
  transcode: "transcoded",
  "weight-only": "decoded in the product",
  decode: "decoded",
}

/** How well a path serves: good, fair or slow. @param {string} path */
export function grade(path) {
  return path === "native" ? "good" : path === "transcode" ? "fair" : "slow"
}

/** Whether anything is wrong that the user can mend. @param {Diagnosis} found */
export function health({ fixes, plans }) {
  if (fixes.some((fix) => !fix.optional)) return "mend"
  return Object.values(plans).some((plan) => grade(plan.path) === "slow") ? "slow" : "good"
}

/** Formats by what happens to them here, the best path first. @param {Diagnosis} found @returns {[string, string[]][]} */
export function byPath({ plans }) {
  const paths = [...new Set([...Object.keys(PATHS), ...Object.values(plans).map((plan) => plan.path)])]
  const labels = (/** @type {string} */ path) => Object.keys(plans).filter((label) => plans[label].path === path)
  return paths.map((path) => /** @type {[string, string[]]} */ ([path, labels(path)])).filter(([, some]) => some.length)
}

/** Formats of one path by what they are turned into. @param {Record<string, Plan>} plans @param {string[]} labels @returns {[string, string[]][]} */
export function byTarget(plans, labels) {
  const targets = [...new Set(labels.map((label) => plans[label].target))]
  return targets.map((target) => [target, labels.filter((label) => plans[label].target === target)])
}

/** What several reasons have in common last, and once. @param {string[]} all parts of a reason stand between semicolons */
export function reasons(all) {
  const parts = all.map((reason) => reason.split("; "))
  const shared = (parts[0] ?? []).filter((part) => parts.every((some) => some.includes(part)))
  const own = [...new Set(parts.map((some) => some.filter((part) => !shared.includes(part)).join("; ")))]
  return [...own, shared.join("; ")].filter(Boolean)
}

const ELSEWHERE = ["comfy-kitchen backends", "safetensors", "numpy", "platform"] // in the panel, or in the markdown alone

/** Facts of the machine that the panel lists. @param {Diagnosis} found */
export function machine({ machine: all }) {
  return all.filter(([name]) => !ELSEWHERE.includes(name))
}
