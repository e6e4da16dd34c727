"""ComfyUI node pack for tests and demos: lets the host load the tiny Z-Image and gives it text and pictures.

Put a link to this folder into custom_nodes (a copy would miss ../codec.py). Importing the pack installs the shim.
"""

from .shim import install_shim

install_shim()


async def comfy_entrypoint():
    from .nodes import TinyExtension

    return TinyExtension()
