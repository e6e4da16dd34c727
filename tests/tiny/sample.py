"""Sample pictures from the tiny model without ComfyUI, and measure its validation loss.

cd tests; python -m tiny.sample --out grid.png [--weights FILE] [--prompt "big red star center on white plain"]
"""

import argparse
import itertools
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from . import codec
from .model import TinyZImage
from .train import FILE, SHIFT, validate

PROMPTS = (
    "big red star center on white plain",
    "big blue circle top left on cream checker",
    "big yellow triangle bottom on navy plain",
    "big green square right on black stripes",
    "big purple heart left on mint plain",
    "big orange ring top on gray dots",
    "big cyan diamond bottom right on brown plain",
    "big pink moon center on navy stripes",
    "big green cross top right on lilac plain",
    "big red arrow bottom left on cream dots",
    "small blue square center on white checker",
    "small yellow heart right on black plain",
    "small red circle top left on gray stripes",
    "small purple star bottom on mint dots",
    "big orange circle left and small blue square right on white plain",
    "small red heart top left and big cyan ring bottom right on navy plain",
)


def load(path):
    """The model in float32 with the weights of a bf16 file."""
    model = TinyZImage().eval().requires_grad_(False)
    model.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    return model


def sigmas(steps):
    """The host's `simple` schedule: every 1000/steps-th of 1000 shifted noise levels, then 0."""
    u = torch.arange(1, 1001) / 1000
    table = SHIFT * u / (1 + (SHIFT - 1) * u)
    picked = [table[-(1 + int(i * len(table) / steps))] for i in range(steps)]
    return torch.stack([*picked, torch.tensor(0.0)])


def noise_of(seed, count=1):
    """Starting noise as the host's KSampler draws it for a batch of 16x16 latents."""
    return torch.randn(count, codec.CHANNELS, 16, 16, generator=torch.manual_seed(seed))


@torch.no_grad()
def euler(model, prompts, noise, steps=8, cfg=1.0):
    """Latents for prompts, one per row of noise; above cfg 1 guided away from the empty caption."""
    x = noise.clone()
    rows = [codec.tokens(p) for p in prompts]
    longest = max(map(len, rows))
    words = codec.WORDS[torch.tensor([r + [0] * (longest - len(r)) for r in rows])]
    lengths = torch.tensor([len(r) for r in rows])
    levels = sigmas(steps)
    for now, then in itertools.pairwise(levels):
        v = model(x, now.expand(len(x)), words, lengths)
        if cfg != 1.0:
            free = model(x, now.expand(len(x)), codec.WORDS[:1].expand(len(x), 1, -1))
            v = free + cfg * (v - free)
        x = x + (then - now) * v
    return x


def grid(pictures, columns=4, scale=4):
    """One PIL image of pictures [B, 3, H, W] in rows."""
    rows = [torch.cat(list(row), 2) for row in pictures.split(columns)]
    pixels = (torch.cat(rows, 1).permute(1, 2, 0) * 255).round().byte().numpy()
    image = Image.fromarray(pixels)
    return image.resize((image.width * scale, image.height * scale), Image.NEAREST)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--weights", type=Path, default=Path(__file__).with_name(FILE))
    parser.add_argument("--prompt", action="append", help="repeat for more; the default is a set of 16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cfg", type=float, default=1.0)
    args = parser.parse_args()
    model, prompts = load(args.weights), args.prompt or PROMPTS
    noise = torch.cat([noise_of(args.seed + i) for i in range(len(prompts))])
    grid(codec.decode(euler(model, prompts, noise, args.steps, args.cfg))).save(args.out)
    print(f"{args.out}: {len(prompts)} pictures, {args.steps} steps; validation loss {validate(model):.5f}")


if __name__ == "__main__":
    main()
