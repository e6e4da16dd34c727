"""Makes ComfyUI's model detection accept a Z-Image of width 256, which it knows only at 3840."""

import functools

import comfy.model_detection
import comfy.supported_models

DIM = 256
TINY = {
    "n_heads": 4,
    "n_kv_heads": 4,
    "axes_dims": [16, 24, 24],
    "axes_lens": [1536, 512, 512],
    "rope_theta": 256.0,
    "ffn_dim_multiplier": 8.0 / 3.0,
    "z_image_modulation": True,
    "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}


class TinyZImage(comfy.supported_models.ZImage):
    unet_config = {"image_model": "lumina2", "dim": DIM}  # noqa: RUF012, the host's shape of it


def install_shim():
    """Teach the host the tiny dimensions; every other model is detected as before. Calling again changes nothing."""
    detect = comfy.model_detection.detect_unet_config
    if getattr(detect, "tiny_z_image", False):
        return

    @functools.wraps(detect)
    def detect_unet_config(state_dict, key_prefix, *args, **kwargs):
        config = detect(state_dict, key_prefix, *args, **kwargs)
        if config and config.get("image_model") == "lumina2" and config.get("dim") == DIM:
            config |= TINY
        return config

    detect_unet_config.tiny_z_image = True
    comfy.model_detection.detect_unet_config = detect_unet_config
    models = comfy.supported_models.models
    models.insert(models.index(comfy.supported_models.ZImage), TinyZImage)
