"""A `Linear` that carries low-rank branches in its own product, alone or with siblings that see the same input."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import weakref

import comfy.model_management
import comfy.quant_ops
import torch
from torch import Tensor

from ..branch import Branch, Group, Strengths
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
COMPILING = "a graph must not write into a weight: call the layer once before compiling it"

Pair = tuple[Branch, Strengths]
_names_only = contextvars.ContextVar("tessera_names_only", default=False)


class Carrying:
    """A stack's branch on a layer: attached, encoded into reserved columns where its kernel has them."""

    tessera_plan: Plan | None = None
    tessera_format: Format | None = None  # the layer is kept in

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tessera_branch_pair: Pair | None = None
        self.tessera_siblings: Siblings | None = None
        self._powers: tuple = (None, None)  # (which branch, its powers of two or why not)
        self._encoded: tuple = (None, None)  # (which group of branches, Extended or why not)
        self._placed: tuple = (lambda: None, None)  # (weak: the buffer, the Extended that stands in it)

    def attach_branch(self, item: Branch, strengths: Strengths) -> Detach:
        """Takes a stack's branch into the product, in the place of any other; the handle takes it out again."""
        pair = (item, strengths)
        self.__dict__["tessera_branch_pair"] = pair  # past nn.Module's slow __setattr__
        return Detach(self, pair)

    def joined(self, kernel: str, x: Tensor | Gated, stored: Stored,
               given: Tensor | Gated) -> tuple[LowRankBranch | None, Prepared | None]:  # fmt: skip
        """(the low-rank branch, the input if a sibling has quantized it).

        `given` is what the layer was called with: x, before it was cast.
        """
        siblings = self.tessera_siblings
        if siblings is not None and siblings.serves(kernel, x):
            return siblings.serve(self, kernel, x, stored, given)
        branch = self.product(x)
        if branch is None or not stored.extension:
            return branch, None
        return self.carried(stored, branch, self.tessera_branch_pair[0].group, self.powers(stored, branch)), None

    def product(self, x: Tensor | Gated) -> LowRankBranch | None:
        """This layer's ranks alone, for x."""
        if self.tessera_branch_pair is None:
            return None
        item, strengths = self.tessera_branch_pair
        return item.product(x, strengths, cast)

    def powers(self, stored: Stored, branch: LowRankBranch | None) -> Tensor | str | None:
        """The powers of two of this layer's own ranks, found once; None without any."""
        which = self._which(stored.qdata.device)
        if self._powers[0] != which and torch.compiler.is_compiling():
            return COMPILING
        if self._powers[0] != which:
            self._powers = which, None if branch is None else extended.powers(stored, branch)
        return self._powers[1]

    def known_powers(self, device: torch.device) -> Tensor | str | None:
        """`powers` if they were found for the branch that is attached now; a reason if not."""
        which = self._which(device)
        if which[0] is None:
            return None
        return self._powers[1] if self._powers[0] == which else "a sibling has not run yet"

    def _which(self, device: torch.device) -> tuple:
        pair = self.tessera_branch_pair
        return None if pair is None or not pair[0].rank else id(pair[0]), device

    def carried(self, stored: Stored, branch: LowRankBranch, group: Group, powers: Tensor | str) -> LowRankBranch:
        """The branch with its codes in the weight's reserved columns, where they fit; else as it was."""
        if isinstance(powers, str):
            return branch
        which = id(group), stored.qdata.device, stored.extension
        if self._encoded[0] != which and torch.compiler.is_compiling():
            return branch
        if self._encoded[0] != which:
            ranks = [rank for _, rank in group.runs]
            self._encoded = which, extended.encode(stored, branch, ranks, group.exact, powers)
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

    def carries(self, group: Group | None, device: torch.device, columns: int) -> extended.Extended | None:
        """What this layer's reserved columns will hold for the branches of all siblings, if that is known."""
        known = self._encoded[1] if self._encoded[0] == (id(group), device, columns) else None
        return known if isinstance(known, extended.Extended) else None

    def added(self, y: Tensor, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The output of a layer with that bias, with the whole branch added beside the product."""
        if self.tessera_branch_pair is None:
            return y
        item, strengths = self.tessera_branch_pair
        return item.add(y, x, strengths, cast, bias)

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
        if columns and not _names_only.get():
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
        if layer is not None and layer.tessera_branch_pair is self._pair:
            layer.__dict__["tessera_branch_pair"] = None


class Siblings:
    """Layers that are called one after the other with the same input: it is quantized once, for all of them.

    Their branches' down factors lie below each other in one group, so that one pass over the input projects it on all.
    """

    def __init__(self, layers: list[Carrying]):
        self._layers = [weakref.ref(layer) for layer in layers]
        self._input = lambda: None
        self._prepared: dict[tuple, Prepared] = {}
        self._served: set[int] = set()

    def serves(self, kernel: str, x: Tensor | Gated) -> bool:
        """Whether the layers can share x: not where one must multiply without its branch first."""
        shared = kernel in linear.PREPARE and isinstance(x, Tensor) and x.numel() > 0
        pairs = [member().tessera_branch_pair for member in self._layers] if shared else ()
        return shared and not any(pair is not None and pair[0].needs_base for pair in pairs)

    def serve(self, layer: Carrying, kernel: str, x: Tensor, stored: Stored,
              given: Tensor) -> tuple[LowRankBranch | None, Prepared | None]:  # fmt: skip
        """(this layer's branch, its input projected with that of all siblings; the input, quantized by the first).

        Inside a compiled graph every layer quantizes for itself: what is kept from call to call would break it.
        """
        layers = [member() for member in self._layers]
        group, branch = self._branch(layers, layer, x, stored)
        if torch.compiler.is_compiling():
            return branch, None
        self._enter(layer, given)
        key = kernel, stored.group, stored.extension, branch is not None and branch.extended is not None
        if key not in self._prepared:
            self._prepare_both(layers, layer, group, key, x, stored, branch)
        if key not in self._prepared:
            self._prepared[key] = linear.prepare(kernel, x, stored, branch)
        found = self._prepared[key]
        self._served.add(id(layer))
        if len(self._served) == len(layers):
            self._clear()
        return branch, found

    def _prepare_both(self, layers, layer: Carrying, group, key: tuple, x: Tensor, stored: Stored, branch) -> None:
        """Where a sibling takes the other of nvfp4 and mxfp8, one pass over the input serves both."""
        other = {"nvfp4": "mxfp8", "mxfp8": "nvfp4"}.get(key[0])
        partner = next((m for m in layers if m is not layer and m.tessera_plan.kernel == other), None)
        if partner is None or not isinstance(partner.weight, comfy.quant_ops.QuantizedTensor):
            return
        columns, scale = partner.reserved(partner.weight), getattr(partner, "input_scale", None)
        if scale is not None:
            scale = comfy.model_management.cast_to_device(scale, x.device, None)
        theirs = dataclasses.replace(stored, kind=other, extension=columns, input_scale=scale)
        mine, carried = None if branch is None else branch.extended, partner.carries(group, x.device, columns)
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

    def _branch(self, layers: list[Carrying], layer: Carrying, x: Tensor,
                stored: Stored) -> tuple[Group | None, LowRankBranch | None]:  # fmt: skip
        """(the group of all siblings' branches, this layer's, with the down factors of all)."""
        pair = next((m.tessera_branch_pair for m in layers if m.tessera_branch_pair and m.tessera_branch_pair[0].rank),
                    None)  # fmt: skip
        if pair is None:
            return None, None
        (item, strengths), own = pair, layer.tessera_branch_pair
        group, span = item.group, (0, 0) if own is None else own[0].span
        up = cast(own[0].up.weight, x.device, x.dtype) if own and own[0].rank else x.new_zeros(stored.shape[0], 0)
        branch = LowRankBranch(cast(group.stacked.weight, x.device, x.dtype), up,
                               strengths.vector(group.runs, x.device), span)  # fmt: skip
        if not stored.extension:
            return group, branch
        layer.powers(stored, branch.own() if span[1] > span[0] else None)
        known = [member.known_powers(stored.qdata.device) for member in layers]
        reason = next((found for found in known if isinstance(found, str)), None)
        powers = reason or torch.cat([found for found in known if found is not None])
        return group, layer.carried(stored, branch, group, powers)


@contextlib.contextmanager
def names_only():
    """For who asks a model's state dict only for its keys: scales without reserved columns are a copy each."""
    token = _names_only.set(True)
    try:
        yield
    finally:
        _names_only.reset(token)


def cast(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The tensor there, and as it is if it is there already."""
    return comfy.model_management.cast_to_device(tensor, device, dtype)
