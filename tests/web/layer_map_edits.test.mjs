// node --test tests/web/*.test.mjs; the same lines in Python: tests/test_layer_map_edits.py
import assert from "node:assert/strict"
import { readFileSync } from "node:fs"
import { test } from "node:test"
import { parse } from "../../web/layer_map_data.js"
import { apply, brushOf, brushed, brushes, forecast, locked, numbers, planned, ranks, read, write } from "../../web/layer_map_edits.js"
import { models, planOf } from "./layer_map_names.mjs"

const cases = JSON.parse(readFileSync(new URL("layer_map_cases.json", import.meta.url)))

for (const { text, layers, format, rank } of cases.lines) {
  test(`${text}: names the layers that Python's edits name`, () => {
    const { chosen, problems } = read(text, parse(planOf(cases.names)).layers)
    assert.deepEqual([...chosen.keys()].map((index) => cases.names[index]), layers)
    for (const option of chosen.values()) assert.deepEqual([brushOf(option.format), option.rank], [format, rank])
    assert.deepEqual(problems, [])
  })
}

/** What is painted: {name or function of names: [brush, rank]}. */
function painted(names, fixed, strokes) {
  const { layers } = parse(planOf(names, fixed))
  const chosen = new Map()
  for (const [which, brush, rank] of strokes) {
    for (const layer of layers.filter((layer) => which(layer.name))) {
      const option = brushed(layer, brush, rank)
      if (option) chosen.set(layer.index, option)
    }
  }
  return { layers, chosen }
}

function effective(layers, chosen) {
  return layers.map((layer) => chosen.get(layer.index) ?? planned(layer))
}

test("a painted row is one line, a painted block is one line, a lone tile is named", () => {
  const row = painted(models.zImage, [], [[(name) => /^layers\..*w1$/.test(name), "mxfp8", 0]])
  assert.equal(write(row.layers, row.chosen), "layers.*.feed_forward.w1 = mxfp8")
  const block = painted(models.zImage, [], [[(name) => /^layers\.[34]\./.test(name), "int8_convrot", 32]])
  assert.equal(write(block.layers, block.chosen), "layers.{3-4}.** = int8_convrot r32")
  const all = painted(models.zImage, [], [[(name) => name.startsWith("layers."), "keep", 0]])
  assert.equal(write(all.layers, all.chosen), "layers.** = keep")
  const alone = painted(models.zImage, [], [[(name) => name === "layers.3.attention.qkv" || name === "x_embedder", "int8_convrot", 0]])
  assert.equal(write(alone.layers, alone.chosen), "layers.3.attention.qkv = int8_convrot\nx_embedder = int8_convrot")
})

test("a pattern never reaches a layer that is otherwise", () => {
  const fixed = ["layers.0.feed_forward.w1", "layers.7.adaLN_modulation.0"]
  const { layers, chosen } = painted(models.zImage, fixed, [[(name) => /w1$|^layers\.7\./.test(name), "int8_convrot", 16]])
  const text = write(layers, chosen)
  assert.deepEqual(effective(layers, read(text, layers).chosen), effective(layers, chosen))
  for (const line of text.split("\n")) {
    const matched = read(line.replace(/=.*/, "= keep"), parse(planOf(models.zImage)).layers).chosen
    assert.ok(fixed.every((name) => !matched.has(models.zImage.indexOf(name))), line)
  }
})

for (const [model, names] of Object.entries(models)) {
  test(`${model}: whatever is painted is read back from its text`, () => {
    let seed = 7
    const random = (below) => (seed = (seed * 48271) % 2147483647) % below
    for (let round = 0; round < 3; round += 1) {
      const strokes = Array.from({ length: 1 + random(5) }, () => {
        const [start, length, every] = [random(names.length), 1 + random(40), 1 + random(3)]
        const hit = new Set(names.filter((_, at) => at >= start && at < start + length && at % every === 0))
        return [(name) => hit.has(name), ["nvfp4", "mxfp8", "int8_convrot", "keep"][random(4)], [null, 0, 16, 32][random(4)]]
      })
      const { layers, chosen } = painted(names, names.slice(0, 2), strokes)
      const text = write(layers, chosen)
      const again = read(text, layers)
      assert.deepEqual(effective(layers, again.chosen), effective(layers, chosen), text)
      assert.equal(write(layers, again.chosen, again.others), text)
    }
  })
}

test("lines that mean nothing here stay, and are said", () => {
  const { layers } = parse(planOf(models.zImage))
  const text = "# for the other model\nblocks.3.x = nvfp4\nnot a line\nlayers.3.attention.qkv = nvfp4 r48"
  const { chosen, others, problems } = read(text, layers)
  assert.equal(chosen.size, 0)
  assert.equal(others.join("\n"), text)
  assert.deepEqual(problems.map((problem) => problem.slice(0, 7)), ["Line 2,", "Line 3,", "Line 4,"])
  chosen.set(layers.at(-1).index, brushed(layers.at(-1), "keep", null))
  assert.ok(write(layers, chosen, others).startsWith(`${text}\n`))
})

test("later lines win", () => {
  const { layers } = parse(planOf(models.zImage))
  const { chosen } = read("layers.** = mxfp8\nlayers.3.** = keep", layers)
  const of = (name) => chosen.get(layers.find((layer) => layer.name === name).index).format
  assert.deepEqual([of("layers.2.attention.qkv"), of("layers.3.attention.qkv")], ["mxfp8", "keep"])
})

test("size and error are those of what is chosen: bytes add up, so do squared errors", () => {
  const map = parse(planOf(models.qwen, models.qwen.slice(0, 3)))
  const { now, plan } = forecast(map, new Map())
  assert.deepEqual(now, plan)
  const layer = map.layers[20]
  const chosen = new Map([[20, brushed(layer, "keep", null)]])
  const changed = forecast(map, chosen).now
  assert.equal(changed.nbytes, plan.nbytes - planned(layer).nbytes + 1600)
  assert.ok(Math.abs(changed.error ** 2 - (plan.error ** 2 - planned(layer).damage)) < 1e-12)
})

test("edited layers show what they would be, and what was planned once the edit is gone", () => {
  const map = parse(planOf(models.qwen))
  const before = map.layers.map((layer) => [layer.format, layer.rank])
  const chosen = new Map([[5, brushed(map.layers[5], "int8_convrot", 32)]])
  apply(map.layers, chosen)
  assert.deepEqual([map.layers[5].format, map.layers[5].rank, map.layers[5].edited], ["int8_convrot_64", 32, true])
  assert.equal(map.layers.filter((layer) => layer.edited).length, 1)
  apply(map.layers, new Map())
  assert.deepEqual(map.layers.map((layer) => [layer.format, layer.rank]), before)
})

test("a brush keeps a layer's rank, or takes the nearest that there is", () => {
  const { layers } = parse(planOf(models.qwen))
  assert.deepEqual(brushes(layers), ["nvfp4", "mxfp8", "int8_convrot", "keep"])
  assert.deepEqual(ranks(layers), [0, 16, 32])
  assert.equal(brushed(layers[1], "mxfp8", null).rank, layers[1].rank)
  assert.equal(brushed(layers[1], "mxfp8", 64).rank, 32)
  assert.equal(brushed(layers[1], "keep", 32).rank, 0)
})

test("layers without a choice take no brush", () => {
  const { layers } = parse(planOf(models.qwen, [models.qwen[0]]))
  assert.deepEqual([locked(layers[0]), locked(layers[1])], [true, false])
  assert.equal(brushed(layers[0], "mxfp8", null), undefined)
})

test("numbers are spans", () => {
  assert.deepEqual([[3], [0, 1, 2, 5], [4, 5]].map(numbers), ["3", "{0-2,5}", "{4-5}"])
})
