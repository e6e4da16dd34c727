"""Probe calls: a few calls of the diffusion model as the host made them, to be put to other models."""

from __future__ import annotations

import random
import threading
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import comfy.model_management
import comfy.patcher_extension
import torch
from torch import Tensor

OPTIONS = ("cond_or_uncond", "uuids", "sigmas", "sample_sigmas")  # entries of transformer_options that belong to a call
PLAIN = (int, float, str, bool, type(None), uuid.UUID, torch.dtype, torch.Size)
_state = threading.local()


@dataclass(frozen=True)
class ProbeCall:
    """One call of a diffusion model as the host made it: noisy latent, sigma and conditioning, all on the CPU."""

    x: Tensor
    sigma: Tensor
    conditioning: dict  # the other arguments of apply_model
    options: dict  # plain entries of transformer_options
    position: float  # of the step in its run, 0 to 1
    run: int  # the runs are counted from 0

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in _tensors([self.x, self.sigma, self.conditioning, self.options]))

    def replay(self, patcher) -> Tensor:
        """What a MODEL of the same architecture answers: the denoised latent [batch, ...], on its device.

        (x - answer) / sigma is its velocity, or the noise it predicts. A recording clone records nothing meanwhile.
        """
        comfy.model_management.load_models_gpu([patcher, *patcher.get_nested_additional_models()])
        device = patcher.load_device
        options = comfy.patcher_extension.copy_nested_dicts(patcher.model_options.get("transformer_options", {}))
        for kind, found in (("wrappers", patcher.wrappers), ("callbacks", patcher.callbacks)):
            comfy.patcher_extension.merge_nested_dicts(options.setdefault(kind, {}), found, copy_dict1=False)
        x, sigma, conditioning, own = _map(
            [self.x, self.sigma, self.conditioning, self.options], lambda tensor: tensor.to(device)
        )
        _state.replaying = True
        try:
            patcher.pre_run()
            with torch.inference_mode():
                return patcher.model.apply_model(x, sigma, **conditioning, transformer_options=options | own)
        finally:
            _state.replaying = False
            patcher.cleanup()


def replaying() -> bool:
    """Whether this thread is inside a replay."""
    return getattr(_state, "replaying", False)


@dataclass
class Probes:
    """Keeps up to `limit` calls of all that pass, evenly over the steps of a run, at random over runs."""

    limit: int
    seed: int
    kept: list[ProbeCall]
    note: Callable[[str], None]  # told why a call could not be kept
    runs: int = 0

    def __post_init__(self):
        self._random, self._seen, self._lock = random.Random(self.seed), Counter(), threading.Lock()
        self._last = None

    def watch(self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options=None, **more):
        """The host's APPLY_MODEL wrapper: notes the call and passes it on."""
        options = transformer_options or {}
        if self.limit and not replaying():
            conditioning = {"c_concat": c_concat, "c_crossattn": c_crossattn, "control": control, **more}
            with self._lock:
                self._offer(x, t, conditioning, options)
        return executor(x, t, c_concat, c_crossattn, control, options, **more)

    def _offer(self, x: Tensor, sigma: Tensor, conditioning: dict, options: dict) -> None:
        position = _position(sigma, options)
        self.runs += position == 0 and self._last != 0  # a step may take several calls
        self._last = position
        place = self._place(position)
        if place is None:
            return
        own = {key: options[key] for key in OPTIONS if key in options}
        try:
            x, sigma, conditioning, own = _map([x, sigma, conditioning, own], _stored)
        except TypeError as problem:
            self.note(f"no probe call was kept: {problem}")
            return
        self.kept[place : place + 1] = [ProbeCall(x, sigma, conditioning, own, position, max(0, self.runs - 1))]

    def _place(self, position: float) -> int | None:
        """Where in `kept` a call at that position goes: one more, or instead of another, or nowhere (None).

        A run's steps fall into `limit` parts. A part that is not the fullest takes a place from the fullest; otherwise
        each call of a part has the same chance to be kept.
        """
        part = self._part(position)
        self._seen[part] += 1
        if len(self.kept) < self.limit:
            return len(self.kept)
        members: dict[int, list[int]] = {}
        for index, probe in enumerate(self.kept):
            members.setdefault(self._part(probe.position), []).append(index)
        fullest = max(members, key=lambda p: len(members[p]))
        mine = members.get(part, [])
        if len(mine) + 1 < len(members[fullest]) or not mine:
            return self._random.choice(members[fullest])
        return self._random.choice(mine) if self._random.random() < len(mine) / self._seen[part] else None

    def _part(self, position: float) -> int:
        return min(self.limit - 1, int(position * self.limit))


def _position(sigma: Tensor, options: dict) -> float:
    """Of this step among those of its run: 0 the first, below 1 the last; 0 if the host does not say."""
    steps = options.get("sample_sigmas")
    if steps is None or len(steps) < 2:
        return 0.0
    nearest = (steps[:-1].float().cpu() - sigma.flatten()[0].float().cpu()).abs().argmin().item()
    return nearest / (len(steps) - 1)


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _map(value, change: Callable[[Tensor], Tensor]):
    """Nested lists and dicts with every tensor changed. Raises TypeError for what is no data."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, list | tuple):
        return type(value)(_map(item, change) for item in value)
    raise TypeError(f"a {type(value).__name__} in the conditioning cannot be kept")


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
