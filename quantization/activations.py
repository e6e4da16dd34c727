"""What a layer does to its input: the rounding of activations, as devices with units for the format do it."""

from __future__ import annotations

from torch import Tensor

from ..formats import INT8, MXFP8, NVFP4, Format


def rounded(format: Format, x: Tensor, input_scale: Tensor | None = None) -> Tensor:
    """Inputs [..., in] (fp32) as the quantized matrix product of that format sees them; unchanged if it has none.

    NVFP4 scales the whole tensor by its largest value, or by a static `input_scale` []; INT8 scales each token, after
    rotating it where the weight is rotated.
    """
    if x.ndim != 2:
        return rounded(format, x.flatten(0, -2), input_scale).view(x.shape)
    if isinstance(format, NVFP4):
        if input_scale is None:
            return format.decode(format.encode(x))
        return format.decode(format.encode_scaled(x, input_scale))
    if isinstance(format, MXFP8):
        return format.decode(format.encode(x))
    if isinstance(format, INT8):
        rotated = format.rotate(x)
        scale = (rotated.abs().amax(1, keepdim=True) / 127.0).clamp(min=1e-30)
        return format.rotate((rotated / scale).round_().clamp_(-128, 127) * scale)
    return x


def output_error(format: Format, weight: Tensor, stored: Tensor, x: Tensor, smoothing: Tensor | None = None) -> float:
    """||x W^T - (rounded x/s) stored^T||^2: the layer as it runs with quantized inputs [tokens, in], `stored` ~ W s."""
    seen = rounded(format, x if smoothing is None else x / smoothing)
    return (seen @ stored.T).sub_(x @ weight.T).square_().sum().item()
