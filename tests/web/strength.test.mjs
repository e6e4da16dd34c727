// When a strength that is being moved runs the workflow. node --test tests/web/*.test.mjs
import assert from "node:assert/strict"
import { test } from "node:test"

import { REST, duty, release } from "../../web/strength_data.js"

/** A release with a clock of its own: what ran, and how to let time pass. */
function made({ wanted = () => true, taken = () => true } = {}) {
  const timers = new Map()
  let now = 0
  let ids = 0
  const runs = []
  const slider = release({
    wanted,
    run: async () => {
      runs.push(now)
      return taken()
    },
    wait: (then, ms) => (timers.set(++ids, [now + ms, then]), ids),
    forget: (id) => timers.delete(id),
  })
  async function pass(ms) {
    now += ms
    for (const [id, [at, then]] of [...timers]) if (at <= now && timers.delete(id)) then()
    for (let i = 0; i < 5; i++) await null
  }
  return { slider, runs, pass }
}

test("a slider that is dragged runs once, when it is let go", async () => {
  const { slider, runs, pass } = made()
  slider.press()
  for (let i = 0; i < 20; i++) {
    slider.change()
    await pass(100)
  }
  assert.equal(runs.length, 0)
  slider.letGo()
  await pass(0)
  assert.equal(runs.length, 1)
  await pass(10000)
  assert.equal(runs.length, 1)
})

test("keys run once, a rest after the last", async () => {
  const { slider, runs, pass } = made()
  for (let i = 0; i < 5; i++) {
    slider.key()
    slider.change()
    await pass(REST - 50)
  }
  assert.equal(runs.length, 0)
  await pass(50)
  assert.equal(runs.length, 1)
})

test("a press that moves nothing runs nothing", async () => {
  const { slider, runs, pass } = made()
  slider.press()
  slider.letGo()
  slider.key()
  await pass(1000)
  assert.equal(runs.length, 0)
})

test("moves while one of ours runs make one more, at its end", async () => {
  const { slider, runs, pass } = made()
  slider.change()
  await pass(REST)
  slider.queue(0) // of the run before, late
  slider.queue(1)
  for (let i = 0; i < 3; i++) {
    slider.press()
    slider.change()
    slider.letGo()
    await pass(1000)
  }
  assert.equal(runs.length, 1)
  slider.queue(0)
  await pass(REST)
  assert.equal(runs.length, 2)
  slider.queue(1)
  slider.queue(0)
  await pass(1000)
  assert.equal(runs.length, 2)
})

test("an end while the slider is held waits for the release", async () => {
  const { slider, runs, pass } = made()
  slider.change()
  await pass(REST)
  slider.press()
  slider.change()
  slider.queue(1)
  slider.queue(0)
  await pass(5000)
  assert.equal(runs.length, 1)
  slider.letGo()
  await pass(0)
  assert.equal(runs.length, 2)
})

test("a refused run does not block the next", async () => {
  for (const taken of [() => false, () => { throw new Error("invalid") }]) {
    const { slider, runs, pass } = made({ taken })
    slider.change()
    await pass(REST)
    slider.change()
    await pass(REST)
    assert.equal(runs.length, 2)
    assert.equal(slider.busy(), false)
  }
})

test("nothing runs where it is not wanted, and nothing is made up for later", async () => {
  let on = false
  const { slider, runs, pass } = made({ wanted: () => on })
  slider.change()
  await pass(REST)
  on = true
  slider.letGo()
  slider.key()
  await pass(1000)
  assert.equal(runs.length, 0)
  slider.change()
  await pass(REST)
  assert.equal(runs.length, 1)
})

test("the frontend's own modes are known by name", () => {
  const modes = ["disabled", "instant-idle", undefined, "change", "instant-running", "instant"]
  assert.deepEqual(modes.map(duty), ["run", "run", "run", "look", "nothing", "nothing"])
})
