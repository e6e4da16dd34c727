/** Names of the two-dimensional weights of models that people use, and payloads made of names. */
const times = (count, of) => Array.from({ length: count }, (_, n) => of(n)).flat()
const under = (prefix, kinds) => kinds.split(" ").map((kind) => `${prefix}.${kind}`)

const ATTENTION = "attention.qkv attention.out feed_forward.w1 feed_forward.w2 feed_forward.w3"
const UNET = "attn1.to_k attn1.to_out.0 attn1.to_q attn1.to_v attn2.to_k attn2.to_out.0 attn2.to_q attn2.to_v ff.net.0.proj ff.net.2"
const transformer = (at, depth) => [...under(`${at}.1`, "proj_in proj_out"), ...times(depth, (n) => under(`${at}.1.transformer_blocks.${n}`, UNET))]

export const models = {
  zImage: [
    "x_embedder", "cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear", "final_layer.adaLN_modulation.1",
    ...times(2, (n) => under(`context_refiner.${n}`, ATTENTION)),
    ...times(2, (n) => under(`noise_refiner.${n}`, `${ATTENTION} adaLN_modulation.0`)),
    ...times(30, (n) => under(`layers.${n}`, `${ATTENTION} adaLN_modulation.0`)),
  ],
  flux: [
    "img_in", "txt_in", "time_in.in_layer", "final_layer.adaLN_modulation.1",
    ...times(19, (n) => under(`double_blocks.${n}`, "img_attn.proj img_attn.qkv img_mlp.0 img_mlp.2 img_mod.lin txt_attn.proj txt_attn.qkv txt_mlp.0 txt_mlp.2 txt_mod.lin")),
    ...times(38, (n) => under(`single_blocks.${n}`, "linear1 linear2 modulation.lin")),
  ],
  wan: ["head.head", "text_embedding.0", "text_embedding.2", "time_projection.1", ...times(40, (n) => under(`blocks.${n}`, "self_attn.q self_attn.k self_attn.v self_attn.o cross_attn.q cross_attn.k cross_attn.v cross_attn.o ffn.0 ffn.2"))],
  qwen: times(36, (n) => under(`model.layers.${n}`, "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj mlp.gate_proj mlp.up_proj mlp.down_proj")),
  sdxl: [
    "time_embed.0", "time_embed.2", "label_emb.0.0",
    ...[1, 2, 4, 5, 7, 8].map((n) => `input_blocks.${n}.0.emb_layers.1`),
    ...transformer("input_blocks.4", 2), ...transformer("input_blocks.7", 10), ...transformer("middle_block", 10), ...transformer("output_blocks.0", 10),
  ],
  t5: ["shared", ...times(24, (n) => [...under(`encoder.block.${n}.layer.0.SelfAttention`, "q k v o"), ...under(`encoder.block.${n}.layer.1.DenseReluDense`, "wi_0 wi_1 wo")])],
  huge: times(50, (n) => times(40, (kind) => `layers.${n}.part${kind}.weight_${kind}`)),
  hostile: ["<img src=x onerror=alert(1)>", "", ".", "..", "1", "1.1", "layers..x", "layers.3", "layers.99999999999999999999.x", "a.0.<b>", "a.1.<b>", "__proto__", "constructor.0.x"],
} // prettier-ignore

/** A plan of these layers: nvfp4 or mxfp8 with and without rank, all of them to choose from but for `fixed` ones. */
export function planOf(names, fixed = []) {
  const damages = { nvfp4: 8e-4, mxfp8: 6e-5, int8_convrot_64: 5e-6 }
  const formats = [...Object.keys(damages), "keep"]
  const size = { nvfp4: 450, mxfp8: 825, int8_convrot_64: 803 }
  const menu = (index) => [
    ...Object.keys(damages).flatMap((format, at) => [0, 16, 32].map((rank) => [at, rank, size[format] + 2 * rank, (damages[format] * (1 + (index % 7))) / (1 + rank / 16)])),
    [3, 0, 1600, 0],
  ]
  const free = (name) => !fixed.includes(name)
  const at = names.map((name, index) => (free(name) ? [Math.floor(index / 5) % 3 ? 0 : 1, [0, 16][Math.floor(index / 7) % 2]] : [3, 0]))
  const all = (value) => names.map(() => value)
  return {
    version: 1, title: "planned", kind: "plan", measure: "share of the model's error",
    facts: [["size", "1.00 GB"], ["bits per weight", "5.00"], ["expected error", "10 %"]], formats, kernels: [], reasons: ["kept: token table"],
    layers: {
      name: names, format: at.map(([format]) => format), shape: all([80, 10]), bits: all(4.5), nbytes: all(450), error: all(0.01), corrected: all(null),
      sensitivity: all(0.03), kernel: all(-1), ran: all(null), path: all(""), reason: names.map((name) => (free(name) ? -1 : 0)), rank: at.map(([, rank]) => rank),
      strength: all(null), edited: all(0), kept: all(-1), added: all(null), planned: at.map(([format]) => format), planned_rank: at.map(([, rank]) => rank),
    },
    options: names.map((name, index) => (free(name) ? menu(index) : [])), fixed: { nbytes: 1000 }, edits: "",
  } // prettier-ignore
}
