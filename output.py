"""The files that a job makes: what goes into the model, what into its correction LoRA, and that it arrives there."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from .checkpoint import ABSORB, BRANCH, LAYER_ERRORS, PROVENANCE, QUANTIZATION_METADATA, Checkpoint, read_header
from .contents import LAYER_OUTPUTS, LORA_PREFIX, METADATA_SPARE, WARNING, Contents, lora_key, record
from .formats import Plain, marker
from .journal import Journal
from .quantization import pipeline
from .quantization.lowrank import LowRank
from .quantization.report import LayerReport
from .workers import Result
from .writer import Writer

ABSORB_WARNING = (
    "This model is in Tessera's absorb mode: part of every quantized weight is in a low-rank branch (absorb_up, "
    "absorb_down) inside this file. Only Tessera's Diffusion Model Loader runs it right; any other loader drops the "
    "branches without a word and makes noise. https://github.com/tessera-comfy/tessera"
)
VERIFY_TOLERANCE = 1e-4  # of a relative error: what is on disk must have the error that was reported


class Output:
    """The files on their way. In a `with` block, which they leave published or not at all."""

    def __init__(self, contents: Contents, journal: Journal, overwrite: bool, resume: bool, device: str):
        self._contents, self._journal, self._device = contents, journal, device
        with ExitStack() as stack:
            self.model = stack.enter_context(Writer(
                contents.target, contents.specs(), contents.reserve(), overwrite, contents.optional(),
                journal.part(contents.target), resume))  # fmt: skip
            self.lora = None
            if contents.lora:
                self.lora = stack.enter_context(Writer(
                    contents.lora, {}, METADATA_SPARE, overwrite, contents.lora_specs(), journal.part(contents.lora),
                    resume))  # fmt: skip
            self._close = stack.pop_all()
        self._writers = {key: writer for key, writer in (("model", self.model), ("lora", self.lora)) if writer}
        journal.follow(self._writers.values())

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *exc) -> None:
        self._close.close()

    def adopt(self) -> list[LayerReport]:
        """The layers that an earlier run has written, up to the first that is not on disk as the journal says."""
        rows = []
        for name, done in zip(self._contents.formats, self._journal.records, strict=False):
            parts = [(writer, done[key]) for key, writer in self._writers.items()]
            if done["row"]["name"] != name or not all(writer.intact(written) for writer, written in parts):
                break
            for writer, written in parts:
                writer.adopt(written)
            rows.append(LayerReport.from_dict(done["row"]))
        self._journal.keep(len(rows))
        return rows

    def write(self, name: str, result: Result) -> LayerReport:
        """A layer's tensors into the files that they belong to."""
        contents, branch, format = self._contents, result.layer.branch, self._contents.formats[name]
        model = {contents.key(name, suffix): tensor for suffix, tensor in result.layer.entries.items()}
        if (bias := contents.key(name, "bias")) in model:
            model[bias] = model[bias].to(contents.source.tensors[bias].dtype)
        if not isinstance(format, Plain):
            model[contents.key(name, "comfy_quant")] = marker(record(format, result.shape))
        lora = {}
        if branch is not None and contents.mode == ABSORB:
            model |= {
                contents.key(name, suffix): part for suffix, part in zip(BRANCH, (branch.up, branch.down), strict=True)
            }
        elif branch is not None:
            lora = {lora_key(name, "lora_up.weight"): branch.up, lora_key(name, "lora_down.weight"): branch.down}
            if branch.bias is not None:
                lora[lora_key(name, "diff_b")] = branch.bias.float()
        for key, tensor in model.items():
            self.model.write(key, tensor)
        for key, tensor in lora.items():
            self.lora.write(key, tensor)
        row, mine = contents.row(name, result), {"model": model, "lora": lora}
        written = {key: writer.written(mine[key]) for key, writer in self._writers.items()}
        self._journal.add({"row": asdict(row)} | written)
        return row

    def copy_rest(self) -> int:
        """Everything that no layer has written, as the source has it."""
        self._journal.sync()
        keys = self._contents.kept()
        for key in keys:
            if not self.model.has(key):
                self.model.write(key, self._contents.source.read(key))
        for key, tensor in self._contents.carried.items():
            self.lora.write(key, tensor)
        return len(keys)

    def finish(self, rows: list[LayerReport], provenance: dict) -> None:
        """Closes both files, complete but for their names."""
        self._written = Checkpoint(self.model.finish(self._metadata(rows, provenance)))
        self._branches = None
        if self.lora:
            named = {PROVENANCE: json.dumps(provenance | {"model": self._contents.target.name})}
            self._branches = Checkpoint(self.lora.finish(named))

    def verify(self, row: LayerReport) -> float:
        """Reads a layer back from disk and compares it with the source once more; the seconds that took. Raises
        RuntimeError if it has another error than was reported."""
        started = time.monotonic()
        branch = self._branch(row) if row.corrected_error is not None else None
        stored = self._written.weight(row.name, absorbed=False).to(self._device)
        weight = self._contents.source.weight(row.name).to(self._device)
        found = pipeline.layer_errors(stored, branch.to(self._device) if branch else None, weight)
        for error, expected in zip(found, (row.error, row.corrected_error), strict=False):
            if not abs(error - expected) <= VERIFY_TOLERANCE * max(expected, 1e-3):
                raise RuntimeError(
                    f"{self._contents.target.name}: {row.name}: reads back with weight error {error:.6f}, written with "
                    f"{expected:.6f}; the disk or another program changed it, nothing was saved"
                )
        return time.monotonic() - started

    def reread(self) -> None:
        """Every byte once more: an error of 1e-4 hides a flipped bit of a large layer, and kept tensors have none."""
        self.model.reread(self._written)
        if self.lora:
            self.lora.reread(self._branches)

    def remarks(self) -> list[str]:
        """What one should know of the files."""
        smoothed = [n for n in self._contents.formats if self.model.has(self._contents.key(n, "pre_quant_scale"))]
        if not smoothed:
            return []
        return [f"{len(smoothed)} layers are smoothed (first: {smoothed[0]}): the file needs ComfyUI 0.30 or later"]

    def publish(self) -> None:
        """Gives the files their names."""
        self._journal.verified(self.model.overwrite)
        self._journal.publish(self.model.overwrite)

    def _branch(self, row: LayerReport) -> LowRank:
        if self._contents.mode == ABSORB:
            return self._written.branch(row.name)
        return read_branch(self._branches, row.name)

    def _metadata(self, rows: list[LayerReport], provenance: dict) -> dict[str, str]:
        contents = self._contents
        packed = {name: format for name, format in contents.formats.items() if not isinstance(format, Plain)}
        source, changed = contents.source, {f"{contents.source.prefix}{name}" for name in contents.formats}
        records = {key: said for key, said in source.records().items() if key not in changed}  # of layers that stay
        records |= {f"{source.prefix}{n}": record(f, contents.shape(n)) for n, f in packed.items()}
        metadata = dict(source.metadata) | {
            QUANTIZATION_METADATA: json.dumps({"format_version": "1.0", "layers": records}),
            PROVENANCE: json.dumps(provenance),
            LAYER_ERRORS: _numbers(self._said(LAYER_ERRORS) | {r.name: (r.error, r.corrected_error) for r in rows}),
        }
        outputs = {r.name: (r.output_error, r.corrected_output_error) for r in rows if r.output_error is not None}
        metadata[LAYER_OUTPUTS] = _numbers(self._said(LAYER_OUTPUTS) | outputs)
        if metadata[LAYER_OUTPUTS] == _numbers({}):
            del metadata[LAYER_OUTPUTS]
        return metadata | ({WARNING: ABSORB_WARNING} if contents.mode == ABSORB else {})

    def _said(self, key: str) -> dict[str, list[float]]:
        """What the source's metadata say of the errors of layers that stay quantized as they are."""
        source = self._contents.source
        try:
            said = json.loads(source.metadata.get(key, "{}"))
        except ValueError:
            return {}  # other tools' files may use the key for something else
        if not isinstance(said, dict):
            return {}
        return {n: e for n, e in said.items() if n not in self._contents.formats and source.quantized(n)}


def pair_problem(model: Path, lora: Path) -> str | None:
    """Why a correction LoRA is not that of this model; None if it is, or if they do not say. Reads headers only."""
    said = [_provenance(path) for path in (model, lora)]
    if None in said:
        return None
    ours, theirs = said
    named, theirs = theirs.get("model"), {key: value for key, value in theirs.items() if key != "model"}
    if ours == theirs:
        return None
    different = ", ".join(sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)))
    return (
        f"{lora.name}: is the correction of another {named or 'model'} than {model.name} (made with another "
        f"{different}); a job that was stopped may have left it: run that job again, or make both files anew"
    )


def _provenance(path: Path) -> dict | None:
    try:
        said = json.loads(read_header(path)[0].get(PROVENANCE, "null"))
    except (ValueError, RecursionError):
        return None
    return said if isinstance(said, dict) else None


def _numbers(errors: Mapping[str, tuple[float | None, ...]]) -> str:
    rows = {name: [round(error, 6) for error in pair if error is not None] for name, pair in errors.items()}
    return json.dumps(rows, separators=(",", ":"))


def read_branch(file: Checkpoint, name: str) -> LowRank:
    """The correction of one layer in a LoRA file of ours."""
    up, down = (file.read(f"{LORA_PREFIX}{name}.lora_{part}.weight") for part in ("up", "down"))
    return LowRank(up, down)
