"""Loads the pack and its nodes beside the host, as ComfyUI does, and prints as JSON what that did to the machine.

Files opened for writing, made, renamed or removed; sockets; processes; whether CUDA was started.
"""

import asyncio
import importlib
import json
import os
import sys

sys.dont_write_bytecode = True
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.link", "os.symlink", "os.chmod",
           "shutil.copyfile", "shutil.move", "shutil.rmtree", "tempfile.mkstemp", "tempfile.mkdtemp"}  # fmt: skip
OUTSIDE = ("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "urllib.", "http.")
CUDA = ("_lazy_init", "init", "current_device", "get_device_properties", "get_device_capability", "mem_get_info")
found: list[str] = []
watching = False


def watch(event, arguments):
    if not watching:
        return
    writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    if writes or event in CHANGES or event.startswith(OUTSIDE):
        found.append(f"{event} {arguments[0] if arguments else ''}")


def main():
    global watching
    sys.argv = [sys.argv[0], "--cpu"]
    import torch

    import with_pack

    os.environ["TESSERA_WITHOUT"] = "1"
    with_pack.pytest_configure(None)
    for name in ("comfy_api.latest", "server", "nodes"):  # the host has them when it comes to packs
        importlib.import_module(name)

    def started(*_, **__):
        found.append("CUDA was started")
        raise RuntimeError("no GPU while the pack is imported")

    for name in CUDA:
        setattr(torch.cuda, name, started)
    loop = asyncio.new_event_loop()  # has sockets of its own
    sys.addaudithook(watch)
    watching = True
    count = len(loop.run_until_complete(with_pack.nodes_of(with_pack.load("tessera_watched"))))
    open(os.devnull, "wb").close()  # the watch is awake
    watching = False
    print(json.dumps({"nodes": count, "found": found, "cuda": torch.cuda.is_initialized()}))


main()
