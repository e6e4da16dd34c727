"""Folders, progress and words in the node."""

from __future__ import annotations

from pathlib import Path

import comfy.model_management
import comfy.utils
import folder_paths

from ..job import Step


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


def output_root(folder: str) -> Path:
    """The first folder registered for that kind; the host puts its old `unet` before `diffusion_models`."""
    paths = [Path(path) for path in folder_paths.get_folder_paths(folder)]
    return next((path for path in paths if path.name not in ("unet", "clip")), paths[0]).resolve()


def listed_name(path: Path) -> str:
    """The name under which the host's loaders list a file that `output_path` gave."""
    roots = [output_root(folder) for folder in ("diffusion_models", "text_encoders", "loras")]
    return next((str(path.relative_to(root)) for root in roots if path.is_relative_to(root)), path.name)


def output_path(folder: str, name: str) -> Path:
    """A file to write below the folder for that kind. Raises ValueError if the name leaves it."""
    root = output_root(folder)
    name = name if name.endswith(".safetensors") else f"{name}.safetensors"
    path = (root / name).resolve()
    if not path.is_relative_to(root):
        raise ValueError(f"{name}: leaves the folder {root}; give a name below it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


class Progress:
    """Bar and text in the node for a running job; raises the host's interrupt exception when the user cancels."""

    def __init__(self, node_id: str | None):
        self.node_id, self._bar = node_id, None

    def __call__(self, step: Step) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        if self._bar is None:  # every layer is met twice: quantized, then verified
            self._bar = comfy.utils.ProgressBar(2 * step.total, node_id=self.node_id)
        self._bar.update_absolute(step.index + (step.total if step.verifying else 0))
        say(self.node_id, str(step))


def say(node_id: str | None, text: str) -> None:
    """Shows a line in the node, in both renderers; nothing where no server runs (tests, scripts)."""
    if node_id is not None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, node_id)
