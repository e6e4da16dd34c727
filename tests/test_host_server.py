"""The host server itself: it starts ComfyUI, runs workflows, and tells what went wrong in ComfyUI's words."""

import os
import time

import pytest
from PIL import Image

from host_server import HostError, HostServer

pytestmark = pytest.mark.host

TEST_PACK = '''
import time
import comfy.model_management, comfy.utils
from server import PromptServer

class Slow:
    """Ten steps with a bar and a line of text each, then an optional failure."""
    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "test", "execute", (), True

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"seconds": ("FLOAT", {}), "fail": ("BOOLEAN", {})}, "hidden": {"node": "UNIQUE_ID"}}

    def execute(self, seconds, fail, node):
        bar = comfy.utils.ProgressBar(10, node_id=node)
        for step in range(10):
            comfy.model_management.throw_exception_if_processing_interrupted()
            PromptServer.instance.send_progress_text(f"step {step}", node)
            time.sleep(seconds / 10)
            bar.update(1)
        if fail:
            raise ValueError("layers.3: not today")
        return {"ui": {"said": ["done"]}}

NODE_CLASS_MAPPINGS = {"TestSlow": Slow}
'''


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH is not set: run scripts/setup_host.py")
    pack = tmp_path_factory.mktemp("packs") / "slow.py"
    pack.write_text(TEST_PACK)
    with HostServer({"slow": pack}, pack=None, cpu=True) as server:
        yield server


def image_workflow(**changes):
    image = {"width": 24, "height": 16, "batch_size": 1, "color": 255, **changes}
    return {
        "1": {"class_type": "EmptyImage", "inputs": image},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "test"}},
    }


def slow_workflow(seconds, fail=False):
    return {"7": {"class_type": "TestSlow", "inputs": {"seconds": seconds, "fail": fail}}}


def test_object_info_has_core_nodes(host):
    nodes = host.object_info()
    assert {"UNETLoader", "CLIPLoader", "KSampler", "SaveImage", "TestSlow"} <= nodes.keys()
    assert host.object_info("UNETLoader")["output"] == ["MODEL"]


def test_run_saves_the_image(host):
    (path,) = host.files(host.run(image_workflow()))
    with Image.open(path) as image:
        assert image.size == (24, 16)


def test_value_out_of_range_is_refused_with_the_node_named(host):
    with pytest.raises(HostError, match=r"node 1 \(EmptyImage\): value_smaller_than_min") as error:
        host.queue(image_workflow(width=-1))
    assert error.value.kind == "refused"
    assert error.value.node_errors["1"][0]["type"] == "value_smaller_than_min"


def test_unknown_node_is_refused(host):
    with pytest.raises(HostError, match="NoSuchNode"):
        host.queue({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_one_bad_output_refuses_the_whole_workflow(host):
    workflow = image_workflow() | {"9": {"class_type": "SaveImage", "inputs": {"filename_prefix": "x"}}}
    with pytest.raises(HostError, match="required_input_missing"):
        host.queue(workflow)


def test_failing_node_raises_what_it_said(host):
    with pytest.raises(HostError, match=r"node 7 \(TestSlow\): ValueError: layers.3: not today") as error:
        host.run(slow_workflow(0.0, fail=True))
    assert error.value.kind == "execution_error"


def test_progress_arrives_in_order(host):
    since = len(host.events)
    entry = host.run(slow_workflow(0.2))
    assert host.progress_texts("7", since) == [f"step {i}" for i in range(10)]
    assert host.progress("7", since)[-1] == (10, 10)
    assert entry["outputs"]["7"]["said"] == ["done"]


def test_interrupt_stops_within_a_step(host):
    since = len(host.events)
    prompt = host.queue(slow_workflow(20.0))
    host.wait_event("progress_text", since=since, node_id="7")
    start = time.monotonic()
    host.interrupt()
    with pytest.raises(HostError, match="interrupted") as error:
        host.wait(prompt)
    assert error.value.kind == "execution_interrupted"
    assert time.monotonic() - start < 10


def test_memory_is_reported(host):
    assert 100e6 < host.rss() <= host.peak_rss() < 8e9


def test_pack_that_cannot_be_imported_stops_the_start(host, tmp_path):
    (tmp_path / "broken.py").write_text("import no_such_module\n")
    with (
        pytest.raises(HostError, match=r"could not import .*broken.py[\s\S]*no_such_module") as error,
        HostServer({"broken": tmp_path / "broken.py"}, pack=None, cpu=True),
    ):
        pass
    assert error.value.kind == "start"


def test_host_that_dies_is_reported_with_its_log(host):
    with HostServer(pack=None, cpu=True) as server:
        server.process.kill()
        with pytest.raises(HostError, match=r"exit code -9[\s\S]*Starting server"):
            server.run(image_workflow())


def test_wrong_argument_ends_the_start_with_the_log(host):
    with (
        pytest.raises(HostError, match="unrecognized arguments: --no-such-option"),
        HostServer(pack=None, args=["--no-such-option"]),
    ):
        pass
