"""Mutants of sound files: of their bytes, of their headers as text and as trees, and of their records."""

import copy
import json
import random
import struct

NUMBERS = (0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 96, 127, 128, 255, 256, 512, 4096, -1, -2, 1 << 31, 1 << 32,
           (1 << 63) - 1, 1 << 63, 1 << 64, 0.5, 1e308)  # fmt: skip
WORDS = ("", "a", "F32", "F16", "BF16", "U8", "I8", "I32", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "nvfp4", "mxfp8",
         "int8_tensorwise", "float8_e4m3fn", "float8_e5m2", "int8_blockwise", "float8_e4m3fn_rowwise", "hybrid_mxfp8",
         "convrot_w4a4", "asym_w4a8_int8", "int8_row", "keep", "auto", "..", "\n", "<b>", "\ud800", "é", "a.b",
         "layers.0.w", "diffusion_model.", "model.diffusion_model.", "0:0, 1:1")  # fmt: skip
KEYS = ("format", "convrot", "convrot_groupsize", "per_row", "params", "orig_shape", "group_size", "num_experts",
        "full_precision_matrix_mult", "__metadata__", "dtype", "shape", "data_offsets", "layers", "sites", "tokens",
        "skipped", "version", "mode", "_quantization_metadata", "tessera", "tessera_layers")  # fmt: skip
SUFFIXES = ("weight", "weight_scale", "weight_scale_2", "input_scale", "pre_quant_scale", "comfy_quant", "scale_weight",
            "scale_input", "scaled_fp8", "absorb_up", "absorb_down", "weight_correction", "weight_scalar",
            "weight_s_rel", "bias", "alpha", "lora_up.weight", "lora_down.weight", "lora_A.weight", "lora_B.weight",
            "lora_mid.weight", "dora_scale", "diff", "diff_b", "hada_w1_a", "lokr_w1", "oft_blocks", "reshape_weight",
            "mean", "amax", "second", "sample")  # fmt: skip
SIZES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


def parts(data: bytes) -> tuple[dict, bytes]:
    """(header, data) of a sound file."""
    length = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def whole(header, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def some_bytes(data: bytes, r: random.Random, first: int = 0, last: int | None = None) -> bytes:
    """A few bytes changed, cut out, doubled or put in."""
    found = bytearray(data)
    last = len(found) if last is None else min(last, len(found))
    for _ in range(r.choice((1, 1, 1, 2, 4))):
        if last <= first:
            break
        at, how = r.randrange(first, last), r.randrange(6)
        count = r.choice((1, 1, 2, 8, 64))
        if how < 2:
            found[at] = r.randrange(256)
        elif how == 2:
            found[at] ^= 1 << r.randrange(8)
        elif how == 3:
            del found[at : at + count]
        elif how == 4:
            found[at:at] = found[at : at + count]
        else:
            found[at:at] = bytes(r.choice(b'{}[]",:0-\\\n\0\xff') for _ in range(r.choice((1, 1, 3))))
        last = min(last, len(found))
    return bytes(found)


def a_value(r: random.Random, depth: int = 2):
    """Anything that JSON can say."""
    how = r.randrange(9 if depth else 6)
    if how < 3:
        return r.choice(NUMBERS)
    if how < 5:
        return r.choice(WORDS)
    if how == 5:
        return r.choice((None, True, False))
    if how == 6:
        return [a_value(r, depth - 1) for _ in range(r.randrange(4))]
    return {r.choice((*KEYS, *WORDS)): a_value(r, depth - 1) for _ in range(r.randrange(4))}


def some_json(tree, r: random.Random):
    """One place of a tree changed."""
    tree = copy.deepcopy(tree)
    places = []

    def walk(node):
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    if isinstance(tree, dict | list):
        walk(tree)
    if not places:
        return a_value(r)
    node, key = r.choice(places)
    how = r.randrange(5)
    if how == 0:
        del node[key]
    elif how == 1 and isinstance(node, dict):
        node[r.choice(KEYS)] = node.pop(key)
    elif how == 2 and isinstance(node, dict):
        node[r.choice(KEYS)] = a_value(r)
    elif isinstance(node[key], int) and r.random() < 0.5:
        node[key] += r.choice((-1, 1, 8, -8, 16))
    else:
        node[key] = a_value(r)
    return tree


def some_layout(header: dict, data: bytes, r: random.Random) -> bytes:
    """Tensors renamed, retyped, reshaped, dropped, added or cut, and the file put together soundly again."""
    metadata = header.get("__metadata__")
    tensors = {key: (entry["dtype"], list(entry["shape"]), data[slice(*entry["data_offsets"])])
               for key, entry in header.items() if key != "__metadata__"}  # fmt: skip
    for _ in range(r.choice((1, 1, 2, 3))):
        if not tensors:
            break
        key = r.choice(list(tensors))
        dtype, shape, raw = tensors[key]
        size, base = SIZES.get(dtype, 1), key.rpartition(".")[0]
        how = r.randrange(9)
        if how == 0:
            del tensors[key]
        elif how == 1:
            tensors[f"{base}.{r.choice(SUFFIXES)}"] = tensors.pop(key)
        elif how == 2:
            tensors[f"{base}.{r.choice(SUFFIXES)}"] = tensors[r.choice(list(tensors))]
        elif how == 3:  # another dtype of that size
            same = [name for name in (*SIZES, "U8", "I8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0")
                    if SIZES.get(name, 1) == size]  # fmt: skip
            tensors[key] = r.choice(same), shape, raw
        elif how == 4:  # another shape of that size
            count = len(raw) // size
            first = r.choice([n for n in (1, 2, 4, 16, 32, 64, 128, count or 1) if count % n == 0])
            tensors[key] = dtype, r.choice(([count], [first, count // first], [count, 1], [1, count])), raw
        elif how == 5 and shape and shape[0] > 1:  # some rows less
            rows = r.randrange(shape[0])
            tensors[key] = dtype, [rows, *shape[1:]], raw[: len(raw) // shape[0] * rows]
        elif how == 6:
            prefix = r.choice(("diffusion_model.", "model.diffusion_model.", "lora_unet_", "x."))
            tensors[prefix + key] = tensors.pop(key)
        elif how == 7 and key.endswith("comfy_quant"):
            try:
                text = json.dumps(some_json(json.loads(raw), r)).encode()
            except ValueError:
                text = some_bytes(raw, r)
            tensors[key] = "U8", [len(text)], text
        else:
            tensors[key] = dtype, shape, bytes(r.choice((0, 255, 127, r.randrange(256))) for _ in range(1)) * len(raw)
    if isinstance(metadata, dict) and metadata and r.random() < 0.3:
        name = r.choice(list(metadata))
        try:
            metadata = metadata | {name: json.dumps(some_json(json.loads(metadata[name]), r))}
        except ValueError:
            metadata = metadata | {name: r.choice(WORDS)}
    made, end = ({} if metadata is None else {"__metadata__": metadata}), 0
    for key, (dtype, shape, raw) in tensors.items():
        made[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + len(raw)]}
        end += len(raw)
    return whole(made, b"".join(raw for _, _, raw in tensors.values()))


def of_safetensors(data: bytes, r: random.Random) -> bytes:
    """A mutant of a sound safetensors file."""
    header, body = parts(data)
    start, how = len(data) - len(body), r.randrange(20)
    if how == 0:
        return data[: r.randrange(len(data) + 1)]
    if how == 1:
        return struct.pack("<Q", r.choice((r.getrandbits(64), r.randrange(len(data)), 1 << r.randrange(64)))) + data[8:]
    if how < 5:
        return some_bytes(data, r, 0, start)
    if how == 5:
        return some_bytes(data, r)
    if how < 8:
        return whole(some_json(header, r), body)
    if how < 10:  # bytes of the tensors
        changed = bytearray(data)
        for _ in range(r.choice((1, 4, 64))):
            changed[r.randrange(start, len(data))] = r.randrange(256)
        return bytes(changed)
    return some_layout(header, body, r)


def of_text(data: bytes, r: random.Random) -> bytes:
    """A mutant of a text: bytes, lines and words."""
    lines = data.splitlines(keepends=True)
    how = r.randrange(6)
    if how < 2 or not lines:
        return some_bytes(data, r)
    at = r.randrange(len(lines))
    if how == 2:
        del lines[at]
    elif how == 3:
        lines.insert(at, r.choice(lines))
    elif how == 4:
        words = lines[at].split(b" ")
        words[r.randrange(len(words))] = json.dumps(a_value(r)).encode()
        lines[at] = b" ".join(words)
    else:
        lines[at], other = r.choice(lines), lines[at]
        lines.append(other)
    return b"".join(lines)
