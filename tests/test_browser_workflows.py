"""What a user sees who opens the example workflows in ComfyUI's page and presses Run, in both renderers."""

import json

import numpy as np
import pytest
from PIL import Image

from browser import EXAMPLES, RENDERERS, Studio, example, for_tiny

pytestmark = pytest.mark.host


@pytest.fixture(scope="module")
def studio():
    with Studio() as studio:
        for path in EXAMPLES:
            studio.files.named_by(json.loads(path.read_text(encoding="utf-8")))
        yield studio


@pytest.fixture(scope="module", params=RENDERERS)
def opened(studio, request):
    with studio.page(request.param) as page:
        yield page


@pytest.fixture
def page(opened, request):
    yield opened
    opened.screenshot(request.node.name)
    opened.check()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_opens_without_a_complaint(page, path):
    page.load(json.loads(path.read_text(encoding="utf-8")))
    assert page.at.locator("[data-testid=error-overlay]").count() == 0
    assert page.at.locator(".p-toast-message-error").count() == 0
    assert page.at.locator("[role=dialog]").count() == 0


def pixels(page, end):
    path = page.pictures(end["prompt_id"])[-1]
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_example_z_image_nvfp4_runs(page):
    workflow = example("tessera_z_image_nvfp4")
    page.files.named_by(workflow, real=True)
    page.load(for_tiny(workflow))
    assert pixels(page, page.run()).std() > 20
