import assert from "node:assert/strict"
import { test } from "node:test"

import { byPath, byTarget, grade, health, machine, reasons } from "../../web/doctor_text.js"

const plan = (path, target = "", reason = "") => ({ path, target, reason, kernel: "", fix: "" })
const found = (plans, fixes = []) => ({ plans, fixes, machine: [["device", "GPU"], ["comfy-kitchen backends", "eager on"]] })

test("formats are sorted by what happens to them, the best first, and no path is lost", () => {
  const plans = { a: plan("decode"), b: plan("native"), c: plan("native"), d: plan("another") }
  assert.deepEqual(byPath(found(plans)), [["native", ["b", "c"]], ["decode", ["a"]], ["another", ["d"]]])
  assert.equal(grade("another"), "slow")
})

test("the verdict's colour follows from what can be mended, then from what is slow", () => {
  const fix = (optional) => ({ what: "x", command: "", optional })
  assert.equal(health(found({ a: plan("native") }, [fix(true)])), "good")
  assert.equal(health(found({ a: plan("decode") }, [fix(true)])), "slow")
  assert.equal(health(found({ a: plan("native") }, [fix(false)])), "mend")
})

test("what is true of several formats is said once, last", () => {
  assert.deepEqual(reasons(["no a; int8 on cpu", "no b; int8 on cpu"]), ["no a", "no b", "int8 on cpu"])
  assert.deepEqual(reasons(["same", "same"]), ["same"])
  assert.deepEqual(reasons([]), [])
  assert.deepEqual(byTarget({ a: plan("t", "x"), b: plan("t", "y"), c: plan("t", "x") }, ["a", "b", "c"]), [["x", ["a", "c"]], ["y", ["b"]]])
})

test("backends have a list of their own", () => {
  assert.deepEqual(machine(found({})), [["device", "GPU"]])
})
