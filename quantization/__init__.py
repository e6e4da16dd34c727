"""How the stored numbers are chosen. Knows formats, not files and not ComfyUI."""
