// node --test tests/web/*.test.mjs
import assert from "node:assert/strict"
import { test } from "node:test"
import { FORMATS, STEPS, family, schemes } from "../../web/layer_map_colours.js"
import { arrange, bytes, costliest, describe, flags, lines, parse, percent, shortNames } from "../../web/layer_map_data.js"
import { models, planOf } from "./layer_map_names.mjs"

const bands = (names) => arrange(names).map(({ rows, bands }) => [rows.length, bands.map((band) => [band.stack, band.columns.length])])

test("Z-Image's blocks stand beside each other over the same six rows, whatever has no block in a row of its own", () => {
  assert.deepEqual(bands(models.zImage), [[6, [["context_refiner", 2], ["layers", 30], ["noise_refiner", 2]]], [1, [["", 6]]]])
})

test("stacks of different kinds of blocks are grids of their own", () => {
  assert.deepEqual(bands(models.flux), [[10, [["double_blocks", 19]]], [3, [["single_blocks", 38]]], [1, [["", 4]]]])
})

test("a number inside a block is no block", () => {
  assert.deepEqual(bands(models.wan), [[10, [["blocks", 40]]], [1, [["", 4]]]])
  assert.deepEqual(bands(models.qwen), [[7, [["model.layers", 36]]]])
  assert.deepEqual(bands(models.t5), [[7, [["encoder.block", 24]]], [1, [["", 1]]]])
})

test("of several numbers the one that gives the fullest grid counts blocks", () => {
  const [transformers] = arrange(models.sdxl).filter(({ rows }) => rows.includes("attn1.to_q"))
  assert.equal(transformers.rows.length, 10)
  assert.deepEqual(transformers.bands.map((band) => band.columns.length), [2, 10, 10, 10])
  assert.ok(transformers.bands.every((band) => band.columns.every(({ cells }) => cells.every((cell) => cell !== undefined))))
  const called = shortNames(transformers.bands.map((band) => band.stack))
  assert.deepEqual(called, ["input_blocks.4", "input_blocks.7", "middle_block", "output_blocks.0"])
})

for (const [model, names] of Object.entries(models)) {
  test(`${model}: every layer has one tile, blocks in ascending order`, () => {
    const panels = arrange(names)
    const cells = panels.flatMap(({ bands }) => bands.flatMap(({ columns }) => columns.flatMap((column) => column.cells)))
    assert.deepEqual(cells.filter((cell) => cell !== undefined).sort((a, b) => a - b), names.map((_, index) => index))
    for (const { columns } of panels.flatMap(({ bands }) => bands)) {
      const numbers = columns.map((column) => column.number)
      assert.deepEqual(numbers, [...numbers].sort((a, b) => a - b))
    }
  })

  for (const room of [200, 330, 420, 900]) {
    test(`${model}: a map of ${room} pixels holds all columns, in tiles that are not too narrow`, () => {
      for (const panel of arrange(names)) {
        const split = lines(panel, room, 7, 9)
        const count = (some) => some.reduce((sum, band) => sum + band.columns.length, 0)
        assert.equal(count(split.flat()), count(panel.bands))
        for (const line of split) assert.ok(count(line) * 7 + 9 * (line.length - 1) <= room, `${count(line)} columns`)
      }
    })
  }
}

test("names above bands cover neither each other nor another's leader", () => {
  const starts = [0, 25, 50, 75, 200, 380]
  const placed = flags(starts.map((x) => ({ x, width: 90 })), 400)
  placed.forEach((one, n) => placed.slice(n + 1).forEach((other) => {
    const apart = one.left + one.width < other.left || other.left + other.width < one.left
    if (one.level === other.level) assert.ok(apart)
    const [upper, lower] = one.level > other.level ? [one, other] : [other, one]
    if (upper.level > lower.level) assert.ok(upper.x < lower.left || upper.x >= lower.left + lower.width)
  })) // prettier-ignore
  assert.ok(placed.every((flag) => flag.left >= 0 && flag.left + flag.width <= 400))
})

const strange = [null, undefined, {}, { layers: null }, { layers: { name: "x" } }, { layers: { name: ["a"] } }, { layers: { name: ["a"], format: [7], error: ["x"], ran: [null] }, formats: [] }]
for (const payload of strange) {
  test(`${JSON.stringify(payload)} is a map of what is known of it`, () => {
    const map = parse(payload)
    assert.ok(map.layers.length <= 1)
    schemes(map).forEach((scheme) => map.layers.forEach((layer) => scheme.of(layer)))
    map.layers.forEach((layer) => assert.equal(describe(layer, map).name, "a"))
    arrange(map.layers.map((layer) => layer.name))
  })
}

function loaded() {
  return parse({
    kind: "inspected", measure: "weight error", formats: ["nvfp4", "bf16", "int8_convrot_256"], kernels: ["int8_gemm"], reasons: ["no 4-bit multiplication here"],
    layers: {
      name: ["layers.0.w", "layers.1.w", "head"], format: [0, 0, 1], shape: [[80, 10], [80, 10], [4, 4]], bits: [4.5, 4.5, 16], nbytes: [450, 450, 3_200_000],
      error: [0.0912, 0.08, null], corrected: [0.06, null, null], sensitivity: [null, null, null], kernel: [0, 0, -1], ran: [[[0, 16]], [], null],
      path: ["transcode", "transcode", ""], reason: [0, -1, -1], rank: [32, 0, 0], strength: [0.8, null, null], edited: [0, 0, 0], kept: [2, 2, -1], added: [0.006, null, null],
    },
  }) // prettier-ignore
}

test("a layer's words say format, size, error and what corrects it, how it runs and why", () => {
  const map = loaded()
  assert.deepEqual(describe(map.layers[0], map), {
    name: "layers.0.w",
    lines: [
      "nvfp4 · 4.50 bits per weight · 450 bytes · 80 × 10",
      "weight error 9.12 % → 6 % with correction of rank 32 at strength 0.8 · turning it into int8_convrot_256 added 0.6 %",
      "transcode as int8_convrot_256 · kernel int8_gemm · ran int8_gemm × 16 · no 4-bit multiplication here",
    ],
  })
  assert.match(describe(map.layers[1], map).lines.at(-1), /has not run yet/)
  assert.deepEqual(describe(map.layers[2], map).lines, ["bf16 · 16.00 bits per weight · 3.20 MB · 4 × 4"])
  assert.deepEqual(costliest(map, 3).map((layer) => layer.name), ["layers.1.w", "layers.0.w"])
})

test("only what is known can be coloured by, and a legend counts every layer once", () => {
  const map = loaded()
  assert.deepEqual(schemes(map).map((scheme) => scheme.id), ["format", "error", "size", "kernel"])
  for (const { entries, scale, of } of schemes(map)) {
    if (!scale) assert.equal(entries.reduce((sum, entry) => sum + entry.count, 0), 3)
    map.layers.forEach((layer) => assert.match(of(layer)[0], /^(f-\w+|k-\d|s-\d+|none)$/))
  }
  assert.deepEqual(schemes(parse(planOf(models.qwen))).map((scheme) => scheme.id), ["format", "error", "sensitivity", "size"])
})

test("the largest value has the last colour, and a span of more than 100 times is logarithmic", () => {
  const map = loaded()
  const size = schemes(map).find((scheme) => scheme.id === "size")
  assert.deepEqual(map.layers.map((layer) => size.of(layer)[0]), ["s-0", "s-0", `s-${STEPS.length - 1}`])
  assert.deepEqual([size.scale.log, size.scale.low, size.scale.high], [true, "450 bytes", "3.20 MB"])
})

test("formats of one family have one colour, each family a mark of its own", () => {
  const labels = ["int8_convrot_256", "int8_convrot", "int8_row", "int8", "fp8_e4m3", "float8_e5m2", "bf16", "keep", "mxfp8", "svdquant"]
  assert.deepEqual(labels.map(family), ["int8_convrot", "int8_convrot", "int8_row", "int8_row", "fp8", "fp8", "keep", "keep", "mxfp8", "strange"])
  for (const at of [0, 1]) assert.equal(new Set(Object.values(FORMATS).map((one) => one[at])).size, Object.keys(FORMATS).length)
})

test("numbers are short and say their unit", () => {
  assert.deepEqual([0, 0.000004, 0.0312, 0.5].map(percent), ["0 %", "4.0e-4 %", "3.12 %", "50 %"])
  assert.deepEqual([12, 3_200, 45_000_000, 4_634_000_000].map(bytes), ["12 bytes", "3.20 kB", "45.00 MB", "4.63 GB"])
})
