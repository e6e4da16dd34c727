"""A real ComfyUI in its own process and folder, with this pack in it, driven over HTTP and WebSocket.

    with HostServer() as host:
        shutil.copy(checkpoint, host.models("diffusion_models"))
        entry = host.run(api_workflow)          # raises HostError with what ComfyUI said
        print(entry["outputs"], host.files(entry), host.progress_texts("4"), host.rss())

`COMFYUI_PATH` names the host and `sys.executable` runs it, as scripts/setup_host.py arranged; both can be given.
"""

import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
POLL = 0.05  # seconds
TEXT_FRAME = 3  # BinaryEventTypes.TEXT in the host's protocol.py
FINISHED = {"execution_success", "execution_error", "execution_interrupted"}


class HostError(Exception):
    """ComfyUI refused a workflow, failed in a node, was interrupted, or died.

    `kind` is the host's word: `refused`, `execution_error`, `execution_interrupted`, `died`, `start`.
    `node_errors` maps node id -> list of {type, message, details}; `details` is the host's own message.
    """

    def __init__(self, message, kind, node_errors=None, details=None):
        super().__init__(message)
        self.kind, self.node_errors, self.details = kind, node_errors or {}, details or {}


class HostServer:
    """ComfyUI from `with` to its end; the folder and the process are gone afterwards, whatever happened.

    packs   custom nodes besides this pack: name -> folder, or a .py file
    pack    this pack, there as `custom_nodes/tessera`; None leaves it out
    base    the folder for models, input, output; default: a temporary one, removed at the end
    args    more arguments for main.py
    cpu     None: `--cpu` unless torch finds a GPU
    """

    def __init__(
        self, packs=None, *, pack=ROOT, base=None, args=(), cpu=None, python=None, path=None, env=None, timeout=120
    ):
        self.packs = ({"tessera": pack} if pack else {}) | (packs or {})
        self.given_base = Path(base) if base else None
        self.args, self.cpu, self.env, self.timeout = list(args), cpu, env or {}, timeout
        self.python = str(python or sys.executable)
        self.path = Path(path or os.environ["COMFYUI_PATH"])
        self.events = []  # {"type": ..., "data": ...}, in order of arrival
        self.process = None

    # Life

    def __enter__(self):
        self.cleanup = contextlib.ExitStack()
        try:
            self._start()
        except BaseException:
            self.cleanup.close()
            raise
        return self

    def __exit__(self, *_):
        self.cleanup.close()

    def _start(self):
        start = time.monotonic()
        temp = Path(self.cleanup.enter_context(tempfile.TemporaryDirectory(prefix="tessera-host-")))
        self.base = (self.given_base or temp / "base").resolve()
        self.log_path = temp / "host.log"
        self._link_packs()
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = self._launch()
        self.cleanup.callback(self._stop)
        self._await_ready(start + self.timeout)
        self.seconds_to_start = time.monotonic() - start
        self.client_id = uuid.uuid4().hex
        self._listen()

    def _link_packs(self):
        folder = self.base / "custom_nodes"
        folder.mkdir(parents=True, exist_ok=True)  # the host does not start without it
        for name, source in self.packs.items():
            source = Path(source).resolve()
            target = folder / (name + source.suffix if source.is_file() else name)
            if not target.exists():
                link_or_copy(source, target)

    def _launch(self):
        command = [self.python, str(self.path / "main.py"), "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--disable-api-nodes", "--disable-auto-launch"]
        command += ["--database-url", "sqlite:///:memory:", *self.args]
        if self.cpu or (self.cpu is None and not has_gpu()):
            command.append("--cpu")
        env = {**os.environ, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", **self.env}
        env.pop("PYTHONDONTWRITEBYTECODE", None)  # 7 s to start with bytecode, 12 s without
        with open(self.log_path, "wb") as log:
            return subprocess.Popen(
                command, cwd=self.base, env=env, stdout=log, stderr=subprocess.STDOUT, preexec_fn=end_with_parent()
            )

    def _await_ready(self, deadline):
        while True:
            self._check_alive()
            with contextlib.suppress(OSError):
                self.get("/queue")
                break
            if time.monotonic() > deadline:
                raise HostError(f"ComfyUI is not ready after {self.timeout} s\n{self._log_tail()}", "start")
            time.sleep(POLL)
        failed = re.findall(r"\(IMPORT FAILED\): (.*)", self.log)  # the host goes on without the pack
        if failed:
            raise HostError(f"ComfyUI could not import {', '.join(failed)}\n{self._log_tail(60)}", "start")

    def _check_alive(self):
        code = self.process.poll()
        if code is not None:
            raise HostError(f"ComfyUI ended with exit code {code}\n{self._log_tail()}", "died")

    def _stop(self):
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    # HTTP

    def get(self, path):
        """The JSON answer to a GET."""
        return json.loads(self._open(self.url + path))

    def post(self, path, body):
        """The JSON answer to a POST, None if it is empty; HTTP errors as urllib raises them."""
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, json.dumps(body).encode(), headers)
        return json.loads(self._open(request) or "null")

    def _open(self, request):
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.read()
        except urllib.error.HTTPError:
            raise
        except OSError:
            time.sleep(POLL)  # a process that just ended is not always known to have
            self._check_alive()
            raise

    def object_info(self, node=None):
        """The nodes as the frontend sees them: id -> schema; or one node's schema."""
        return self.get(f"/object_info/{node}")[node] if node else self.get("/object_info")

    def queue(self, workflow):
        """Queue a workflow in API format: its prompt id. HostError `refused` if validation fails."""
        try:
            answer = self.post("/prompt", {"prompt": workflow, "client_id": self.client_id})
        except urllib.error.HTTPError as error:
            raise refusal(json.load(error), workflow) from None
        if answer["node_errors"]:  # some outputs are valid: the host would run those alone
            self.post("/queue", {"delete": [answer["prompt_id"]]})
            raise refusal(answer, workflow)
        return answer["prompt_id"]

    def wait(self, prompt_id, timeout=120):
        """The history entry of a workflow that succeeded. HostError if it did not, TimeoutError if it still runs."""
        deadline = time.monotonic() + timeout
        while not (entry := self.get(f"/history/{prompt_id}").get(prompt_id)):
            self._check_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"workflow {prompt_id} runs for more than {timeout} s\n{self._log_tail()}")
            time.sleep(POLL)
        self.wait_event(FINISHED, prompt_id=prompt_id, timeout=10)  # every event before it has arrived then
        if entry["status"]["status_str"] != "success":
            raise failure(entry)
        return entry

    def run(self, workflow, timeout=120):
        """Queue and wait: the history entry."""
        return self.wait(self.queue(workflow), timeout)

    def interrupt(self):
        """Stop the workflow that runs; its `wait` raises HostError `execution_interrupted`."""
        self.post("/interrupt", {})

    def free(self):
        """Unload all models and empty the result cache before the next workflow starts."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    # Events

    def _listen(self):
        connected = threading.Event()
        thread = threading.Thread(target=self._receive, args=[connected], daemon=True, name="host-events")
        thread.start()
        if not connected.wait(20):
            raise HostError(f"no WebSocket connection to ComfyUI\n{self._log_tail()}", "start")

    def _receive(self, connected):
        import asyncio

        import aiohttp  # the host's own requirement

        async def receive():
            address = f"{self.url}/ws?clientId={self.client_id}"
            async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
                async for message in socket:
                    self.events.append(decode_event(message.data))
                    connected.set()  # the host greets with a status

        with contextlib.suppress(aiohttp.ClientError):
            asyncio.run(receive())

    def wait_event(self, kinds, timeout=60, since=0, **data):
        """The first event from `events[since:]` of one of these kinds and with these data, when it has arrived."""
        kinds = {kinds} if isinstance(kinds, str) else kinds
        deadline, at = time.monotonic() + timeout, since
        while time.monotonic() < deadline:
            while at < len(self.events):
                event, at = self.events[at], at + 1
                if event["type"] in kinds and data.items() <= event["data"].items():
                    return event
            self._check_alive()
            time.sleep(POLL / 5)
        raise TimeoutError(f"no event {sorted(kinds)} {data or ''} within {timeout} s\n{self._log_tail()}")

    def progress(self, node_id, since=0):
        """The (value, max) pairs of a node's progress bar in `events[since:]`."""
        states = (event["data"]["nodes"] for event in self.events[since:] if event["type"] == "progress_state")
        return [(nodes[node_id]["value"], nodes[node_id]["max"]) for nodes in states if node_id in nodes]

    def progress_texts(self, node_id, since=0):
        """The lines of text a node showed, in `events[since:]`."""
        texts = (event["data"] for event in self.events[since:] if event["type"] == "progress_text")
        return [data["text"] for data in texts if data["node_id"] == node_id]

    # Facts

    def models(self, folder):
        """The host's folder for such models, e.g. `diffusion_models`, `loras`; made if it is not there."""
        path = self.base / "models" / folder
        path.mkdir(parents=True, exist_ok=True)
        return path

    def files(self, entry, key="images"):
        """The files a workflow saved, in the order of its nodes."""
        saved = [file for output in entry["outputs"].values() for file in output.get(key, [])]
        folders = {"output": self.base / "output", "temp": self.base / "temp", "input": self.base / "input"}
        return [folders[file["type"]] / file["subfolder"] / file["filename"] for file in saved]

    def rss(self):
        """Resident memory of the host now, in bytes."""
        import psutil  # the host's own requirement

        return psutil.Process(self.process.pid).memory_info().rss

    def peak_rss(self):
        """The most resident memory the host ever had, in bytes (Linux)."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    @property
    def log(self):
        """What ComfyUI printed, without colours."""
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log_path.read_text(errors="replace"))

    def _log_tail(self, lines=30):
        return "\n".join("  | " + line[:300] for line in self.log.splitlines()[-lines:])


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def has_gpu():
    import torch

    return torch.cuda.is_available()


def link_or_copy(source, target):
    """A symlink; a copy where the system allows none (Windows without developer mode)."""
    try:
        target.symlink_to(source, target_is_directory=source.is_dir())
    except OSError:
        if source.is_file():
            shutil.copy(source, target)
        else:
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".*", "__pycache__"))


def end_with_parent():
    """For Popen: the host ends when the tests are killed (Linux only)."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl
    return lambda: prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def decode_event(data):
    """{"type", "data"} of a WebSocket message; a progress text's is {"node_id", "text"}."""
    if isinstance(data, str):
        return json.loads(data)
    kind = int.from_bytes(data[:4], "big")
    if kind != TEXT_FRAME:
        return {"type": "binary", "data": {"kind": kind, "bytes": len(data) - 4}}
    (length,) = struct.unpack_from(">I", data, 4)
    node_id, text = data[8 : 8 + length].decode(), data[8 + length :].decode()
    return {"type": "progress_text", "data": {"node_id": node_id, "text": text}}


def refusal(answer, workflow):
    """HostError of a workflow that failed validation, one line per complaint."""
    lines, errors = [], {}
    for node, complaint in (answer.get("node_errors") or {}).items():
        errors[node] = complaint["errors"]
        name = workflow.get(node, {}).get("class_type", "?")
        lines += [f"node {node} ({name}): {e['type']}: {e['message']}: {e['details']}" for e in complaint["errors"]]
    details = answer.get("error") or {}
    if details:
        lines.insert(0, f"{details.get('type')}: {details.get('message')} {details.get('details') or ''}".strip())
    return HostError("\n".join(lines), "refused", errors, details)


def failure(entry):
    """HostError of a history entry that is not a success."""
    kind, details = next(
        ((kind, data) for kind, data in entry["status"]["messages"] if kind in FINISHED - {"execution_success"}),
        ("execution_error", {}),
    )
    node = f"node {details.get('node_id')} ({details.get('node_type')})"
    if kind == "execution_interrupted":
        return HostError(f"{node}: interrupted", kind, details=details)
    trace = "".join(details.get("traceback") or [])
    message = f"{node}: {details.get('exception_type')}: {details.get('exception_message')}\n{trace}"
    return HostError(message, kind, details=details)
