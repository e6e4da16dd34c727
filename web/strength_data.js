// @ts-check
/** When a strength that is being moved should run the workflow: once, after it has been let go. */

export const REST = 250 // ms after the last key, wheel step or typed digit

/**
 * @typedef {object} Outside
 * @property {() => boolean} wanted whether to run at all, asked when it is time
 * @property {() => Promise<unknown>} run puts the workflow into the queue; false or a rejection: it was refused
 * @property {(then: () => void, ms: number) => any} [wait]
 * @property {(timer: any) => void} [forget]
 */

/** @param {Outside} outside */
export function release({ wanted, run, wait = setTimeout, forget = clearTimeout }) {
  let held = false // a pointer button is down
  let moved = false // since the last run was asked for
  let running = false // one of ours is in the queue or at work
  let seen = false // the queue was not empty since ours was put there: the word of an empty one may be an older one
  /** @type {any} */
  let timer = null

  function due(ms = REST) {
    forget(timer)
    timer = wait(go, ms)
  }

  async function go() {
    timer = null
    if (!moved || held || running) return // what comes next asks again
    moved = false
    if (!wanted()) return
    running = true
    seen = false
    const taken = await Promise.resolve().then(run).catch(() => false)
    if (taken === false) running = false
  }

  return {
    /** A strength has another value. */
    change() {
      moved = true
      if (!held) due()
    },
    press() {
      held = true
    },
    letGo() {
      held = false
      if (moved) due(0)
    },
    key() {
      if (moved && !held) due()
    },
    /** How many runs the queue holds now. Where it is empty, ours has ended: done, failed, or taken out. @param {number} left */
    queue(left) {
      if (left) seen = true
      else if (running && seen) {
        running = false
        if (moved && !held) due()
      }
    },
    busy: () => running,
  }
}

/**
 * What a release has to do where the frontend's Run button is in a mode: run; tell the frontend to look for changes, as it
 * then runs by itself; nothing, where it runs all the time.
 * @param {string | undefined} mode @returns {"run" | "look" | "nothing"}
 */
export function duty(mode) {
  if (mode === "change") return "look"
  return mode === "instant-running" || mode === "instant" ? "nothing" : "run"
}
