"""The example workflows as graphs: nodes, values, places, and what to do. scripts/example_workflows.py writes them.

All that sample follow ComfyUI's template for Z-Image Turbo: the same nodes and values, with Tessera's loaders in
place of
two of them. The loader's layer map comes first, the slider right beside it, what it cost beside that, the picture
below.
"""

PROMPT = (
    "A mosaic of small glazed tiles on a courtyard wall: a red fox asleep under an orange tree. Morning light, chipped "
    "grout, sharp detail."
)
ORIGINAL, TEXT_ENCODER, VAE = "z_image_turbo_bf16.safetensors", "qwen_3_4b.safetensors", "ae.safetensors"
NVFP4 = "z_image_turbo_nvfp4.safetensors"
OFFICIAL = f"`{TEXT_ENCODER}` and `{VAE}`: those of ComfyUI's own template *Z-Image Turbo*."
SLIDER = (
    "**Look:** each tile of the map is a layer, its colour the format. **Turn:** *strength*, 0 is the quantized model "
    "alone, 1 the whole correction; only the sampler runs again. **Cost:** *Inspect* on the right, after a run."
)


def load(g, unet_name, place=(0, 0, 460, 600), title=None):
    return g.add("TesseraDiffusionModelLoader", place, title, unet_name=unet_name, weight_dtype="default")


def correct(g, model, place=(500, 0, 380, 190), **inputs):
    return g.add("TesseraCorrectionLoRA", place, model=model, strength=1, **inputs)


def prompt(g, clip, x, y):
    """What the sampler takes, in one column: (positive, negative, latent)."""
    words = g.add("CLIPTextEncode", (x, y, 380, 120), text=PROMPT, clip=clip)
    nothing = g.add("ConditioningZeroOut", (x, y + 170, 380, 30), conditioning=words[0])
    latent = g.add("EmptySD3LatentImage", (x, y + 250, 380, 110), width=1024, height=1024, batch_size=1)
    return words[0], nothing[0], latent[0]


def encoder(g, name, x, y, height=220):
    return g.add("TesseraCLIPLoader", (x, y, 460, height), clip_name=name, type="lumina2", device="default")["CLIP"]


def sample(g, model, ends, x, y, title=None, width=380):
    """Z-Image Turbo's sampling: 8 steps without guidance."""
    shifted = g.add("ModelSamplingAuraFlow", (x, y, width, 60), model=model, shift=3)
    return ksampler(g, shifted[0], ends, (x, y + 110, width, 270), title)


def ksampler(g, model, ends, place, title=None):
    positive, negative, latent = ends
    return g.add(
        "KSampler", place, title, model=model, positive=positive, negative=negative, latent_image=latent, seed=0,
        control_after_generate="fixed", steps=8, cfg=1, sampler_name="res_multistep", scheduler="simple", denoise=1,
    )[0]  # fmt: skip


def inspect(g, model, after, x, y=0, with_picture=True):
    """The map of what ran, and below it the same as a picture that can be saved."""
    looked = g.add("TesseraInspect", (x, y, 460, 600), model=model, after=after)
    if with_picture:
        g.add("PreviewImage", (x, y + 720, 460, 340), "Layer map, as a picture", images=looked["map"])


def picture(g, model, ends, x, y=0):
    """The picture, large, above what makes it; the sampler's latent."""
    shifted = g.add("ModelSamplingAuraFlow", (x, y + 680, 250, 60), model=model, shift=3)
    vae = g.add("VAELoader", (x, y + 790, 250, 90), vae_name=VAE)
    latent = ksampler(g, shifted[0], ends, (x + 280, y + 680, 270, 270))
    decoded = g.add("VAEDecode", (x, y + 930, 250, 50), samples=latent, vae=vae[0])
    g.add("SaveImage", (x, y, 550, 600), images=decoded[0], filename_prefix="tessera")
    return latent


def setup(g, model, how, text_encoder=TEXT_ENCODER):
    """Load with the map, correct with the slider, inspect, picture: the upper row; below it what they are made with."""
    g.group("1  Layers by format, and the correction", -20, -80, 920, 700)
    g.group("2  Prompt", -20, 630, 920, 440)
    g.group("3  What it cost", 910, -80, 500, 1150)
    g.group("4  Picture", 1420, -80, 590, 1150)
    corrected = correct(g, load(g, model)["MODEL"])["MODEL"]
    g.note(how, (500, 250, 380, 350))
    ends = prompt(g, encoder(g, text_encoder, 0, 690), 500, 690)
    inspect(g, corrected, picture(g, corrected, ends, 1440), 930)


def nvfp4(g):
    setup(
        g,
        NVFP4,
        f"""
**Files:** `{NVFP4}` and its `_lora`: make both with the example *tessera_quantize_and_save*. {OFFICIAL}

{SLIDER}

Better still: *tessera_calibrate_plan_quantize_compare*.""",
    )


def mxfp8(g):
    setup(
        g,
        "z_image_turbo_mxfp8.safetensors",
        f"""
**Files:** `z_image_turbo_mxfp8.safetensors` and its `_lora`: made with *tessera_quantize_and_save*, recipe
**z_image_mxfp8**, filename **z_image_turbo_mxfp8**. {OFFICIAL}

{SLIDER}""",
    )


def int8_convrot(g):
    setup(g, "z_image_turbo_int8_convrot.safetensors", f"""
**Files:** made with *tessera_quantize_and_save* and the recipe **int8_convrot**: `z_image_turbo_int8_convrot` with
its `_lora` from `{ORIGINAL}`, and `qwen_3_4b_int8_convrot` from `text_encoders/{TEXT_ENCODER}`. `{VAE}` is that of
ComfyUI's template *Z-Image Turbo*.

{SLIDER}""", "qwen_3_4b_int8_convrot.safetensors")  # fmt: skip


def quantize_and_save(g):
    g.note(
        f"""
1. Choose the BF16 checkpoint in **source** and what to make of it in **recipe**, then press Run.
2. The map fills layer by layer; cancelling leaves no file behind. The model goes to models/diffusion_models, its
correction LoRA to models/loras.
3. Then open *tessera_z_image_nvfp4*, which uses both files. No file is ever overwritten: for another one, change
**filename**.

`{ORIGINAL}`: that of ComfyUI's own template *Z-Image Turbo*.""",
        (0, 0, 400, 330),
    )
    made = g.add(
        "TesseraQuantize", (440, 0, 560, 820), source=f"diffusion_models/{ORIGINAL}", recipe="z_image_nvfp4",
        filename="z_image_turbo_nvfp4", rank=32,
    )  # fmt: skip
    g.add("PreviewAny", (1040, 0, 560, 820), "Report", source=made["report"])


def calibrate_plan_quantize_compare(g):
    g.note(f"""
1. **Calibrate.** Mute groups 2 and 3 (select their nodes, Ctrl+M) and press Run once for each of 4 to 8 prompts of
the kind you use: every run adds to what was recorded. *Save Calibration* writes a file each time, of up to 7 GB for
Z-Image; only the last is needed. One prompt works too, less well.
2. **Plan and quantize.** Unmute and press Run. *Plan* measures each layer on recorded calls of the model and gives
it the format and the rank that cost least at **target_size_gb**, correction LoRA included: look at its map, and
change what you like in it. In *Quantize and Save* choose the same BF16 file as in *Load Diffusion Model*.
3. **Compare.** The same prompt and seed with both models. **strength** runs only the second sampler again.

A new prompt or seed is recorded too, and everything after it runs again: to try the finished file on other prompts
open *tessera_z_image_nvfp4*. Files: `{ORIGINAL}`, `{TEXT_ENCODER}`, `{VAE}`, those of ComfyUI's own template
*Z-Image Turbo*.
""", (0, 760, 1300, 150))  # fmt: skip
    g.group("1  Calibrate", -20, -80, 1340, 1010)
    g.group("2  Plan and quantize", 1340, -80, 1140, 1010)
    g.group("3  Compare", -20, 950, 2500, 800)
    original = g.add("UNETLoader", (0, 0, 460, 90), unet_name=ORIGINAL, weight_dtype="default")
    vae = g.add("VAELoader", (0, 140, 460, 60), vae_name=VAE)
    clip = encoder(g, TEXT_ENCODER, 0, 250, 460)
    ends = prompt(g, clip, 500, 0)
    recorded = g.add("TesseraCalibrate", (500, 430, 380, 220), model=original[0])
    first = sample(g, recorded["MODEL"], ends, 920, 0, "KSampler (BF16)")
    known = g.add("TesseraSaveCalibration", (920, 430, 380, 130), calibration=recorded[1], after=first,
                  filename="z_image_turbo")  # fmt: skip
    plan = g.add("TesseraPlan", (1360, 0, 520, 910), model=original[0], calibration=known[0], target_size_gb=4.84)
    made = g.add("TesseraQuantize", (1920, 0, 540, 910), source=f"diffusion_models/{ORIGINAL}", recipe="z_image_nvfp4",
                 filename="", rank=32, calibration=known[0], recipe_in=plan[0])  # fmt: skip
    corrected = correct(g, load(g, made["model_name"], (0, 1030, 460, 600))["MODEL"], (500, 1030, 380, 190))["MODEL"]
    second = sample(g, corrected, ends, 500, 1270, "KSampler (quantized)")
    before = g.add("VAEDecode", (0, 1680, 460, 50), "BF16", samples=first, vae=vae[0])
    after = g.add("VAEDecode", (500, 1680, 380, 50), "Quantized", samples=second, vae=vae[0])
    inspect(g, corrected, second, 920, 1030, with_picture=False)
    compare(g, before[0], after[0])


def compare(g, before, after):
    """Numbers and a map of the difference; ImageCompare's slider needs Nodes 2.0."""
    g.add("TesseraCompare", (1400, 1030, 500, 600), a=before, b=after)
    g.add("ImageCompare", (1920, 1030, 540, 600), image_a=before, image_b=after)


def lora_stack(g):
    g.group("1  Model, correction, your LoRAs", -20, -80, 920, 700)
    g.group("2  Prompt", -20, 630, 920, 440)
    g.group("3  Picture", 910, -80, 590, 1150)
    corrected = correct(g, load(g, NVFP4)["MODEL"])["MODEL"]
    stack = g.add("TesseraLoRAStack", (500, 240, 380, 360), model=corrected, clip=encoder(g, TEXT_ENCODER, 0, 690),
                  stack="# Your LoRAs: type a part of a name below")  # fmt: skip
    picture(g, stack["MODEL"], prompt(g, stack["CLIP"], 500, 690), 930)
    g.note(f"""
1. **Files:** `{NVFP4}` and its `_lora`: make both with *tessera_quantize_and_save*. {OFFICIAL} Any other model works
too, quantized or not.
2. In **LoRA Stack** type a part of a LoRA's name and press Enter. The check box mutes it; an empty *clip* is the
same as *model*.
3. Press Run. After changing a strength only what is behind the stack runs again, and nothing is loaded again.

LoRAs run beside the 4-bit weights: 1 means 1. Core's *Load LoRA* merges them into the weights, where rounding takes
most of a weak one.""", (1520, 0, 380, 460))  # fmt: skip


def bake(g):
    g.note(
        f"""
1. Put the LoRAs on the quantized model, try strengths, sample.
2. Run: *Bake* saves a new quantized file with them inside, and a correction LoRA of its own. **original** is the
BF16 file that the model was quantized from: every layer is quantized anew from it.
3. *Load Diffusion Model* on the right loads the result; its map shows the errors of the new file.

**Files:** `{NVFP4}` (*tessera_quantize_and_save*), `{ORIGINAL}`, and a LoRA of yours in **lora_name**.""",
        (0, 680, 460, 300),
    )
    lora = g.add("TesseraLoRA", (500, 0, 460, 280), model=load(g, NVFP4)["MODEL"], lora_name="your_lora.safetensors",
                 strength_model=1)  # fmt: skip
    made = g.add("TesseraBake", (500, 340, 460, 720), model=lora["MODEL"], filename="z_image_turbo_nvfp4_baked",
                 original=ORIGINAL, rank=32)  # fmt: skip
    baked = load(g, made["model_name"], (1000, 0, 460, 600), "The baked model")
    corrected = correct(g, baked["MODEL"], (1000, 680, 460, 190), lora_name=made["lora_name"])["MODEL"]
    inspect(g, corrected, None, 1500)


def extract(g):
    g.note(f"""
For a quantized file that came without a correction, or with one that covers few layers.
1. **base**: that file. **tuned**: the BF16 file that it was made from. Run.
2. The LoRA is saved as `<base>_lora`, where the correction node finds it from now on; the report gives each layer's
error before and with it.
3. With two BF16 files it extracts a fine-tune instead: then set **tolerance** to 0.05 and load it with *Load LoRA*.

**Files:** `z_image_turbo_int8_convrot.safetensors` and `{ORIGINAL}` of ComfyUI's templates, or your own.""",
           (0, 330, 460, 330))  # fmt: skip
    made = g.add("TesseraExtractLoRA", (0, 0, 460, 280), base="diffusion_models/z_image_turbo_int8_convrot.safetensors",
                 tuned=f"diffusion_models/{ORIGINAL}", filename="", rank=32, tolerance=0)  # fmt: skip
    g.add("PreviewAny", (500, 0, 460, 660), "Report", source=made["report"])
    loaded = load(g, "z_image_turbo_int8_convrot.safetensors", (1000, 0, 460, 600))
    corrected = correct(g, loaded["MODEL"], (1000, 680, 460, 190), lora_name=made["lora_name"])["MODEL"]
    inspect(g, corrected, None, 1500)


def strength_sweep(g):
    g.group("1  The original, once", -20, -80, 920, 560)
    g.group("2  The quantized model, at every strength", -20, 500, 920, 890)
    g.group("3  Prompt", 920, -80, 420, 1470)
    g.group("4  Which strength is nearest to the original", 1360, -80, 1160, 1470)
    original = g.add("UNETLoader", (0, 0, 460, 90), unet_name=ORIGINAL, weight_dtype="default")
    vae = g.add("VAELoader", (940, 0, 380, 60), vae_name=VAE)
    clip = g.add("TesseraCLIPLoader", (940, 110, 380, 560), clip_name=TEXT_ENCODER, type="lumina2", device="default")
    ends = prompt(g, clip["CLIP"], 940, 770)
    loaded = load(g, NVFP4, (0, 770, 460, 600))["MODEL"]
    swept = g.add("TesseraStrengthSweep", (0, 580, 460, 140), model=loaded, strengths="0, 0.5, 1, 1.5")
    first = sample(g, original[0], ends, 500, 0, "KSampler (BF16)")
    second = sample(g, swept["MODEL"], ends, 500, 580, "KSampler (each strength)")
    reference = g.add("VAEDecode", (500, 420, 380, 50), "BF16", samples=first, vae=vae[0])
    pictures = g.add("VAEDecode", (500, 1000, 380, 50), "Each strength", samples=second, vae=vae[0])
    made = g.add("TesseraSweepGrid", (1380, 0, 340, 420), columns=3, images=pictures[0], strengths=swept["strength"],
                 reference_image=reference[0], latents=second, reference_latent=first)  # fmt: skip
    g.add("PreviewImage", (1740, 0, 760, 640), "Grid", images=made["grid"])
    g.add("PreviewImage", (1740, 720, 760, 500), "Curve", images=made["curve"])
    g.add("PreviewAny", (1380, 480, 340, 400), "Report", source=made["report"])
    g.note(f"""
1. **Files:** `{NVFP4}` and its `_lora` (*tessera_quantize_and_save*), `{ORIGINAL}` and the others from ComfyUI's own
template *Z-Image Turbo*.
2. Press Run: one run makes a picture of every strength in **strengths** (`0..2 step 0.25` works too). Weights are
loaded once.
3. The best strength is framed in the grid and marked on the curve: set it in *Error-Correction LoRA*.

No memory for the original? Mute group 1: the grid stays, the curve goes.""", (1380, 940, 340, 280))  # fmt: skip


GRAPHS = {
    "tessera_z_image_nvfp4": nvfp4,
    "tessera_z_image_mxfp8": mxfp8,
    "tessera_z_image_int8_convrot": int8_convrot,
    "tessera_quantize_and_save": quantize_and_save,
    "tessera_calibrate_plan_quantize_compare": calibrate_plan_quantize_compare,
    "tessera_lora_stack": lora_stack,
    "tessera_bake": bake,
    "tessera_extract": extract,
    "tessera_strength_sweep": strength_sweep,
}
