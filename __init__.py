"""Tessera: mixed-precision diffusion checkpoints for ComfyUI. Importing it costs nothing: the nodes load on request."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    from .nodes import Extension

    return Extension()
