"""`tessera ...`: the same engine as the nodes, without ComfyUI."""

from __future__ import annotations

import argparse
import json
import sys

from . import saved_inputs, shortage
from .commands import bake, calibrate, doctor, extract_lora, inspect, probe, quantize, verify
from .pictures.mosaic_image import THEMES
from .quantization import pipeline, recipe
from .quantization.calibration import MOMENTS
from .quantization.difference import MAX_RANK, RANK
from .quantization.recorder import AUTO
from .survey import FORMATS, RANKS, ROWS
from .version import VERSION


def main(argv: list[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 on any failure with one message on stderr, 2 on wrong usage, 130 on Ctrl-C."""
    arguments = _parser().parse_args(argv)
    try:
        result = arguments.run(arguments)
    except (ValueError, RuntimeError, OSError, MemoryError) as problem:
        print(f"tessera: {shortage.in_words(problem)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("tessera: stopped, nothing was saved", file=sys.stderr)
        return 130
    print(json.dumps(result["json"], indent=1) if arguments.json else result["text"])
    return 0 if result.get("ok", True) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tessera", description=__doc__.strip("`. "))
    parser.add_argument("--version", action="version", version=f"tessera {VERSION}")
    commands = parser.add_subparsers(required=True, metavar="command")

    command = _command(commands, quantize, "quantize a checkpoint and fit its correction LoRA")
    command.add_argument("source", help="BF16 safetensors file")
    command.add_argument("-o", "--output", required=True, help="the quantized file to write")
    command.add_argument("--recipe", help=f"one of {', '.join(recipe.names())}, or a .toml file")
    command.add_argument("--convert-to-quant", metavar="FLAGS", help="take the formats of a convert_to_quant command")
    command.add_argument("--rank", type=int, default=32, help="rank of the correction LoRA; 0 writes none (32)")
    command.add_argument("--lora", help="where the correction LoRA goes (<output>_lora.safetensors)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--calibration", metavar="FILE", help="statistics of what the layers see (data-free without)")
    command.add_argument("--mode", choices=pipeline.MODES, default=pipeline.CORRECTION, help="correction: a LoRA "
                         "beside the model, that one may leave out; absorb: the low rank is part of the model, which "
                         "only Tessera's loader then runs (correction)")  # fmt: skip
    command.add_argument("--rounding", choices=pipeline.ROUNDINGS, default=pipeline.BEST, help="best: error "
                         "feedback where there are statistics, else sweep; sweep: of block scales; nearest: as other "
                         "tools do it (best)")  # fmt: skip
    command.add_argument("--simple", action="store_true", help="the same as --rounding nearest")
    command.add_argument("--smoothing", action=argparse.BooleanOptionalAction, help="smooth the inputs of nvfp4 layers "
                         "where statistics show that it pays; such a file needs ComfyUI 0.30 (only with --mode absorb)"
                         )  # fmt: skip
    command.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu, cuda, ...; several with "
                         "commas between take a process each (cpu)")  # fmt: skip
    command.add_argument("--workers", type=int, default=1, metavar="N", help="processes, each with a layer of its own "
                         "in work and in memory (1)")  # fmt: skip
    command.add_argument("--threads", type=int, metavar="N", help="threads per layer; other than speed it may change "
                         "the last bit of a sum, so the same number gives the same bytes (all cores)")  # fmt: skip
    command.add_argument("--ray", metavar="ADDRESS", help="have a Ray cluster do the work (auto: the one running here)")
    command.add_argument("--resume", action="store_true", help="go on where a killed run of the same command stopped")
    command.add_argument("--verbose", action="store_true", help="a line on stderr for each finished layer")
    command.add_argument("--overwrite", action="store_true", help="replace existing output files")

    _plan_options(command)

    command = _command(commands, probe, "score every layer in every format, and plan a size or an error")
    command.add_argument("source", help="BF16 safetensors file")
    command.add_argument("-o", "--output", metavar="RECIPE", help="the .toml file to write the plan to")
    command.add_argument("--calibration", metavar="FILE", help="statistics: scores are output errors (weight errors)")
    command.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu, cuda, ... (cpu)")
    _plan_options(command)
    _map_options(command, ("format", "error", "sensitivity", "size"))

    command = _command(commands, calibrate, "statistics of layer inputs that were saved to a folder")
    command.epilog, command.formatter_class = saved_inputs.__doc__, argparse.RawDescriptionHelpFormatter
    command.add_argument("source", help="BF16 safetensors file of the model")
    command.add_argument("--inputs", required=True, metavar="FOLDER", help="safetensors files, one per call of the "
                         "model, with the input [tokens, in] of each layer by module path")  # fmt: skip
    command.add_argument("-o", "--output", required=True, help="the calibration file to write")
    command.add_argument("--moment", default=AUTO, choices=(AUTO, *MOMENTS), help="what is kept of how inputs vary "
                         "together (auto: full up to 4096 channels, else block)")  # fmt: skip
    command.add_argument("--tokens", type=int, default=0, help="tokens taken of each input at random; 0: all (0)")
    command.add_argument("--memory-gb", type=float, default=0.0, help="RAM for the sums; 0: half of what is free (0)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--overwrite", action="store_true", help="replace an existing output file")

    command = _command(commands, extract_lora, "the difference of two checkpoints, in any formats, as a LoRA")
    command.add_argument("--base", required=True, metavar="A", help="what the LoRA will be loaded on: the model before "
                         "tuning, or a quantized file that is to be corrected")  # fmt: skip
    command.add_argument("--tuned", required=True, metavar="B", help="what comes out with the LoRA: the tuned model, "
                         "or the quantized file's original")  # fmt: skip
    command.add_argument("-o", "--output", required=True, help="the LoRA to write; <base>_lora.safetensors is found "
                         "beside the checkpoint")  # fmt: skip
    ranks = command.add_mutually_exclusive_group()
    ranks.add_argument("--rank", type=int, default=RANK, help=f"of every layer ({RANK})")
    ranks.add_argument("--tolerance", type=float, metavar="X", help="instead of a rank: each layer takes the smallest "
                      "that loses no more than this share of its difference, 0.05 for instance")  # fmt: skip
    command.add_argument("--max-rank", type=int, default=MAX_RANK, help=f"the most with --tolerance ({MAX_RANK})")
    command.add_argument("--calibration", metavar="FILE", help="statistics of what the layers see, of either model: "
                         "the output error is made least, not that of the weight")  # fmt: skip
    command.add_argument("--layers", default="", metavar="PATTERN", help="only these, as in a recipe: "
                         "'layers.{0-9}.**'; several with spaces between")  # fmt: skip
    command.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu, cuda, ... (cpu)")
    command.add_argument("--overwrite", action="store_true", help="replace an existing output file")

    command = _command(commands, bake, "LoRAs into a new quantized file, with a correction LoRA fitted to it")
    command.add_argument("model", help="the quantized safetensors file")
    command.add_argument("-o", "--output", required=True, help="the file to write; its correction LoRA goes to "
                         "<output>_lora.safetensors")  # fmt: skip
    command.add_argument("--lora", action="append", required=True, metavar="FILE[:STRENGTH]", help="a LoRA of any kind "
                         "and its strength (1); may be repeated")  # fmt: skip
    command.add_argument("--original", metavar="BF16", help="the file the model was quantized from: all layers are "
                         "quantized anew from it. Without it only changed ones, from what is left of it")  # fmt: skip
    command.add_argument("--recipe", help="other formats than the model has: a built-in recipe, or a .toml file")
    command.add_argument("--rank", type=int, default=32, help="rank of the new correction LoRA; 0 fits none (32)")
    command.add_argument("--correction", metavar="FILE", help="the model's correction LoRA, or none "
                         "(<model>_lora.safetensors beside it; not used with --original)")  # fmt: skip
    command.add_argument("--calibration", metavar="FILE", help="statistics of what the original's layers see")
    command.add_argument("--skip-unmatched", action="store_true", help="leave out what fits nothing in the model")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu", help="where the arithmetic runs: cpu, cuda, ... (cpu)")
    command.add_argument("--resume", action="store_true", help="go on where a killed run of the same command stopped")
    command.add_argument("--overwrite", action="store_true", help="replace existing output files, never the inputs")

    command = _command(commands, inspect, "what a file holds, layer by layer")
    command.add_argument("file")
    command.add_argument("--repair", metavar="OUT", help="also write a file in which everything is in order that was "
                         "repaired on reading; never over an existing one")  # fmt: skip
    _map_options(command, ("format", "error", "size"))

    command = _command(commands, doctor, "how each format runs on this device, and what is missing")
    command.add_argument("--device", help="cpu, cuda, cuda:1, mps, xpu (the first GPU, else cpu)")
    command.add_argument("--markdown", action="store_true", help="a table for an issue report")

    command = _command(commands, verify, "compare every quantized layer with its source")
    command.add_argument("file")
    command.add_argument("--against", required=True, metavar="SRC", help="the file it was made from")
    command.add_argument("--lora", help="its correction LoRA")
    command.add_argument("--max-error", type=float, default=0.2, help="largest relative weight error allowed (0.2)")
    return parser


def _plan_options(command: argparse.ArgumentParser) -> None:
    """What a plan is asked for."""
    command.add_argument("--target-size", metavar="SIZE", help="the most that model and correction LoRA together may "
                         "take, as 4.84GB or 4.5GiB: formats and ranks are allocated to it")  # fmt: skip
    command.add_argument("--target-error", type=float, metavar="X", help="the smallest file with no more expected "
                         "error: root mean square over layers of their relative error")  # fmt: skip
    command.add_argument("--formats", default=",".join(FORMATS), help=f"what a plan may choose ({','.join(FORMATS)})")
    command.add_argument("--ranks", help=f"ranks a plan may choose ({','.join(map(str, RANKS))})")
    command.add_argument("--rows", type=int, default=ROWS, help="of each weight that are measured for a plan, evenly "
                         f"spaced; 0: all ({ROWS})")  # fmt: skip
    command.add_argument("--edits", default="", metavar="TEXT", help="layers of a plan that you decide yourself, in a "
                         "file or as 'layers.3.** = mxfp8 r32; final_layer.linear = keep'")  # fmt: skip


def _map_options(command: argparse.ArgumentParser, colours: tuple[str, ...]) -> None:
    command.add_argument("--map", metavar="OUT.png", help="also draw the layer map: blocks, kinds of layers, formats; "
                         "never over an existing file. Needs Pillow")  # fmt: skip
    command.add_argument("--color", choices=colours, default="format", help="of the map (format)")
    command.add_argument("--theme", choices=tuple(THEMES), default="light", help="of the map (light)")


def _command(commands, run, text: str) -> argparse.ArgumentParser:
    command = commands.add_parser(run.__name__.replace("_", "-"), help=text, description=text)
    command.add_argument("--json", action="store_true", help="print the result as JSON")
    command.set_defaults(run=run)
    return command


if __name__ == "__main__":
    sys.exit(main())
