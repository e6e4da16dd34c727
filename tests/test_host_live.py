"""A quantization as pages see it: every layer told as it is done, all of it kept for those that come later."""

import json
import os
import shutil
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfy_host import TINY
from host_server import HostError, HostServer

pytestmark = pytest.mark.host

WORKFLOW = "3f0e5c1a-0000-4000-8000-000000000001"
HOSTILE, BOLD = '<img src=x onerror="alert(1)">', "<b>name"


@pytest.fixture(scope="module")
def host():
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/test, or scripts/setup_host.py")
    with HostServer(cpu=True) as server:
        folder = server.models("diffusion_models")
        for other in ("text_encoders", "loras"):
            server.models(other)
        shutil.copy(TINY, folder / "tiny.safetensors")
        wide = {f"layers.{i}.feed_forward.w2.weight": torch.randn(1024, 2816).bfloat16() for i in range(12)}
        save_file(wide, folder / "wide.safetensors")
        save_file({f"layers.0.{HOSTILE}.weight": torch.ones(64, 256)}, folder / "hostile.safetensors")
        shutil.copy(TINY, folder / f"{BOLD}.sft")
        tensors = load_file(TINY)
        tensors["layers.1.feed_forward.w2.weight"][3, 4] = float("nan")
        save_file(tensors, folder / "nan.safetensors")
        yield server


def quantize(filename, source="tiny.safetensors", **inputs):
    inputs = {"recipe": "z_image_nvfp4", "rank": 32, "source": f"diffusion_models/{source}"} | inputs
    return {"class_type": "TesseraQuantize", "inputs": inputs | {"filename": filename}}


def queue(host, graph, workflow=WORKFLOW):
    """As a page queues: with the workflow that it shows."""
    extra = {"extra_pnginfo": {"workflow": {"id": workflow, "nodes": []}}}
    body = {"prompt": graph, "client_id": host.client_id, "extra_data": extra}
    return host.post("/prompt", body)["prompt_id"]


def told(host, since, **wanted):
    """What pages were told, in order."""
    found = [event["data"] for event in host.events[since:] if event["type"] == "tessera.job"]
    return [job for job in found if wanted.items() <= job.items()]


def known(host, **wanted):
    """The newest job of the kind that a page finds."""
    return next(job for job in host.get("/tessera/jobs")["jobs"] if wanted.items() <= job.items())


@pytest.fixture(scope="module")
def first(host):
    """A whole run: (prompt id, history entry, what pages were told)."""
    since = len(host.events)
    prompt = queue(host, {"57:30": quantize("first")})
    entry = host.wait(prompt)
    host.wait_event("tessera.job", since=since, state="done")
    return prompt, entry, told(host, since)


def test_every_layer_is_told_as_it_is_done(first):
    prompt, _, jobs = first
    assert {(job["node"], job["prompt"], job["workflow"]) for job in jobs} == {("57:30", prompt, WORKFLOW)}
    assert [job["count"] for job in jobs] == list(range(1, len(jobs) + 1))
    working = [job for job in jobs if job["layer"] and not job["verifying"]]
    assert [(job["index"], job["total"]) for job in working] == [(i, 28) for i in range(28)]
    done = [job["last"]["name"] for job in jobs if job["last"]]
    assert len(done) == len(set(done)) == 28 and done[:27] == [job["layer"] for job in working[:27]]
    assert len([job for job in jobs if job["verifying"]]) == 29
    shares = [job["share"] for job in jobs]
    assert shares == sorted(shares) and shares[-1] == 1.0
    sizes = [job["nbytes"] for job in working]
    assert sizes == sorted(sizes) and sizes[0] == 0 < sizes[1] < jobs[-1]["nbytes"] < jobs[-1]["source_bytes"]


def test_the_mean_error_is_that_of_the_layers_so_far(first):
    *_, jobs = first
    working = [job for job in jobs if job["last"] and not job["verifying"]]
    errors = [job["last"]["error"] for job in working]
    for count, job in enumerate(working, 1):
        assert job["error"] == pytest.approx(sum(errors[:count]) / count)
        assert job["corrected"] < job["error"]


def test_the_map_comes_empty_at_the_start_and_full_at_the_end(first):
    *_, jobs = first
    maps = [job["map"]["layers"] for job in jobs if job.get("map")]
    assert len(maps) == 2
    quantized = [i for i, error in enumerate(maps[1]["error"]) if error is not None]
    assert len(quantized) == 28 and all(error is None for error in maps[0]["error"])
    assert maps[0]["name"] == maps[1]["name"] and [maps[1]["rank"][i] for i in quantized] == [32] * 28


def test_the_end_is_what_the_node_itself_shows(first):
    _, entry, jobs = first
    output, end = entry["outputs"]["57:30"], jobs[-1]
    (shown,) = output["tessera_job"]
    assert end == shown | {"map": output["tessera_map"][0]} and end["state"] == "done"
    assert output["text"][0].startswith("- first.safetensors: ")
    assert f"- {end['report']['lines'][0]}" == output["text"][0].splitlines()[0]
    for row in end["report"]["rows"]:
        assert f"| {' | '.join(row)} |" in output["text"][0]


def test_the_report_is_a_file_that_the_page_can_open(host, first):
    _, entry, jobs = first
    file, output = jobs[-1]["file"], entry["outputs"]["57:30"]
    assert file == {"filename": "first_report_00001.json", "subfolder": "tessera", "type": "output"}
    assert "this report as JSON: output/tessera/first_report_00001.json" in output["text"][0]
    found = host.get(f"/view?filename={file['filename']}&subfolder={file['subfolder']}&type=output")
    assert found == output["tessera_report"][0] and len(found["layers"]) == 28


def test_reports_are_numbered_and_stay_as_they_are(host, first):
    folder = host.base / "output" / "tessera"
    before = (folder / "first_report_00001.json").read_bytes()
    (folder / "first_report_00007.json").write_text("somebody's own")
    again = {"57:30": quantize("first", smoothing=False)}  # the same job, but not the same words: it runs
    entry = host.wait(queue(host, again))
    assert entry["outputs"]["57:30"]["tessera_job"][0]["file"]["filename"] == "first_report_00008.json"
    assert (folder / "first_report_00001.json").read_bytes() == before
    assert (folder / "first_report_00007.json").read_text() == "somebody's own"
    assert [path for path in folder.iterdir() if path.suffix != ".json"] == []


def test_a_page_that_comes_in_the_middle_finds_all_of_it_and_cancels(host):
    since = len(host.events)
    prompt = queue(host, {"5": quantize("half", source="wide.safetensors")})
    host.wait_event("tessera.job", since=since, index=2, verifying=False)
    job = known(host, prompt=prompt)
    assert job["state"] == "running" and job["total"] == 12 and job["index"] >= 2
    filled = [error for error in job["map"]["layers"]["error"] if error is not None]
    assert len(filled) == job["index"] and len(job["map"]["layers"]["name"]) == 12
    host.post("/interrupt", {"prompt_id": prompt})
    with pytest.raises(HostError, match="interrupted"):
        host.wait(prompt)
    host.wait_event("tessera.job", since=since, state="cancelled", prompt=prompt)
    job = known(host, prompt=prompt)
    assert (job["state"], job["message"], job["file"], job["report"]) == ("cancelled", "", None, None)
    left = [path.name for path in host.base.rglob("*half*")]
    assert left == []


@pytest.mark.parametrize(("inputs", "message"), [
    ({"source": "nan.safetensors"}, "nan.safetensors: layers.1.feed_forward.w2: "),
    ({"filename": "../out"}, "leaves the folder"),
])  # fmt: skip
def test_a_failure_is_told_with_its_message(host, inputs, message):
    since = len(host.events)
    prompt = queue(host, {"5": quantize(**({"filename": "broken"} | inputs))})
    with pytest.raises(HostError, match="ValueError"):
        host.wait(prompt)
    job = host.wait_event("tessera.job", since=since, state="failed", prompt=prompt)["data"]
    assert message in job["message"] and "Traceback" not in job["message"]
    assert known(host, prompt=prompt)["message"] == job["message"]


def test_names_from_files_arrive_without_markup(host):
    since = len(host.events)
    with pytest.raises(HostError, match="a name with control characters, markup"):
        host.wait(queue(host, {"5": quantize("hostile", source="hostile.safetensors")}))
    host.wait(queue(host, {"5": quantize(f"{BOLD}\t", source=f"{BOLD}.sft")}))
    jobs = [*told(host, since), *host.get("/tessera/jobs")["jobs"]]
    assert r"layers.0.\x3cimg" in known(host, state="failed")["message"]
    assert known(host, state="done")["title"] == r"\x3cb>name\t.safetensors"
    assert known(host, state="done")["file"]["filename"] == f"{BOLD}\t_report_00001.json"  # put into an address only
    text = json.dumps([{key: value for key, value in job.items() if key != "file"} for job in jobs])
    assert "<img" not in text and "<b" not in text and r"\u0009" not in text


def test_jobs_of_other_workflows_say_whose_they_are(host):
    since = len(host.events)
    for workflow in ("mine", "yours"):
        with pytest.raises(HostError):
            host.wait(queue(host, {"5": quantize("../out")}, workflow))
    assert [job["workflow"] for job in told(host, since, state="failed")] == ["mine", "yours"]


def test_only_the_last_jobs_are_kept(host):
    prompts = []
    for _ in range(10):
        prompts.append(queue(host, {"5": quantize("../out")}))
    for prompt in prompts:
        with pytest.raises(HostError):
            host.wait(prompt)
    jobs = host.get("/tessera/jobs")["jobs"]
    assert [job["prompt"] for job in jobs] == prompts[:1:-1]


# The routes


def ask(host, path, method="GET"):
    """(status, headers, body) of a request."""
    try:
        with urllib.request.urlopen(urllib.request.Request(host.url + path, method=method), timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, b""


@pytest.mark.parametrize("path", ["/tessera/jobs", "/tessera/doctor", "/api/tessera/jobs", "/api/tessera/doctor"])
def test_routes_answer_get_alone_and_read_no_parameter(host, path):
    status, headers, body = ask(host, path)
    assert status == 200 and headers["Content-Type"] == "application/json; charset=utf-8"
    assert len(body) < 1e6 and isinstance(json.loads(body), dict)
    assert ask(host, f"{path}?device=cuda&path=/etc/passwd&refresh=1")[2] == body
    assert {ask(host, path, method)[0] for method in ("POST", "PUT", "PATCH", "DELETE")} == {405}
    assert ask(host, f"{path}/../../etc/passwd")[0] in (403, 404) and ask(host, f"{path}/x")[0] == 404


def test_the_doctor_knows_the_host_and_says_nothing_private(host):
    answer = host.get("/tessera/doctor")
    found, text = answer["diagnosis"], answer["markdown"]
    assert found["comfyui"]["version"].count(".") == 2 and found["comfyui"]["cpu_only"] is True
    assert found["device"] == "cpu" and found["comfyui"]["merge_guard"] == "on (setting)"
    assert text.startswith("**Tessera") and found["verdict"] in text and "| nvfp4 | transcode |" in text
    assert str(host.base) not in text and str(Path.home()) not in text + json.dumps(found)


def test_the_doctor_looks_again(host):
    folder = host.base / "user" / "tessera" / "transcoded"
    folder.mkdir(parents=True)
    (folder / "x.safetensors").write_bytes(b"1234567")
    deadline = time.monotonic() + 30
    while not (cache := host.get("/tessera/doctor")["diagnosis"]["comfyui"])["cache_files"]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert (cache["cache_files"], cache["cache_bytes"]) == (1, 7)
