"""How a quantized linear layer is multiplied on a device. Knows tensors, not files and not ComfyUI."""
