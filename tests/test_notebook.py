"""examples/tessera.ipynb runs from top to bottom in a process of its own, as a plain script, without a network."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "tessera.ipynb"
CELL = "print('cell {} begins', flush=True)\n"


def cells(kind):
    return [cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == kind]


def test_notebook_is_nbformat_4_without_outputs():
    notebook = json.loads(NOTEBOOK.read_text("utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["language"] == "python"
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)
    for cell in notebook["cells"]:
        assert cell["cell_type"] in ("markdown", "code") and all(isinstance(line, str) for line in cell["source"])
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells("code"))


def test_notebook_runs_from_top_to_bottom(tmp_path):
    sources = ["".join(cell["source"]) for cell in cells("code")]
    script = tmp_path / "notebook.py"
    script.write_text("\n".join(CELL.format(i) + source for i, source in enumerate(sources)), "utf-8")
    env = os.environ | {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    env |= {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}  # nothing listens there
    done = subprocess.run(
        [sys.executable, script], cwd=NOTEBOOK.parent, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert f"cell {len(sources) - 1} begins" in done.stdout
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| z_image_", "| int8_convrot "))]
    decibels = [[float(cell.split()[0]) for cell in row[5:7]] for row in rows]
    assert len(decibels) == 3 and all(plain < corrected for plain, corrected in decibels)
    made = {path.name for path in tmp_path.glob("tessera-notebook-*/*.safetensors")}
    assert {"nvfp4_lora.safetensors", "bare_lora.safetensors", "baked.safetensors"} <= made
