"""A `Linear` that carries low-rank branches in its own product, alone or with siblings that see the same input."""

from __future__ import annotations

import dataclasses
import weakref

import comfy.model_management
import comfy.quant_ops
import torch
from torch import Tensor

from ..branch import Branch, SideBranch
from ..formats import Format
from ..kernels import extended, kextension, linear
from ..kernels.dispatch import Plan
from ..kernels.linear import Gated, LowRankBranch, Prepared, Stored
from ..kernels.ops import PADS
from ..kernels.reference import round_up
from . import layouts

KINDS = {
    "TensorCoreNVFP4Layout": "nvfp4", "TensorCoreMXFP8Layout": "mxfp8", "TensorWiseINT8Layout": "int8",
    "TensorCoreFP8E4M3Layout": "fp8", "TensorCoreFP8E5M2Layout": "fp8",
    layouts.FP8_ROW: "fp8_row", layouts.INT8: "int8",
}  # fmt: skip
EXTENDED = ("nvfp4", "mxfp8", "fp8_row")  # kernels that take branches in reserved columns of the weight
CPU = torch.device("cpu")
COMPILING = "a graph must not write into a weight: call the layer once before compiling it"

Pair = tuple[Branch, SideBranch]


class Carrying:
    """Branches of a layer: attached, joined into one, encoded into reserved columns where its kernel has them."""

    tessera_plan: Plan | None = None
    tessera_format: Format | None = None  # the layer is kept in

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tessera_branches: list[Pair] = []
        self.tessera_siblings: Siblings | None = None
        self._powers: tuple = (None, None)  # (which branches, their powers of two or why not)
        self._encoded: tuple = (None, None)  # (which branches of all siblings, Extended or why not)
        self._placed: tuple = (lambda: None, None)  # (weak: the buffer, the Extended that stands in it)

    def attach_branch(self, item: Branch, side: SideBranch) -> Detach:
        """Adds a branch to the product, at the side's strength; the handle takes it out again."""
        pair = (item, side)
        self.__dict__["tessera_branches"] = [*self.tessera_branches, pair]  # past nn.Module's slow __setattr__
        return Detach(self, pair)

    def whole(self) -> list[Pair]:
        """Branches that change the whole output by a product alone."""
        return [pair for pair in self.tessera_branches if pair[0].fuses]

    def parts(self, x: Tensor | Gated) -> list[LowRankBranch]:
        cast = comfy.model_management.cast_to_device
        return [
            LowRankBranch(cast(item.down.weight, x.device, x.dtype), cast(item.up.weight, x.device, x.dtype),
                          side.strength_on(x.device)) for item, side in self.whole()
        ]  # fmt: skip

    def joined(self, kernel: str, x: Tensor | Gated, stored: Stored,
               given: Tensor | Gated) -> tuple[LowRankBranch | None, Prepared | None, list[Pair]]:  # fmt: skip
        """(all branches of the whole output as one, the input if a sibling has quantized it, the other branches).

        `given` is what the layer was called with: x, before it was cast.
        """
        beside = [pair for pair in self.tessera_branches if not pair[0].fuses]
        for item, _ in self.whole():
            item.count()
        siblings = self.tessera_siblings
        if siblings is not None and siblings.serves(kernel, x):
            return *siblings.serve(self, kernel, x, stored, given), beside
        parts = self.parts(x)
        if not parts:
            return None, None, beside
        branch = LowRankBranch.join(parts)
        if not stored.extension:
            return branch, None, beside
        powers = self.powers(stored, branch)
        return self.carried(stored, branch, self.whole(), powers), None, beside

    def powers(self, stored: Stored, branch: LowRankBranch | None) -> Tensor | str | None:
        """The powers of two of this layer's own branches, found once; None without any."""
        which = tuple(id(item) for item, _ in self.whole()), stored.qdata.device
        if self._powers[0] != which and torch.compiler.is_compiling():
            return COMPILING
        if self._powers[0] != which:
            self._powers = which, None if branch is None else extended.powers(stored, branch)
        return self._powers[1]

    def known_powers(self, device: torch.device) -> Tensor | str | None:
        """`powers` if they were found for the branches that are attached now; a reason if not."""
        which = tuple(id(item) for item, _ in self.whole()), device
        if not which[0]:
            return None
        return self._powers[1] if self._powers[0] == which else "a sibling has not run yet"

    def carried(self, stored: Stored, branch: LowRankBranch, pairs: list[Pair], powers: Tensor | str) -> LowRankBranch:
        """The branch with its codes in the weight's reserved columns, where they fit; else as it was."""
        if isinstance(powers, str):
            return branch
        which = tuple(id(item) for item, _ in pairs), stored.qdata.device, stored.extension
        if self._encoded[0] != which and torch.compiler.is_compiling():
            return branch
        if self._encoded[0] != which:
            ranks = [item.down.weight.shape[0] for item, _ in pairs]
            exact = [side.absorbed for _, side in pairs]
            self._encoded = which, extended.encode(stored, branch, ranks, exact, powers)
        found = self._encoded[1]
        if isinstance(found, str):
            return branch
        buffer, standing = self._placed
        if buffer() is not stored.qdata or standing is not found:
            if torch.compiler.is_compiling():
                return branch
            extended.place(stored, found)
            self._placed = weakref.ref(stored.qdata), found
        return dataclasses.replace(branch, extended=found)

    def carries(self, layers: list[Carrying], device: torch.device, columns: int) -> extended.Extended | None:
        """What this layer's reserved columns will hold for the branches of all siblings, if that is known."""
        pairs = [pair for member in layers for pair in member.whole()]
        which = tuple(id(item) for item, _ in pairs), device, columns
        known = self._encoded[1] if self._encoded[0] == which else None
        return known if isinstance(known, extended.Extended) else None

    @staticmethod
    def added(y: Tensor, x: Tensor, pairs: list[Pair]) -> Tensor:
        """The output with branches added beside the product."""
        for item, side in pairs:
            y = item.add(y, x, side.strength_on(CPU))  # 0-d of the CPU: meets any device without a copy
        return y

    # Reserved columns

    def reserve(self, kind: str, rank: int) -> None:
        """Gives the packed weight columns for branches, an absorbed one of that rank included; to the host, padding."""
        columns = min(kextension.MOST, max(kextension.STEP, round_up(3 * rank, kextension.STEP)))
        weight, params = self.weight, self.weight._params
        tiled = "block_scale" if kind == "nvfp4" else "scale"
        qdata, scale = kextension.reserve(kind, weight._qdata, getattr(params, tiled), columns)
        params = dataclasses.replace(params, **{tiled: scale})
        wide = comfy.quant_ops.QuantizedTensor(qdata, weight._layout_cls, params)
        self.weight = torch.nn.Parameter(wide, requires_grad=False)

    def reserved(self, weight) -> int:
        """Reserved columns of a packed weight; none where the host has put another in its place."""
        kind = KINDS[weight._layout_cls]
        if kind not in EXTENDED or self.tessera_plan is None or self.tessera_plan.kernel != kind:
            return 0
        return weight._qdata.shape[1] * (2 if kind == "nvfp4" else 1) - round_up(self.in_features, PADS[kind][1])

    def state_dict(self, *args, destination=None, prefix="", **kwargs):
        found = super().state_dict(*args, destination=destination, prefix=prefix, **kwargs)
        packed = isinstance(self.weight, comfy.quant_ops.QuantizedTensor)
        columns = self.reserved(self.weight) if packed and self.weight._layout_cls in KINDS else 0
        if columns:
            keys = f"{prefix}weight", f"{prefix}weight_scale"
            pair = kextension.strip(KINDS[self.weight._layout_cls], found[keys[0]], found[keys[1]], columns)
            found.update(zip(keys, pair, strict=True))
        return found


class Detach:
    """What `register_forward_hook` gives, for a branch inside a layer."""

    def __init__(self, layer: Carrying, pair: Pair):
        self._layer, self._pair = weakref.ref(layer), pair

    def remove(self) -> None:
        layer = self._layer()
        if layer is not None:
            layer.__dict__["tessera_branches"] = [p for p in layer.tessera_branches if p is not self._pair]


class Siblings:
    """Layers that are called one after the other with the same input: it is quantized once, for all of them.

    Their branches' down factors are stacked, so that one pass over the input projects it on all of them; in each
    layer's own factor the others' columns are 0.
    """

    def __init__(self, layers: list[Carrying]):
        self._layers = [weakref.ref(layer) for layer in layers]
        self._input = lambda: None
        self._prepared: dict[tuple, Prepared] = {}
        self._served: set[int] = set()

    def serves(self, kernel: str, x: Tensor | Gated) -> bool:
        return kernel in linear.PREPARE and isinstance(x, Tensor) and x.numel() > 0

    def serve(self, layer: Carrying, kernel: str, x: Tensor, stored: Stored,
              given: Tensor) -> tuple[LowRankBranch | None, Prepared | None]:  # fmt: skip
        """(this layer's branch, as wide as all siblings'; the input, quantized by the first of them).

        Inside a compiled graph every layer quantizes for itself: what is kept from call to call would break it.
        """
        layers = [member() for member in self._layers]
        branch = self._branch(layers, layer, x, stored)
        if torch.compiler.is_compiling():
            return branch, None
        self._enter(layer, given)
        key = kernel, stored.group, stored.extension, branch is not None and branch.extended is not None
        if key not in self._prepared:
            self._prepare_both(layers, layer, key, x, stored, branch)
        if key not in self._prepared:
            self._prepared[key] = linear.prepare(kernel, x, stored, branch)
        found = self._prepared[key]
        self._served.add(id(layer))
        if len(self._served) == len(layers):
            self._clear()
        return branch, found

    def _prepare_both(self, layers, layer: Carrying, key: tuple, x: Tensor, stored: Stored, branch) -> None:
        """Where a sibling takes the other of nvfp4 and mxfp8, one pass over the input serves both."""
        other = {"nvfp4": "mxfp8", "mxfp8": "nvfp4"}.get(key[0])
        partner = next((m for m in layers if m is not layer and m.tessera_plan.kernel == other), None)
        if partner is None or not isinstance(partner.weight, comfy.quant_ops.QuantizedTensor):
            return
        columns, scale = partner.reserved(partner.weight), getattr(partner, "input_scale", None)
        if scale is not None:
            scale = comfy.model_management.cast_to_device(scale, x.device, None)
        theirs = dataclasses.replace(stored, kind=other, extension=columns, input_scale=scale)
        mine, carried = None if branch is None else branch.extended, partner.carries(layers, x.device, columns)
        nvfp4_first = key[0] == "nvfp4"
        stores, insides = ((stored, theirs), (mine, carried)) if nvfp4_first else ((theirs, stored), (carried, mine))
        found = extended.both(x.reshape(-1, x.shape[-1]), *stores, branch, insides)
        if found is not None:
            second = other, 0, columns, branch is not None and carried is not None
            self._prepared |= dict(zip((key, second) if nvfp4_first else (second, key), found, strict=True))

    def _enter(self, layer: Carrying, x: Tensor) -> None:
        if self._input() is not x or id(layer) in self._served:  # the next forward, or another input
            self._clear()
            self._input = weakref.ref(x)

    def _clear(self) -> None:
        self._input, self._prepared, self._served = lambda: None, {}, set()

    def _branch(self, layers: list[Carrying], layer: Carrying, x: Tensor, stored: Stored) -> LowRankBranch | None:
        stacked = {id(member): member.parts(x) for member in layers}
        if not any(stacked.values()):
            return None
        parts = []
        for member in layers:
            for part in stacked[id(member)]:
                up = part.up if member is layer else part.up.new_zeros(stored.shape[0], part.up.shape[1])
                parts.append(dataclasses.replace(part, up=up))
        branch = LowRankBranch.join(parts)
        if not stored.extension:
            return branch
        own = stacked[id(layer)]
        layer.powers(stored, LowRankBranch.join(own) if own else None)
        known = [member.known_powers(stored.qdata.device) for member in layers]
        reason = next((found for found in known if isinstance(found, str)), None)
        powers = reason or torch.cat([found for found in known if found is not None])
        return layer.carried(stored, branch, [pair for member in layers for pair in member.whole()], powers)
