// @ts-check
/** The one module that knows ComfyUI's frontend; everything else imports `app` and `api` from here. */
// @ts-ignore served by ComfyUI
import { api } from "../../scripts/api.js"
// @ts-ignore served by ComfyUI
import { app } from "../../scripts/app.js"

export { api, app }

/** The open workflow's graph, outside all subgraphs. */
export function rootGraph() {
  return app.rootGraph ?? app.graph
}

/** The node that the server calls "57:30": node 30 of the subgraph that node 57 is. @param {string | number} id */
export function nodeAt(id) {
  const at = (/** @type {any} */ graph, /** @type {string} */ one) => graph?.getNodeById?.(one) ?? graph?.getNodeById?.(Number(one))
  const [last, ...folders] = String(id).split(":").reverse()
  return at(folders.reduceRight((graph, folder) => at(graph, folder)?.subgraph, rootGraph()), last)
}

/** What keeps the open workflow's steps for Undo, in frontends that have it. */
export function changeTracker() {
  return app.extensionManager?.workflow?.activeWorkflow?.changeTracker
}

/** Lets it see what has changed since it last looked. @param {any} tracker */
export function lookForChanges(tracker) {
  const look = tracker?.captureCanvasState ?? tracker?.checkState // its name before 1.44
  look?.call(tracker)
}
