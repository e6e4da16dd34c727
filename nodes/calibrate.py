"""Calibration: record what layers see while the user's own workflow runs, save it, load it."""

from __future__ import annotations

import logging

from comfy_api.latest import io

from .. import calibration_file, host
from ..quantization.calibration import MOMENTS

CALIBRATION = io.Custom("TESSERA_CALIBRATION")
log = logging.getLogger("tessera")


def _recording() -> list:
    """The inputs that both recording nodes have."""
    return [
        io.Combo.Input("moment", options=["auto", *MOMENTS], default="auto", optional=True, advanced=True,
                       tooltip="What is kept of how inputs vary together. auto: all of it up to 4096 channels, within "
                       "blocks of 128 above. block takes far less memory and keeps most of the gain."),
        io.Int.Input("tokens", default=1024, min=16, max=65536, optional=True, advanced=True,
                     tooltip="Tokens taken from each call of each layer, at random."),
        io.Float.Input("memory_gb", default=0.0, min=0.0, max=4096.0, step=0.5, optional=True, advanced=True,
                       tooltip="RAM the statistics may take. 0: half of what is free. What does not fit is recorded "
                       "in blocks, and the node says so."),
        io.Int.Input("seed", default=0, min=0, max=2**31 - 1, optional=True, advanced=True,
                     control_after_generate=False, tooltip="Chooses the tokens."),
    ]  # fmt: skip


class Calibrate(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraCalibrate", "Calibrate (Tessera)", "tessera",
            inputs=[
                io.Model.Input("model", tooltip="The model to quantize, in full precision."),
                *_recording(),
                io.Int.Input("probes", default=6, min=0, max=64, optional=True, advanced=True,
                             tooltip="Calls of the model kept for Plan (Tessera), which measures layers with them. 0 "
                             "keeps none."),
            ],
            outputs=[
                io.Model.Output(tooltip="Sample with this one."),
                CALIBRATION.Output("CALIBRATION", display_name="calibration",
                                   tooltip="Through Save Calibration, which waits for the sampler."),
            ],
            hidden=[io.Hidden.unique_id],
            description="Records what each layer gets to see while your own sampler runs. Pictures stay the same to "
            "the bit. Every further run adds to it.",
            search_aliases=["calibration", "statistics", "activations", "record", "imatrix", "quantize"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model, moment="auto", tokens=1024, memory_gb=0.0, seed=0, probes=6):
        return _record(cls, model, host.RecordOptions(moment, tokens, memory_gb, probes, seed))


class CalibrateCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraCalibrateCLIP", "Calibrate CLIP (Tessera)", "tessera",
            inputs=[io.Clip.Input("clip", tooltip="The text encoder to quantize, in full precision."), *_recording()],
            outputs=[
                io.Clip.Output(tooltip="Encode prompts with this one."),
                CALIBRATION.Output("CALIBRATION", display_name="calibration",
                                   tooltip="Through Save Calibration, which waits for the encoded prompts."),
            ],
            hidden=[io.Hidden.unique_id],
            description="Records what each layer of a text encoder gets to see while your prompts are encoded. Every "
            "further prompt adds to it.",
            search_aliases=["calibration", "statistics", "text encoder", "record", "imatrix", "quantize"],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip, moment="auto", tokens=1024, memory_gb=0.0, seed=0):
        return _record(cls, clip, host.RecordOptions(moment, tokens, memory_gb, 0, seed))


class SaveCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraSaveCalibration", "Save Calibration (Tessera)", "tessera", is_output_node=True,
            inputs=[
                CALIBRATION.Input("calibration", tooltip="From Calibrate (Tessera)."),
                io.AnyType.Input("after", tooltip="What the recorded run makes: the sampler's LATENT, or the "
                                 "CONDITIONING of a text encoder. Saving waits for it."),
                io.String.Input("filename", default="calibration", tooltip="Name of the file in "
                                "user/tessera/calibrations; a number is added, nothing is overwritten."),
            ],
            outputs=[
                CALIBRATION.Output("CALIBRATION", display_name="calibration", tooltip="What was recorded up to now."),
                io.Combo.Output("calibration_name", tooltip="Connect to calibration_name of Load Calibration."),
            ],
            hidden=[io.Hidden.unique_id],
            description="Saves recorded statistics after the sampler has run, and passes them on.",
            search_aliases=["calibration", "statistics", "imatrix"],
        )  # fmt: skip

    @classmethod
    def execute(cls, calibration, after, filename="calibration"):
        recorded = host.calibration_of(calibration)
        path = host.new_calibration_path(filename or "calibration")
        calibration_file.write(recorded, path)
        name, text = host.listed_name(path), _described(path)
        host.tell(cls.hidden.unique_id, *text.splitlines())
        return io.NodeOutput(calibration, name, ui={"text": [text]})


class LoadCalibration(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            "TesseraLoadCalibration", "Load Calibration (Tessera)", "tessera",
            inputs=[io.Combo.Input("calibration_name", options=host.calibrations(),
                                   tooltip="A file in user/tessera/calibrations.")],
            outputs=[CALIBRATION.Output("CALIBRATION", display_name="calibration",
                                        tooltip="Connect to Quantize and Save (Tessera) or Plan (Tessera).")],
            hidden=[io.Hidden.unique_id],
            description="Loads statistics that Save Calibration or the command line wrote.",
            search_aliases=["calibration", "statistics", "imatrix"],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, calibration_name=None):
        """A file that was replaced is read again; a name that comes from another node is not known yet."""
        names = host.calibrations()
        return host.calibration_path(calibration_name).stat().st_mtime_ns if calibration_name in names else None

    @classmethod
    def execute(cls, calibration_name):
        path = host.calibration_path(calibration_name)
        calibration = calibration_file.read(path)
        host.say(cls.hidden.unique_id, _described(path))
        return io.NodeOutput(calibration)


def _record(cls, model, options) -> io.NodeOutput:
    recording, recorder = host.record(model, options)
    text = recorder.summary()
    log.info("Tessera: recording %s", text)
    host.say(cls.hidden.unique_id, text)
    return io.NodeOutput(recording, recorder)


def _described(path) -> str:
    return "\n".join(calibration_file.inspect(path)["text"])
