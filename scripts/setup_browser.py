#!/usr/bin/env python3
"""Find or install the Chromium that the browser tests and scripts/screenshots drive, and print its path.

    PYTHON scripts/setup_browser.py       PYTHON: the interpreter that scripts/setup_host.py printed

Taken is TESSERA_BROWSER, else what is installed: chromium, google-chrome, msedge. Else one is installed: by apt where
this is root on Debian or Ubuntu; else by Playwright, into TESSERA_CACHE (default: .cache in this repository).
Prints an empty line, and why on stderr, if there is none: the browser tests are skipped then, which fails in CI.
"""

import os
import re
import shutil
import subprocess
import sys

from setup_host import CACHE, SetupError, only_one, run, say, step

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge", "microsoft-edge")
DOWNLOADS = CACHE / "browsers"
SECONDS = 400  # 100 MB and 40 packages from apt took 20 s


def version(program):
    """What the browser says it is; "" of what does not start, as the snap stub that Ubuntu calls chromium-browser."""
    try:
        done = subprocess.run([str(program), "--version"], capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 and re.search(r"\d+\.\d+\.\d+", done.stdout) else ""


def installed():
    """The path of a browser that is there and starts, or None."""
    paths = [path for name in NAMES if (path := shutil.which(name))]
    paths += [path for name in ("headless_shell", "chrome-headless-shell") for path in DOWNLOADS.glob(f"*/*/{name}")]
    return next((str(path) for path in paths if version(path)), None)


def by_apt():
    """Install Debian's Chromium; says why where this is not possible."""
    if os.name != "posix" or os.geteuid() or not shutil.which("apt-get"):
        raise SetupError("apt cannot be used here: it needs Debian or Ubuntu, and root")
    quiet = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120"]
    with step("installing Chromium: apt-get update, apt-get install chromium"):
        run([*apt, "update"], "apt-get update", env=quiet, timeout=SECONDS)
        install = [*apt, "install", "-y", "--no-install-recommends", "chromium"]
        run(install, "apt-get install chromium", env=quiet, timeout=SECONDS)


def by_playwright():
    """Let Playwright download its own build of Chromium, with the system libraries it needs if this is root."""
    root = os.name == "posix" and not os.geteuid() and shutil.which("apt-get")
    command = [sys.executable, "-m", "playwright", "install", *(["--with-deps"] if root else [])]
    with step("downloading Chromium: playwright install chromium-headless-shell"):
        env = os.environ | {"PLAYWRIGHT_BROWSERS_PATH": str(DOWNLOADS)}
        run([*command, "chromium-headless-shell"], "playwright install", env=env, timeout=SECONDS)


def find_or_install():
    """The browser's path, or None, in which case every reason has been said."""
    given = os.environ.get("TESSERA_BROWSER")
    if given:
        if not version(given):
            raise SetupError(f"TESSERA_BROWSER={given} does not start: name the program of a Chromium, Chrome or Edge")
        return given
    with only_one():
        for install in (None, by_apt, by_playwright):
            try:
                if install:
                    install()
            except (SetupError, OSError, subprocess.TimeoutExpired) as problem:
                say(f"    {problem}")
            found = installed()
            if found:
                return found
    say("no browser: install Chromium or Chrome, or name one in TESSERA_BROWSER; the browser tests are skipped")
    return None


def main():
    try:
        browser = find_or_install()
    except (SetupError, OSError) as error:
        say(f"error: {error}")
        return 1
    if browser:
        say(f"{version(browser)}: {browser}")
    print(browser or "")
    return 0


if __name__ == "__main__":
    sys.exit(main())
