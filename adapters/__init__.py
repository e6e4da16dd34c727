"""Adapters: every kind of LoRA file's change to a layer, what it adds to a weight, and how it runs beside one."""

from .base import Adapter, Change
from .extras import Butterfly, Dense, Extra, Kronecker, Rotation, RowScale
from .forms import Form, form
from .kinds import Difference, DoRA, GLoRA, LoHa, LoKr, LoRA, Replacement
from .rotations import BOFT, OFT

__all__ = ["BOFT", "OFT", "Adapter", "Butterfly", "Change", "Dense", "Difference", "DoRA", "Extra", "Form", "GLoRA",
           "Kronecker", "LoHa", "LoKr", "LoRA", "Replacement", "Rotation", "RowScale", "form"]  # fmt: skip
