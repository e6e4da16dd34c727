"""Two addresses for the pack's own pages: what is running, and what this machine can do. They read nothing and take
no parameter."""

from __future__ import annotations

import asyncio
import json
import sys
import time

from aiohttp import web

from . import jobs, machine

JOBS, DOCTOR = "/tessera/jobs", "/tessera/doctor"
FRESH = 1.0  # seconds for which the doctor's answer is given again


def register() -> None:
    """Adds the routes to the host's server; nothing where none runs."""
    server = sys.modules.get("server")
    running = getattr(getattr(server, "PromptServer", None), "instance", None)
    if running is not None:
        running.routes.get(JOBS)(_jobs)
        running.routes.get(DOCTOR)(_Doctor().answer)


async def _jobs(request: web.Request) -> web.Response:
    return _json(await asyncio.to_thread(jobs.answer))


class _Doctor:
    """One examination at a time, whoever asks."""

    def __init__(self):
        self._turn, self._text, self._at = asyncio.Lock(), "", -FRESH

    async def answer(self, request: web.Request) -> web.Response:
        async with self._turn:
            if time.monotonic() - self._at > FRESH:
                found = await asyncio.to_thread(machine.diagnose)
                self._text = json.dumps({"markdown": found.markdown(), "diagnosis": found.as_dict()})
                self._at = time.monotonic()
        return _json(self._text)


def _json(text: str) -> web.Response:
    return web.Response(text=text, content_type="application/json", headers={"Cache-Control": "no-store"})
