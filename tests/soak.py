"""Hundreds of workflows through a real ComfyUI from two clients, and what is left of them afterwards.

    COMFYUI_PATH=... python tests/soak.py 500 [--seed 1]     # JSON on the last line; exits 1 if anything grew

Models in every format, text encoders, LoRAs of our nodes, of stacks and of ComfyUI's own, clones, moving strengths,
schedules, cancels, and quantizations while the other client samples. Every so often the same workflow is run again: its
picture must have the same bytes, and the probe of tests/soak_probe.py says what the process holds.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import json
import os
import random
import shutil
import statistics
import sys
import time
import uuid
from pathlib import Path

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from host_server import HostError, HostServer  # noqa: E402

TINY = TESTS / "tiny" / "tiny_zimage_bf16.safetensors"
MODELS = {"nvfp4": "z_image_nvfp4", "mxfp8": "z_image_mxfp8", "int8": "int8_convrot", "bf16": None}
LORAS = ("a", "b", "c")
MUST_NOT_GROW = ("files", "descriptors", "threads", "hooks", "injections", "additional_models", "callbacks", "wrappers",
                 "attachments", "patchers", "modules")  # fmt: skip
BOUNDED = {"Live": 8, "Progress": 8}  # the last quantizations, for pages that are opened later
SHOWN = ("sockets", "tensors", "maps", "objects")
RSS_BOUND = 0.02
WARM = 50  # executions after which a process has seen everything once
# glibc keeps what small tensors leave in one arena per thread; two arenas, and big blocks given back at once, make
# resident memory a measure of what is held
MALLOC = {"MALLOC_ARENA_MAX": "2", "MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


# Files


def fill(host) -> None:
    """Models in every format, LoRAs of three ranks, a text encoder and its LoRA."""
    import small_clip
    from conftest import load_pack

    load_pack()
    from tessera.checkpoint import Checkpoint
    from tessera.job import Job
    from tessera.quantization import recipe
    from tessera.quantization.pipeline import Settings

    models, loras = host.models("diffusion_models"), host.models("loras")
    shutil.copy(TINY, models / "bf16.safetensors")
    for name, word in MODELS.items():
        if word:
            lora = loras / f"{name}_lora.safetensors"
            settings = Settings(16, rounding="nearest")
            Job(Checkpoint(TINY), models / f"{name}.safetensors", recipe.builtin(word), lora, settings=settings).run()
    source = small_clip.save(host.models("text_encoders") / "small.safetensors")
    small_clip.quantize(source, source.with_name("small_nvfp4.safetensors"), "nvfp4")
    for number, name in enumerate(LORAS):
        save_file(_lora(number), loras / f"{name}.safetensors")


def _lora(number: int) -> dict[str, torch.Tensor]:
    """Pairs on a third of the layers, and on the encoder's first projections."""
    generator, rank, found = torch.Generator().manual_seed(number), 4 * (number + 1), {}
    layers = [(f"diffusion_model.{path}.{part}", out, columns) for path in (f"layers.{number}", "context_refiner.0")
              for part, out, columns in (("attention.out", 256, 256), ("attention.qkv", 768, 256))]  # fmt: skip
    layers.append(("text_encoders.qwen3_4b.transformer.model.layers.0.mlp.down_proj", 2560, 256))
    for base, out, columns in layers:
        found[f"{base}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) * 0.02
        found[f"{base}.lora_B.weight"] = torch.randn(out, rank, generator=generator) * 0.02
    return found


# Workflows


def sampling(graph: dict, model: list, name: str, seed: int, steps: int = 1) -> None:
    """From a MODEL to a picture; several to a graph are clones of one model."""
    sampler = {"seed": seed, "steps": steps, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    graph |= {
        "prompt": node("TinyPrompt", text="big red star center on white plain"),
        "latent": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        f"sample {name}": node("KSampler", model=model, positive=["prompt", 0], negative=["prompt", 0],
                               latent_image=["latent", 0], **sampler),
        f"decode {name}": node("TinyDecode", samples=[f"sample {name}", 0], upscale=1),
        f"save {name}": node("SaveImage", images=[f"decode {name}", 0], filename_prefix="soak"),
    }  # fmt: skip


REFERENCE: dict = {
    "load": node("TesseraDiffusionModelLoader", unet_name="nvfp4.safetensors", weight_dtype="default"),
    "correct": node("TesseraCorrectionLoRA", model=["load", 0], lora_name="nvfp4_lora.safetensors", strength=1.0),
    "lora": node("TesseraLoRA", model=["correct", 0], lora_name="a.safetensors", strength_model=0.7),
}
sampling(REFERENCE, ["lora", 0], "it", 5, 2)


class Workflows:
    """Seeded: what a user might do next."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)

    def strength(self) -> float:
        return round(self.random.choice([0.0, self.random.uniform(-0.5, 1.5), self.random.uniform(0, 1)]), 3)

    def any(self, steps: int = 1) -> dict:
        return self.encoder() if self.random.random() < 0.12 else self.model(steps)

    def model(self, steps: int = 1) -> dict:
        name, stock = self.random.choice(list(MODELS)), self.random.random() < 0.2
        kind = "UNETLoader" if stock else "TesseraDiffusionModelLoader"
        graph = {"load": node(kind, unet_name=f"{name}.safetensors", weight_dtype="default")}
        tip = ["load", 0]
        if name != "bf16" and self.random.random() < 0.7:
            graph["correct"] = node("TesseraCorrectionLoRA", model=tip, lora_name=f"{name}_lora.safetensors",
                                    strength=abs(self.strength()))  # fmt: skip
            tip = ["correct", 0]
        for number in range(self.random.randrange(4)):
            graph[f"lora {number}"] = self.lora(tip)
            tip = [f"lora {number}", 0]
        for clone in range(self.random.choice([1, 1, 2])):
            end = tip
            if clone:
                graph["other"] = self.lora(tip)
                end = ["other", 0]
            sampling(graph, end, str(clone), self.random.randrange(1 << 30), steps)
        return graph

    def lora(self, model: list) -> dict:
        name, kind = f"{self.random.choice(LORAS)}.safetensors", self.random.randrange(4)
        if kind == 0:
            return node("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=self.strength())
        if kind == 1:
            lines = "\n".join(f"{other}.safetensors : {self.strength()}" for other in LORAS[: self.random.randrange(4)])
            return node("TesseraLoRAStack", model=model, stack=lines)
        curve = self.random.choice(["", "", "0:0, 1:1"])
        return node("TesseraLoRA", model=model, lora_name=name, strength_model=self.strength(), curve=curve)

    def encoder(self) -> dict:
        file = self.random.choice(["small.safetensors", "small_nvfp4.safetensors"])
        load = node("TesseraDiffusionModelLoader", unet_name="int8.safetensors", weight_dtype="default")
        lora = node("TesseraLoRA", model=["load", 0], clip=["clip", 0], lora_name="a.safetensors",
                    strength_model=self.strength(), strength_clip=self.strength())  # fmt: skip
        return {"load": load, "clip": node("SoakCLIP", name=file), "lora": lora,
                "encode": node("SoakEncode", clip=["lora", 1])}  # fmt: skip


def quantizing(filename: str, seed: int = 0) -> dict:
    return {"quantize": node("TesseraQuantize", source="diffusion_models/bf16.safetensors", recipe="z_image_nvfp4",
                             rank=8, seed=seed, filename=filename)}  # fmt: skip


# Two clients


def second_client(host: HostServer) -> HostServer:
    """Another browser window on the same server: its own id, socket and events."""
    other = copy.copy(host)
    other.client_id, other.events = uuid.uuid4().hex, []
    other._listen()
    return other


class Soak:
    """Runs workflows on a host and collects what the probe says."""

    def __init__(self, host: HostServer, seed: int, says: bool = False):
        self.says = says  # every probe, on stderr
        self.clients = host, second_client(host)
        self.workflows, self.random = Workflows(seed), random.Random(seed)
        self.probes: list[dict] = []  # with `run`, the executions before
        self.pictures: set[str] = set()
        self.history = [0, 0]  # past workflows that ComfyUI kept, and their bytes as JSON
        self.files: set[str] = set()
        self.overlaps = 0  # samplings that began before a quantization had ended
        self.counts = {"executions": 0, "interrupted": 0, "quantizations": 0}

    def pair(self) -> None:
        """A workflow from each client at once: one waits in the queue."""
        waiting = [(client, client.queue(self.workflows.any())) for client in self.clients]
        for client, prompt in waiting:
            client.wait(prompt)
        self.counts["executions"] += 2

    def cancel(self) -> None:
        """A workflow that is stopped while it samples, or has just ended."""
        client = self.clients[0]
        since, prompt = len(client.events), client.queue(self.workflows.model(steps=30))
        with contextlib.suppress(TimeoutError):
            client.wait_event("executing", timeout=20, since=since, prompt_id=prompt)
        time.sleep(self.random.random() * 0.4)
        client.interrupt()
        try:
            client.wait(prompt)
        except HostError as problem:
            if problem.kind != "execution_interrupted":
                raise
            self.counts["interrupted"] += 1
        self.counts["executions"] += 1

    def quantize(self, alone: bool = False) -> None:
        """The second client quantizes, and the first samples while it does; always the same file, made anew."""
        name = f"made_{self.counts['quantizations']:03}"  # of one length: headers are padded
        since, prompts = len(self.clients[1].events), [(self.clients[1], self.clients[1].queue(quantizing(name)))]
        if not alone:
            self.clients[1].wait_event("executing", since=since, prompt_id=prompts[0][1])
            prompts.append((self.clients[0], self.clients[0].queue(REFERENCE)))
        entries = [client.wait(prompt) for client, prompt in prompts]
        for folder, file in (("diffusion_models", f"{name}.safetensors"), ("loras", f"{name}_lora.safetensors")):
            path = self.clients[0].models(folder) / file
            data = path.read_bytes().replace(name.encode(), b"made")  # the file says its own name
            self.files.add(f"{folder} {hashlib.sha256(data).hexdigest()}")
            path.unlink()
        if not alone:
            self.see(entries[1])
            self.overlaps += period(entries[1])[0] < period(entries[0])[1]
        self.counts["executions"] += len(entries)
        self.counts["quantizations"] += 1

    def see(self, entry: dict) -> None:
        """Keeps what the reference's picture looks like, not the picture."""
        (picture,) = self.clients[0].files(entry)
        self.pictures.add(hashlib.sha256(picture.read_bytes()).hexdigest())
        shutil.rmtree(picture.parent)

    def probe(self) -> None:
        """The same workflow as ever, then what the process holds."""
        host = self.clients[0]
        host.run({"encode": node("SoakProbe", number=-self.counts["executions"])})  # empties the host's result cache
        self.see(host.run(REFERENCE))
        self.forget(host)
        answer = host.run({"probe": node("SoakProbe", number=self.counts["executions"])})
        self.probes.append({"run": self.counts["executions"], **json.loads(answer["outputs"]["probe"]["facts"][0])})
        if self.says:
            print(f"{time.monotonic():.0f} s", self.probes[-1], file=sys.stderr, flush=True)
        self.counts["executions"] += 1

    def forget(self, host: HostServer) -> None:
        """Empties ComfyUI's list of past workflows, which by design keeps 10,000 with what their nodes have shown."""
        kept = host.get("/history")
        self.history[0] += len(kept)
        self.history[1] += len(json.dumps(kept))
        host.post("/history", {"clear": True})

    def run(self, executions: int, probes: int = 12) -> None:
        self.quantize(alone=True)
        self.probe()
        warm = min(WARM, executions // 3)
        due = [warm + n * (executions - warm) // (probes - 1) for n in range(probes)]
        turn = 0
        while self.counts["executions"] < executions:
            turn += 1
            step = self.cancel if turn % 9 == 0 else self.quantize if turn % 40 == 5 else self.pair
            step()
            while due and self.counts["executions"] >= due[0]:
                due = [at for at in due if at > self.counts["executions"]]
                self.probe()
        self.probe()


def period(entry: dict) -> tuple[int, int]:
    """When a workflow began and ended, by the host's clock."""
    times = [data["timestamp"] for _, data in entry["status"]["messages"]]
    return min(times), max(times)


def verdict(soak: Soak, bound: float) -> tuple[dict, list[str]]:
    """(figures, what is wrong): counts against those after the warm-up, memory over the second half."""
    warm, last = soak.probes[1], soak.probes[-1]
    wrong = [f"{name} grew from {warm.get(name, 0)} to {last.get(name, 0)} between run {warm['run']} and {last['run']}"
             for name in MUST_NOT_GROW if last.get(name, 0) > warm.get(name, 0)]  # fmt: skip
    grown = {name: (warm["classes"].get(name, 0), count) for name, count in last["classes"].items()
             if count > max(warm["classes"].get(name, 0), BOUNDED.get(name, 0))}  # fmt: skip
    wrong += [f"{name}: {before} objects became {after}" for name, (before, after) in grown.items()]
    if soak.overlaps:
        wrong.append(f"{soak.overlaps} samplings ran beside a quantization")
    if len(soak.pictures) != 1:
        wrong.append(f"the same workflow made {len(soak.pictures)} different pictures")
    if len(soak.files) > 2:
        wrong.append(f"the same quantization made {len(soak.files)} different files, a model and a LoRA were expected")
    half = [probe["rss"] for probe in soak.probes if probe["run"] >= last["run"] / 2]
    cut = max(1, len(half) // 3)
    early, late = statistics.median(half[:cut]), statistics.median(half[-cut:])
    growth = late / early - 1
    if growth > bound:
        wrong.append(
            f"resident memory grew by {growth:.1%} over the second half: {early / 1e6:.0f} to {late / 1e6:.0f} MB"
        )
    figures = soak.counts | {
        "history_kb": round(soak.history[1] / soak.history[0] / 1e3, 1),
        "warm": warm["run"], "probes": len(soak.probes), "rss_mb": [round(p["rss"] / 1e6) for p in soak.probes],
        "growth": round(growth, 4),
        "held": {name: [warm.get(name, 0), last.get(name, 0)] for name in (*MUST_NOT_GROW, *SHOWN)},
    }  # fmt: skip
    return figures, wrong


def soak(
    executions: int, seed: int = 1, probes: int = 12, bound: float = RSS_BOUND, says: bool = False
) -> tuple[dict, list[str]]:
    """Starts a host, fills it, runs and judges."""
    packs = {"tiny": TESTS / "tiny" / "node_pack", "soak_probe": TESTS / "soak_probe.py"}
    env = MALLOC | {"TESSERA_SOAK_TESTS": str(TESTS), "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with HostServer(packs, cpu=True, env=env) as host:
        fill(host)
        made, started = Soak(host, seed, says), time.monotonic()
        made.run(executions, probes)
        figures, wrong = verdict(made, bound)
        figures["seconds"] = round(time.monotonic() - started)
        left = [path.name for path in host.base.rglob(".*") if path.is_file() and "tessera" in path.name]
        if left:
            wrong.append(f"temporary files are left: {', '.join(left)}")
    return figures, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("executions", type=int, nargs="?", default=500)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--quiet", action="store_true", help="say nothing of single probes")
    given = parser.parse_args()
    figures, wrong = soak(given.executions, given.seed, says=not given.quiet)
    print(json.dumps({"figures": figures, "wrong": wrong}))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
