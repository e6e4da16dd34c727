"""The error-correction slider."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host

BESIDE = "(beside the checkpoint)"


class CorrectionLoRA(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraCorrectionLoRA", "Error-Correction LoRA (Tessera)", "tessera",
            inputs=[
                io.Model.Input("model", tooltip="A quantized model, from any loader."),
                io.Combo.Input("lora_name", options=[BESIDE, *host.filenames("loras")], default=BESIDE,
                               tooltip="By default <checkpoint>_lora.safetensors, from the checkpoint's own folder or "
                               "from models/loras."),
                io.Float.Input("strength", default=1.0, min=0.0, max=2.0, step=0.01,
                               display_mode=io.NumberDisplay.slider,
                               tooltip="0 is the quantized model alone, 1 the whole correction; more overshoots."),
            ],
            outputs=[io.Model.Output(tooltip="The model with its correction. The input stays as it was.")],
            hidden=[io.Hidden.unique_id],
            description="Adds a quantized model's correction beside its packed weights, exactly and at any strength. "
            "No weight is rewritten, moving the slider reloads nothing.",
            search_aliases=["lora", "strength", "svd", "quantization error", "slider"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, lora_name=BESIDE, strength=1.0):
        if not lora_name:  # what TesseraQuantize gives where it made none
            host.say(cls.hidden.unique_id, "no correction LoRA was made; the model is passed on as it is")
            return io.NodeOutput(model)
        path = correction_path(model, lora_name)
        patched, attached = host.attach_lora(model, path, strength)
        hints = [host.mismatch(model, path), host.merged_hint(model)]
        said = [host.coverage(model, attached), *filter(None, hints)]
        host.tell(cls.hidden.unique_id, *said)
        return io.NodeOutput(patched)


def correction_path(model, lora_name: str) -> str:
    """The file of a name in the list. Raises ValueError if none lies beside the checkpoint, saying what to do."""
    if lora_name != BESIDE:
        return host.full_path("loras", lora_name)
    _explain_absorbed(model)
    path = host.lora_beside(model)
    if path is None:
        raise ValueError("no correction LoRA lies beside this checkpoint; choose one in lora_name, or quantize the "
                         "original with TesseraQuantize, which writes one")  # fmt: skip
    return path


def _explain_absorbed(model) -> None:
    """Raises ValueError where the branch is part of the model, so that nothing is there to slide."""
    layers = host.absorbed_layers(model)
    if layers:
        raise ValueError(f"this is an absorb model: the low-rank branch of its {layers} layers is part of it and "
                         "always fully on, so there is nothing to slide. Remove this node; or choose another LoRA in "
                         "lora_name, which is added as usual")  # fmt: skip
    if host.lacks_branch(model):
        raise ValueError("this is an absorb model, and its loader has dropped the low-rank branch that is part of it: "
                         "the picture will be wrong. Load it with Load Diffusion Model (Tessera)")  # fmt: skip
