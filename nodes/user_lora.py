"""LoRAs that ride beside quantized weights: one with a schedule, or a stack of them."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace

from comfy_api.latest import io

from .. import host, lora_stack

log = logging.getLogger("tessera")
STACK_HELP = (
    "One LoRA a line: name.safetensors : strength_model, and : strength_clip where the text encoder's differs. A line "
    "that starts with # is muted. The order does not matter."
)


def _strength(name: str, tooltip: str, optional: bool = False) -> io.Float.Input:
    return io.Float.Input(name, default=1.0, min=-lora_stack.LIMIT, max=lora_stack.LIMIT, step=0.01,
                          optional=optional, tooltip=tooltip)  # fmt: skip


def _percent(name: str, default: float, tooltip: str) -> io.Float.Input:
    return io.Float.Input(name, default=default, min=0.0, max=1.0, step=0.001, optional=True, advanced=True,
                          tooltip=tooltip)  # fmt: skip


def _model_and_clip() -> list:
    return [
        io.Model.Input("model", tooltip="The diffusion model, quantized or not, from any loader."),
        io.Clip.Input("clip", optional=True, tooltip="The text encoder; leave it unconnected for LoRAs of the model "
                      "alone."),
    ]  # fmt: skip


def _outputs() -> list:
    return [
        io.Model.Output(tooltip="The model with the LoRA beside its layers. The input stays as it was."),
        io.Clip.Output(tooltip="The text encoder likewise; nothing if none is connected."),
    ]


class LoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraLoRA", "Load LoRA (Tessera)", "tessera",
            inputs=[
                *_model_and_clip(),
                io.Combo.Input("lora_name", options=host.filenames("loras"),
                               tooltip="A safetensors file in models/loras, of any kind that ComfyUI knows."),
                _strength("strength_model", "How strongly the diffusion model is changed; may be negative."),
                _strength("strength_clip", "How strongly the text encoder is changed; may be negative.", optional=True),
                _percent("start_percent", 0.0, "Where in sampling the LoRA begins to act on the model: 0 at the first "
                         "step, 1 after the last."),
                _percent("end_percent", 1.0, "Where in sampling it ends."),
                io.String.Input("curve", default="", optional=True, advanced=True,
                                tooltip="strength_model over sampling, as points percent:factor, linear between them, "
                                "e.g. 0:0, 0.3:1, 1:0.5. Empty: constant."),
                io.Float.Input("tolerance", default=0.02, min=0.0, max=1.0, step=0.005, optional=True, advanced=True,
                               tooltip="How much of a change that has no small factors may be lost by reducing it to "
                               "low rank: 0.02 is 2 % (Frobenius). 0 keeps it whole, slower and larger."),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
            description="Adds a LoRA beside the weights, quantized or not, exactly: nothing is merged or rounded "
            "again. Moving a strength rewrites no weight.",
            search_aliases=["lora", "load lora", "lora loader", "apply lora", "dora", "lokr", "loha", "lycoris",
                            "schedule", "lora loader model only"],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, curve=""):
        return _complaint(host.Schedule.parse, curve or "")

    @classmethod
    def fingerprint_inputs(cls, lora_name=None, **_):
        return _fingerprint([lora_name])

    @classmethod
    def execute(cls, model, lora_name, strength_model, clip=None, strength_clip=1.0, start_percent=0.0,
                end_percent=1.0, curve="", tolerance=0.02):  # fmt: skip
        line = lora_stack.Line(lora_name, strength_model, strength_clip)
        return _attach(cls, model, clip, [line], host.Schedule.parse(curve, start_percent, end_percent), tolerance)


class LoRAStack(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraLoRAStack", "LoRA Stack (Tessera)", "tessera",
            inputs=[
                *_model_and_clip(),
                io.String.Input("stack", multiline=True, default="", dynamic_prompts=False, tooltip=STACK_HELP,
                                placeholder="name.safetensors : 0.8"),
            ],
            outputs=_outputs(),
            hidden=[io.Hidden.unique_id],
            description="Adds any number of LoRAs beside the weights, quantized or not, as one branch for each layer. "
            "Each can be muted; moving a strength rewrites no weight.",
            search_aliases=["lora", "lora stack", "multi lora", "power lora loader", "load lora", "lora loader"],
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, stack=""):
        return _complaint(_lines, stack)

    @classmethod
    def fingerprint_inputs(cls, stack=None, **_):
        return _fingerprint([line.name for line in _lines(stack)]) if _complaint(_lines, stack) is True else None

    @classmethod
    def execute(cls, model, stack, clip=None):
        return _attach(cls, model, clip, _lines(stack))


def _lines(stack: str | None) -> list[lora_stack.Line]:
    return lora_stack.parse(stack or "", host.filenames("loras"))


def _complaint(check, *values) -> bool | str:
    """What the host shows before anything runs; an input that comes from another node is only known when it does."""
    try:
        check(*values)
    except ValueError as error:
        return str(error)
    return True


def _fingerprint(names: list[str | None]) -> str:
    """A file that was replaced is read again; a name that comes from another node is not known yet."""
    listed = host.filenames("loras")
    return " ".join(str(os.stat(host.full_path("loras", name)).st_mtime_ns) for name in names if name in listed)


def _attach(cls, model, clip, lines, schedule=None, tolerance=0.02) -> io.NodeOutput:
    """The lines' LoRAs beside model and clip; says and logs per file what became of it."""
    said = []
    for line in lines:
        model, clip, texts = _attach_line(model, clip, line, schedule, tolerance)
        said += texts
    said += filter(None, [host.merged_hint(model), None if clip is None else host.merged_hint(clip.patcher)])
    for text in said:
        log.info("Tessera: %s", text)
    shown = [f"• {text}" for text in said] if len(said) > 1 else said  # Nodes 2.0 runs lines together
    host.say(cls.hidden.unique_id, "\n".join(shown) or "no LoRA is on: all is passed on as it is")
    return io.NodeOutput(model, clip)


def _attach_line(model, clip, line, schedule, tolerance):
    """(model, clip, what to say) with one file, which may fit both or either. Raises ValueError if it fits neither."""
    path, on_model, on_clip, misfit = host.full_path("loras", line.name), None, None, None
    if line.strength_model:
        try:
            model, on_model = host.attach_file(model, path, line.strength_model, schedule, tolerance)
        except host.NothingFits as error:
            misfit = error
    if clip is not None and line.strength_clip:
        with contextlib.suppress(host.NothingFits):  # as with most files
            patcher, on_clip = host.attach_file(clip.patcher, path, line.strength_clip, None, tolerance)
            clip = clip.clone()
            clip.patcher = patcher
    if misfit is not None and on_clip is None:
        raise ValueError(str(misfit))  # ComfyUI shows the path of any type that is not Python's own
    asked = clip is None or line.strength_clip != 0  # else what fits neither is not known
    return model, clip, _texts(on_model, on_clip, asked)


def _texts(on_model, on_clip, asked: bool) -> list[str]:
    """What became of a file; names that fit nothing are those that fit neither."""
    texts = []
    if on_model is not None:
        unmatched = [name for name in on_model.unmatched if asked and (on_clip is None or name in on_clip.unmatched)]
        texts.append(replace(on_model, unmatched=tuple(unmatched)).text)
    if on_clip is not None:
        texts.append(f"text encoder: {replace(on_clip, unmatched=()).text}")
    return texts
