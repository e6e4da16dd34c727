"""Folders, progress and words in the node."""

from __future__ import annotations

import itertools
import logging
from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths

from ..job import Step

BAR = 1000  # parts of a progress bar
log = logging.getLogger("tessera")


def compute_device() -> str:
    """Where the host computes: the GPU if it has one."""
    return str(comfy.model_management.get_torch_device())


def make_room(nbytes: int) -> None:
    """Has the host unload models until that much is free where it computes."""
    comfy.model_management.free_memory(nbytes, comfy.model_management.get_torch_device())


def full_path(folder: str, name: str) -> str:
    return folder_paths.get_full_path_or_raise(folder, name)


def filenames(folder: str) -> list[str]:
    return folder_paths.get_filename_list(folder)


def recipes_folder() -> Path:
    """Where a user's own recipe files are looked for; need not exist."""
    return Path(folder_paths.get_user_directory()) / "tessera" / "recipes"


def new_recipe_path(name: str) -> Path:
    """A recipe file that does not exist yet: <name>.toml, or <name>_2.toml and so on."""
    stem = name.removesuffix(".toml")
    for number in itertools.count(1):
        path = _below(recipes_folder(), f"{stem}.toml" if number == 1 else f"{stem}_{number}.toml")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return path


def calibrations_folder() -> Path:
    """Where calibrations are saved; need not exist."""
    return Path(folder_paths.get_user_directory()) / "tessera" / "calibrations"


def calibrations() -> list[str]:
    """Saved calibrations by the name below their folder."""
    folder = calibrations_folder()
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def calibration_path(name: str) -> Path:
    """A saved calibration. Raises ValueError if there is none of that name."""
    path = _below(calibrations_folder(), name)
    if not path.is_file():
        raise ValueError(f"{name}: no such calibration in {calibrations_folder()}; choose another, or record one")
    return path


def new_calibration_path(name: str) -> Path:
    """A numbered file that does not exist yet: <name>_00001.safetensors and so on."""
    folder, stem = calibrations_folder(), name.removesuffix(".safetensors")
    for number in itertools.count(1):
        path = _below(folder, f"{stem}_{number:05}.safetensors")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            return path


def _below(folder: Path, name: str) -> Path:
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{name}: leaves the folder {folder}; give a name below it")
    return path


def output_root(folder: str) -> Path:
    """The first folder registered for that kind; the host puts its old `unet` before `diffusion_models`."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(folder)]
    return next((path for path in paths if path.name not in ("unet", "clip")), paths[0]).resolve()


def listed_name(path: Path) -> str:
    """The name under which the host's loaders list a file that `output_path` gave."""
    roots = [output_root(folder) for folder in ("diffusion_models", "text_encoders", "loras")]
    roots.append(calibrations_folder().resolve())
    return next((str(path.relative_to(root)) for root in roots if path.is_relative_to(root)), path.name)


def output_path(folder: str, name: str) -> Path:
    """A file to write below the folder for that kind. Raises ValueError if the name leaves it."""
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    path = _below(output_root(folder), name)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Progress:
    """Bar and text in the node for a running job; raises the host's interrupt exception when the user cancels."""

    def __init__(self, node_id: str | None, text: bool = True):
        self.node_id, self.text, self._bar, self._done = node_id, text, None, 0

    def __call__(self, step: Step) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:
            self._bar = comfy.utils.ProgressBar(BAR, node_id=self.node_id)
        self._done = max(self._done, round(BAR * (step.share or step.index / step.total)))  # an estimate may sink
        self._bar.update_absolute(self._done)
        if self.text:
            say(self.node_id, "\n".join(filter(None, (str(step), step.details()))))


def send(node_id: str | None, event: str, data: dict) -> None:
    """Tells every open page something about a node; nothing where no server runs (tests, scripts)."""
    if node_id is not None:
        from server import PromptServer

        PromptServer.instance.send_sync(event, data)


def tell(node_id: str | None, *lines: str) -> None:
    """Logs lines, and shows them in the node."""
    for line in lines:
        log.info("Tessera: %s", line)
    say(node_id, "\n".join(lines))


def say(node_id: str | None, text: str) -> None:
    """Shows a line in the node, in both renderers; nothing where no server runs (tests, scripts)."""
    if node_id is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node_id)
