"""One browser for all of these tests. It ends with them: Playwright's event loop would be in the way of others."""

import pytest

from . import Studio
from .files import make


@pytest.fixture(scope="package")
def studio():
    """A ComfyUI, a Chromium and the files that browser tests name."""
    with Studio() as studio:
        make(studio)
        yield studio


@pytest.fixture(scope="package", params=("litegraph", "nodes2"))
def opened(studio, request):
    """A page in one of ComfyUI's renderers."""
    with studio.page(request.param) as page:
        yield page


@pytest.fixture
def page(opened, request):
    """The open page; after each test there is a screenshot, and nothing was wrong on it."""
    yield opened
    opened.screenshot(request.node.name)
    opened.check()
