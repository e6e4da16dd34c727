// @ts-check
/** Small words for building a widget: elements with text, never with markup. */

/**
 * @template {keyof HTMLElementTagNameMap} T
 * @param {T} tag @param {Partial<HTMLElementTagNameMap[T]>} [properties] @param {(Node | string)[]} [children]
 * @returns {HTMLElementTagNameMap[T]}
 */
export function element(tag, properties = {}, children = []) {
  const made = Object.assign(document.createElement(tag), properties)
  made.append(...children)
  return made
}

/** A button with a sign on it and a sentence for those who do not see it. @param {string} sign @param {string} part @param {string} label @param {() => void} press */
export function button(sign, part, label, press) {
  const made = element("button", { type: "button", textContent: sign, title: label })
  made.addEventListener("click", press)
  return name(made, part, label)
}

/** @template {HTMLElement} T @param {T} control @param {string} part @param {string} label @returns {T} */
export function name(control, part, label) {
  control.dataset.part = part
  control.setAttribute("aria-label", label)
  return control
}

/** Runs more after an object's own handler. @param {any} owner @param {string} event @param {(...given: any[]) => void} more */
export function after(owner, event, more) {
  const before = owner[event]
  owner[event] = function () {
    const result = before?.apply(this, arguments)
    more(...arguments)
    return result
  }
}

/** Adds a stylesheet to the page, once. @param {string} id @param {string} rules */
export function addStyle(id, rules) {
  if (document.getElementById(id)) return
  document.head.append(element("style", { id, textContent: rules }))
}

/**
 * A widget's root inside a node: the canvas gets none of the keys and presses that are meant for a control in it.
 * @template {HTMLElement} T @param {T} root @returns {T}
 */
export function keepInside(root) {
  root.addEventListener("keydown", (event) => {
    if (!event.ctrlKey && !event.metaKey) event.stopPropagation() // Delete would remove the node
  })
  root.addEventListener("pointerdown", (event) => {
    const control = "input, select, button, textarea, [role=gridcell]"
    if (event.target instanceof Element && event.target.closest(control)) event.stopPropagation()
  })
  return root
}

const SLACK = 28 // pixels by which a node may be taller than it was made without its user having meant it

/** Makes room in a node for what one of its widgets shows now, and gives it back unless the user has made the node taller. @param {any} node @param {string} widget */
export function roomFor(node, widget) {
  let fitted = Infinity
  return () => {
    if (!node.widgets?.some((/** @type {any} */ one) => one.name === widget)) return
    const [width, now] = node.size
    const wanted = node.computeSize()[1]
    if (now < wanted || now - fitted < SLACK) node.setSize([width, wanted])
    fitted = wanted
    node.graph?.setDirtyCanvas(true, true)
  }
}
