"""Train the tiny Z-Image fixture from nothing, on CPU.

    cd tests; OMP_NUM_THREADS=1 python -m tiny.train --minutes 70 --out RUN_FOLDER

Writes tiny_zimage_bf16.safetensors (moving average of the weights), train.log (JSON lines) and state.pt (for
--resume). Step i of a seed always sees the same pictures, captions and noise; the learning rate falls with the share
of --minutes that has passed, so the number of steps depends on the machine.

Each core takes a slice of the batch on a thread of its own and OpenMP stays at one thread: beside other jobs, the
barrier of every small parallel loop made a step 5 to 20 times slower.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors.torch import save_file

from . import codec, pictures
from .model import PAD, TinyZImage

BATCH = 64
WORKERS = 2
LR_MUON, LR_ADAM = 4e-3, 2e-3
WARMUP = 60  # steps
EMA = 0.995
NO_CAPTION = 0.06
SHIFT = 3.0
SAVE_EVERY = 200
FILE = "tiny_zimage_bf16.safetensors"


def examples(size, seed, no_caption=NO_CAPTION):
    """One training batch: latents, word vectors [size, 32, 64], lengths, noise, sigma."""
    rgb, captions = pictures.batch(size, seed)
    g = torch.Generator().manual_seed(seed)
    dropped = torch.rand(size, generator=g) < no_caption
    rows = [[0] if d else codec.tokens(c) for c, d in zip(captions, dropped.tolist(), strict=True)]
    words = codec.WORDS[torch.tensor([r + [0] * (PAD - len(r)) for r in rows])]
    latents = codec.encode(rgb)
    u = torch.rand(size, generator=g)
    noise = torch.randn(latents.shape, generator=g)
    return latents, words, torch.tensor([len(r) for r in rows]), noise, SHIFT * u / (1 + (SHIFT - 1) * u)


def loss_of(model, data):
    """Mean squared error of the velocity noise - latent."""
    z, words, lengths, noise, sigma = data
    s = sigma.view(-1, 1, 1, 1)
    return (model((1 - s) * z + s * noise, sigma, words, lengths).float() - (noise - z)).square().mean()


@torch.no_grad()
def validate(model, batches=4, size=64):
    """Loss on 256 pictures and noises that training never sees."""
    with torch.autocast("cpu", torch.bfloat16):
        return sum(loss_of(model, examples(size, -1 - i, 0.0)).item() for i in range(batches)) / batches


def optimizers(model):
    """(optimizer, peak rate): Muon for the matrices inside the blocks except adaLN, in one part per worker, and AdamW
    for everything else."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    inner = {n for n, p in named if p.ndim == 2 and (".attention." in n or ".feed_forward." in n)}
    matrices = [p for n, p in named if n in inner]
    rest = [p for n, p in named if n not in inner]
    muons = [
        torch.optim.Muon(matrices[i::WORKERS], lr=LR_MUON, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        for i in range(WORKERS)
    ]
    adam = torch.optim.AdamW(rest, lr=LR_ADAM, betas=(0.9, 0.98), weight_decay=0.0)
    return [*((muon, LR_MUON) for muon in muons), (adam, LR_ADAM)]


class Run:
    """A training run and its folder: steps until the time is over, results as it goes."""

    def __init__(self, out, seed, minutes):
        torch.manual_seed(seed)
        self.out, self.seed, self.limit = out, seed, minutes * 60
        self.model, self.average = TinyZImage(), TinyZImage()
        self.average.load_state_dict(self.model.state_dict())
        self.model.x_pad_token.requires_grad_(False)  # 64x64 pictures are 64 tokens: never padded
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizers = optimizers(self.model)
        self.forward = torch.compile(self.model)
        self.pool = ThreadPoolExecutor(WORKERS)
        self.steps, self.before, self.loss, self.rate = 0, 0.0, 0.0, 0.0

    def gradients(self, worker):
        """Loss and gradients of one slice of this step's batch."""
        data = examples(BATCH // WORKERS, (self.seed * 1_000_003 + self.steps) * WORKERS + worker)
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.forward, data)
        return loss.item(), torch.autograd.grad(loss, self.trained)

    def descend(self, optimizer, rate):
        """One step of one optimizer at a learning rate."""
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()

    def step(self, run):
        """One step of everything; `run` is the pool's map, or the plain one while the model is not compiled."""
        losses, gradients = zip(*run(self.gradients, range(WORKERS)), strict=True)
        for parameter, *parts in zip(self.trained, *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(0)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        list(run(lambda pair: self.descend(pair[0], pair[1] * self.rate), self.optimizers))
        self.steps += 1
        with torch.no_grad():
            weight = max(1 - EMA, 1 / (self.steps + 1))
            torch._foreach_lerp_(list(self.average.parameters()), list(self.model.parameters()), weight)
        self.loss += (sum(losses) / WORKERS - self.loss) * max(0.02, 1 / self.steps)

    def train(self):
        """Go on until --minutes have passed, earlier sessions included."""
        start, run = time.monotonic() - self.before, map
        while (seconds := time.monotonic() - start) < self.limit:
            self.rate = min(1.0, (self.steps + 1) / WARMUP) * (1 - seconds / self.limit)
            self.step(run)
            run = self.pool.map
            if self.steps % SAVE_EVERY == 0 or self.steps in (1, 50, 100):
                self.save(seconds)
        self.save(seconds)

    def save(self, seconds):
        """Write the averaged weights, the state to resume from and a line of the log."""
        weights = {k: v.to(torch.bfloat16).contiguous() for k, v in self.average.state_dict().items()}
        save_file(weights, self.out / FILE, metadata={"format": "pt"})
        state = {
            "model": self.model.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer, _ in self.optimizers],
            "step": self.steps,
            "seconds": seconds,
            "loss": self.loss,
        }
        torch.save(state, self.out / "state.pt")
        line = {
            "step": self.steps,
            "loss": round(self.loss, 5),
            "validation": round(validate(self.average), 5),
            "seconds": round(seconds),
            "lr_muon": round(LR_MUON * self.rate, 6),
        }
        with (self.out / "train.log").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def restore(self):
        """Continue where the last `save` was."""
        state = torch.load(self.out / "state.pt")
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for (optimizer, _), saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.steps, self.before, self.loss = state["step"], state["seconds"], state["loss"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=70)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", action="store_true", help="go on from OUT/state.pt; its time counts")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args.out, args.seed, args.minutes)
    if args.resume:
        run.restore()
    run.train()


if __name__ == "__main__":
    main()
