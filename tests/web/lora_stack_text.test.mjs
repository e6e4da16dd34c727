// node --test tests/web/*.test.mjs; the same cases in Python: tests/test_lora_stack.py
import assert from "node:assert/strict"
import { readFileSync } from "node:fs"
import { test } from "node:test"
import { format, move, parse, strength } from "../../web/lora_stack_text.js"

const cases = JSON.parse(readFileSync(new URL("lora_stack_cases.json", import.meta.url)))

for (const { text, active, written } of cases.lines) {
  test(`${JSON.stringify(text)} gives the rows that the host attaches`, () => {
    const on = parse(text).filter((row) => row.on)
    assert.deepEqual(on.map((row) => [row.name, row.model, row.clip ?? row.model]), active)
  })

  test(`${JSON.stringify(text)} is written in one form, which stays as it is`, () => {
    assert.equal(format(parse(text)), written)
    assert.equal(format(parse(written)), written)
  })
}

test("a row moves to its new place and no other changes its order", () => {
  assert.deepEqual(move(["a", "b", "c"], 0, 2), ["b", "c", "a"])
  assert.deepEqual(move(["a", "b", "c"], 2, 0), ["c", "a", "b"])
})

test("a field gives a number within the limits, or null", () => {
  assert.deepEqual(["0.8", "", " ", "x", "250", "-1e9"].map(strength), [0.8, null, null, null, 100, -100])
})
