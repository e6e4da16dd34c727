"""What Settings > Tessera does in Python: the limit of the transcoding cache, as the dialog keeps it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from comfy_host import node
from conftest import ROOT

pytestmark = pytest.mark.host


@pytest.fixture
def setting(models):
    """Writes what the settings dialog would: a setting's value, or nothing at all."""
    import folder_paths

    file = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    yield lambda **values: file.write_text(json.dumps({f"Tessera.{name}": value for name, value in values.items()}))
    file.unlink(missing_ok=True)


@pytest.fixture
def folder(models):
    from tessera import host

    shutil.rmtree(host.transcoded_folder(), ignore_errors=True)
    yield host.transcoded_folder()
    shutil.rmtree(host.transcoded_folder(), ignore_errors=True)


@pytest.mark.parametrize(
    ("value", "nbytes"), [(2, 2e9), (0.5, 5e8), (0, None), (None, 1e11), ("many", 1e11), (-1, 1e11), (True, 1e11)]
)
def test_the_limit_is_what_the_dialog_saved_and_0_is_none(setting, value, nbytes):
    from tessera.host import settings

    setting(**({} if value is None else {"CacheLimit": value}))
    assert settings.cache_limit() == nbytes


def test_defaults_of_the_dialog_are_those_of_python():
    from tessera.host import settings

    text = (ROOT / "web" / "tessera.js").read_text()
    assert f'id: "{settings.CACHE_LIMIT}"' in text and f"defaultValue: {settings.CACHE_LIMIT_GB}," in text
    assert f'id: "{settings.MERGE_GUARD}"' in text


def stale(folder, name, nbytes, age):
    """A cache file of another model that was used `age` seconds ago."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(b"\0" * nbytes)
    os.utime(path, (path.stat().st_atime - age, path.stat().st_mtime - age))
    return path


def test_loading_removes_what_was_used_longest_ago_and_never_its_own(folder, setting, tiny, caplog):
    load = node("TesseraDiffusionModelLoader").execute
    old, older = stale(folder, "old.safetensors", 3_000_000, 60), stale(folder, "older.safetensors", 1000, 3600)
    other = stale(folder, "notes.txt", 5_000_000, 7200)
    setting(CacheLimit=0)
    load(tiny["model"], cache=True)
    (own,) = set(folder.glob("*.safetensors")) - {old, older}
    assert old.exists() and older.exists(), "0 is no limit"

    setting(CacheLimit=(own.stat().st_size + 3_000_500) / 1e9)
    with caplog.at_level("INFO", "tessera"):
        load(tiny["model"], cache=True)
    assert own.exists() and old.exists() and not older.exists() and other.exists()
    assert "older.safetensors removed" in caplog.text

    setting(CacheLimit=1e-6)  # less than the file in use
    load(tiny["model"], cache=True)
    assert own.exists() and not old.exists() and other.exists()


def test_a_cache_that_is_read_counts_as_used(folder, tiny):
    load = node("TesseraDiffusionModelLoader").execute
    load(tiny["model"], cache=True)
    (own,) = folder.glob("*.safetensors")
    os.utime(own, (0, 0))
    bytes_before = own.read_bytes()
    load(tiny["model"], cache=True)
    assert own.stat().st_mtime > 1e9 and own.read_bytes() == bytes_before
