// @ts-check
/** Nodes 2.0 keeps a widget's old element on the page where undo, or another workflow, has made its node anew. */

const WAIT = 60 // milliseconds, until the frontend has mounted what it mounts
const TRIES = 10

/** Puts a node's element where an earlier node of the same number has left its own. @param {any} node @param {HTMLElement} root with a data-part */
export function remount(node, root, tries = TRIES) {
  setTimeout(() => {
    if (!node.graph) return
    const old = document.querySelector(`[data-node-id="${CSS.escape(String(node.id))}"] [data-part="${root.dataset.part}"]`)
    if (old && old !== root && !root.isConnected) old.replaceWith(root)
    else if (tries && !root.isConnected) remount(node, root, tries - 1)
  }, WAIT)
}
