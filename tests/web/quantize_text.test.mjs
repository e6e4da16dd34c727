import assert from "node:assert/strict"
import { test } from "node:test"

import { duration, markdown, newest, percent, size, sorted } from "../../web/quantize_text.js"

test("sizes, times and errors are written as in the report", () => {
  assert.deepEqual([size(12_310_000_000), size(99_999_999), size(0)], ["12.31 GB", "100.00 MB", "0.00 MB"])
  assert.deepEqual([duration(0.4), duration(61.5), duration(3599.6), duration(-3)], ["0:00", "1:02", "1:00:00", "0:00"])
  assert.deepEqual([percent(0.05449), percent(0.0001234), percent(0)], ["5.45 %", "0.0123 %", "0 %"])
})

const job = (name, node, prompt, workflow = "a") => ({ job: name, node, prompt, workflow })

test("of several jobs of a node the newest is shown, but one of this page before all others", () => {
  const jobs = [job("4", "5", "theirs"), job("3", "5", "ours"), job("2", "57:5", "x"), job("1", "5", "y", "b")]
  assert.deepEqual(newest(jobs, new Set()).map((one) => one.job), ["4", "2", "1"])
  assert.deepEqual(newest(jobs, new Set(["ours"])).map((one) => one.job), ["3", "2", "1"])
})

const report = {
  lines: ["a.safetensors: 9 MB", "note: rule 3 matches no layer"],
  columns: ["layer", "format", "MB"],
  rows: [["layers.0|x", "nvfp4", "0.29"]],
}

test("the markdown is the summary and a table that no name breaks", () => {
  assert.deepEqual(markdown(report).split("\n"), [
    "- a.safetensors: 9 MB", "- note: rule 3 matches no layer", "",
    "| layer | format | MB |", "|-|-|-:|", "| layers.0\\|x | nvfp4 | 0.29 |",
  ]) // prettier-ignore
  assert.equal(markdown({ lines: ["only"], columns: [], rows: [] }), "- only")
})

test("notes are told from results", () => {
  assert.deepEqual(sorted(report), { made: ["a.safetensors: 9 MB"], notes: ["rule 3 matches no layer"] })
})
