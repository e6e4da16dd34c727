"""Inside the real ComfyUI: load, run, correct."""

import pytest
import torch

from comfy_host import node, sample

pytestmark = pytest.mark.host


@pytest.fixture
def loaded(tiny):
    def load(which="model", loader="TesseraDiffusionModelLoader", **inputs):
        if loader == "UNETLoader":
            import nodes

            return nodes.UNETLoader().load_unet(tiny[which], "default")[0]
        return node(loader).execute(tiny[which], **inputs).args[0]

    return load


def test_plain_checkpoint_samples_as_with_the_stock_loader(loaded):
    assert torch.equal(sample(loaded("bf16")), sample(loaded("bf16", "UNETLoader")))


def test_quantized_checkpoint_samples_as_with_the_stock_loader(loaded):
    assert torch.equal(sample(loaded()), sample(loaded(loader="UNETLoader")))
