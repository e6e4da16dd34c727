import assert from "node:assert/strict"
import { readFileSync } from "node:fs"
import { afterEach, test } from "node:test"

import { schemes } from "../../web/layer_map_colours.js"
import { describe, parse } from "../../web/layer_map_data.js"
import { read } from "../../web/layer_map_edits.js"
import { speak, word } from "../../web/translation.js"
import { models, planOf } from "./layer_map_names.mjs"

const of = (language) => JSON.parse(readFileSync(new URL(`../../locales/${language}/main.json`, import.meta.url))).tessera

afterEach(() => speak(() => undefined))

test("a word that no translation has is English, its values filled in", () => {
  assert.equal(word("none", "{1} of {0}", 3, 2), "2 of 3")
  speak(() => ({ other: "x" }))
  assert.equal(word("none", "{0}", "<b>"), "<b>")
})

for (const language of ["zh", "ja"]) {
  test(`${language}: a layer, what layers are coloured by and a mistake in edits are said in it`, () => {
    const map = parse(planOf(models.qwen))
    Object.assign(map.layers[0], { kernel: "k", path: "native", ran: [], error: 0.1, corrected: 0.05, rank: 16, strength: 0.5 })
    const said = () => JSON.stringify([
      describe(map.layers[0], map).lines.slice(0, 3), schemes(map).map((scheme) => scheme.label), read("x = \ny = mxfp8", map.layers).problems,
    ]) // prettier-ignore
    const english = said()
    speak(() => of(language))
    const [words, before] = [said(), english].map((text) => [...text.matchAll(/[a-z]{3,}/gi)].map(([found]) => found))
    const kept = new Set(["nvfp", "mxfp", "bytes", "PATTERN", "FORMAT"])
    assert.ok(before.length > 30)
    assert.deepEqual(words.filter((found) => !kept.has(found)), [])
  })
}
