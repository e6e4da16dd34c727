"""A disk on which one call fails: the calls are the real ones, the failure is what the kernel would have answered."""

import builtins
import contextlib
import errno
import io
import os
from unittest.mock import patch

from tessera import publication, writer


class Disk:
    """Counts every write, truncation, sync, allocation, rename and new file; the one of number `fails` fails."""

    def __init__(self, fails=0, error=errno.ENOSPC):
        self.fails, self.error, self.calls = fails, error, []

    def call(self, name):
        self.calls.append(name)
        if len(self.calls) == self.fails:
            raise OSError(self.error, os.strerror(self.error))

    def failing(self, name, real, when=lambda *_: True):
        def call(*arguments, **options):
            if when(*arguments):
                self.call(name)
            return real(*arguments, **options)

        return call

    @contextlib.contextmanager
    def __call__(self):
        """The block's writers use this disk."""
        disk = self

        class Raw(io.FileIO):
            def write(self, data):
                disk.call("write")
                return super().write(data)

            def truncate(self, size=None):
                disk.call("truncate")
                return super().truncate(size)

        def opened(path, mode="r", **options):
            if not set(mode) & set("x+"):
                return builtins.open(path, mode, **options)
            if "x" in mode:
                disk.call("create")
            return io.BufferedRandom(Raw(path, mode.replace("b", "")))

        def fdopen(descriptor, mode):
            return io.BufferedRandom(Raw(descriptor, mode.replace("b", "")))

        created = self.failing("create", os.open, lambda path, flags, *_: flags & os.O_CREAT)
        with contextlib.ExitStack() as stack:
            for module in (writer, publication):
                stack.enter_context(patch.object(module, "open", opened, create=True))
            stack.enter_context(patch.object(os, "fdopen", fdopen))
            stack.enter_context(patch.object(os, "open", created))
            for name in ("fsync", "replace", "link", "posix_fallocate"):
                stack.enter_context(patch.object(os, name, self.failing(name, getattr(os, name))))
            yield self
