"""What is done to files: to values in JSON trees, to bytes, to the files themselves."""

import copy
import json
import os
import struct
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loraq.safetensors.header import DTYPES


class Raw(str):
    """Text that stands in a JSON file as it is."""


def _nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 4, 7, 8, 16, 31, 32, 33, 64, 255, 256, 1000, 10**5, 10**7, -(10**9)),
    *(2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400),
    *(0.0, -0.0, 0.5, 1.0, 2.0, -1.5, 1e-300, 1e38, 1e300, float("nan"), float("inf")),
    *(Raw("-Infinity"), Raw("1e999"), Raw("9" * 5000), Raw("-0"), Raw("1E400")),
)
TEXTS = (
    *("", "x", "0", "1", "loraq", "mxfp4", "nvfp4", "int4", "int8", "bf16", "fp8_e4m3", "mxint8"),
    *("int8_b999999992", "int4_b8", "default", "mxfp4+w8a8-r4", "F32", "F64", "BF16", "U8", "I64"),
    *("BOOL", "C64", "F8_E4M3", "F99", "..", ".", "../x", "/etc/passwd", "a/b", "a\\b", "a\0b"),
    *("a\nb", "\x1b[31mred\x1b[0m", "\u202egnp.exe", "\u2028", "\ud800", "\udcff", "größe"),
    *("x" * 250, "x" * 300, "é" * 200, "x" * 5000, "(.*.*)*x", "a" * 20 + "!", "^x$", "model.pt"),
    *("model.safetensors", "loraq.json", "config.json", "PixArtTransformer2DModel", "nowhere.toml"),
)
SHAPES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [1], [0], [[]], [None], [True], ["x"], {"a": 1}, {"": {}}, [{}]),
    *([0] * 70, [1] * 1000, [2**63 - 1] * 70, [64, 32], [32, 64, 1], _nested(31), _nested(200)),
    *({"quant_method": "loraq"}, {"quant_method": "x"}, {"weight": "mxfp4"}, Raw("[" * 2000)),
    *(Raw('{"a": 1, "a": 2}'), Raw(""), Raw("NaN"), Raw("{"), Raw("'x'"), [0] * 50_000),
)
POOL = (*NUMBERS, *TEXTS, *SHAPES)


def mutate_tree(random: Random, tree: Any) -> str:
    """Return JSON text of a tree with one to three changes."""
    tree, twice = copy.deepcopy(tree), ""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        places = list(_list_places(tree))
        if not places:
            break
        place, key = random.choice(places)
        if random.random() < 0.07 and isinstance(place, dict):
            twice = json.dumps(key)
        elif random.random() < 0.2:
            _move(random, place, key, places)
        else:
            place[key] = _replace(random, place[key])
    text = write_tree(tree)
    if twice and twice in text:
        text = text.replace(twice, f"{twice}: {random.choice(('1', 'null', '{}'))}, {twice}", 1)
    return text


def _move(random: Random, place: Any, key: Any, places: list[tuple[Any, Any]]) -> None:
    """Delete a key, give it another name, swap its value with another's, or add one beside it."""
    other, at = random.choice(places)
    kind = random.choice(("delete", "swap", "copy", "rename", "add"))
    if kind == "delete":
        del place[key]
    elif kind in ("swap", "copy"):
        value = copy.deepcopy(other[at])
        if kind == "swap":
            other[at] = copy.deepcopy(place[key])
        place[key] = value
    elif isinstance(place, dict):
        name = random.choice((*TEXTS, *place))
        place[name] = place.pop(key) if kind == "rename" else copy.deepcopy(random.choice(POOL))


def _replace(random: Random, value: Any) -> Any:
    """Return another value: any of the pool, one that is close, or the same in a container."""
    chance = random.random()
    if chance < 0.7:
        return copy.deepcopy(random.choice(POOL))
    return _tweak(random, value) if chance < 0.9 else random.choice(([value], {"x": value}))


def write_tree(tree: Any) -> str:
    """Return JSON text, in which `Raw` text stands as it is."""
    raw: list[str] = []

    def mark(value: Any) -> Any:
        if isinstance(value, Raw):
            raw.append(value)
            return f"@raw{len(raw) - 1}@"
        if isinstance(value, dict):
            return {key: mark(inner) for key, inner in value.items()}
        return [mark(inner) for inner in value] if isinstance(value, list) else value

    text = json.dumps(mark(tree))
    for i, piece in enumerate(raw):
        text = text.replace(f'"@raw{i}@"', piece)
    return text


def mutate_bytes(random: Random, content: bytes) -> bytes:
    """Return bytes with some flipped, cut out, put in, doubled or cut off."""
    raw = bytearray(content)
    for _ in range(random.choice((1, 1, 2, 8))):
        at = random.randrange(len(raw) + 1)
        to = min(len(raw), at + random.choice((1, 2, 8, 64, 1000)))
        kind = random.choice(("flip", "flip", "flip", "cut", "put", "double", "truncate", "zero"))
        if kind == "flip" and at < len(raw):
            raw[at] ^= 1 << random.randrange(8)
        elif kind == "cut":
            del raw[at:to]
        elif kind == "put":
            raw[at:at] = random.randbytes(random.choice((1, 3, 8)))
        elif kind == "double":
            raw[at:at] = raw[at:to]
        elif kind == "truncate":
            del raw[at:]
        elif kind == "zero":
            raw[at:to] = bytes(to - at)
    return bytes(raw)


def mutate_json_file(random: Random, path: Path) -> None:
    """Change a JSON file: mostly its tree, sometimes its bytes."""
    if random.random() < 0.85:
        text = mutate_tree(random, json.loads(path.read_text()))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    else:
        path.write_bytes(mutate_bytes(random, path.read_bytes()))


def mutate_safetensors(random: Random, path: Path) -> None:
    """Change a safetensors file: its header's tree, its header's length, or bytes anywhere."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    kind = random.choice(("tree",) * 6 + ("header", "data", "bytes", "length", "more"))
    if kind == "tree":
        text = mutate_tree(random, json.loads(header))
        header = text.encode("utf-8", "surrogatepass")
    elif kind == "header":
        header = mutate_bytes(random, header)
    elif kind == "data":
        data = mutate_bytes(random, data)
    elif kind == "bytes":
        path.write_bytes(mutate_bytes(random, content))
        return
    elif kind == "more":
        data += random.randbytes(random.choice((1, 8, 4096)))
    announced = len(header)
    if kind == "length":
        announced = random.choice((0, 1, 7, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
    path.write_bytes(struct.pack("<Q", announced) + header + data)


def mutate_tensors(random: Random, path: Path) -> None:
    """Write a tensor file in which a few tensors are changed, renamed, copied or missing."""
    tensors = load_file(path)
    for _ in range(random.choice((1, 1, 2))):
        name, other = random.choice(list(tensors)), random.choice(list(tensors))
        kind = random.choice(("change",) * 4 + ("pop", "copy", "name", "swap"))
        if kind == "change":
            tensors[name] = _change_tensor(random, tensors[name])
        elif kind == "copy":
            more = random.choice(("ghost", name + "x", "a.weight", "a.x"))
            tensors[more] = tensors[name].clone()
        elif kind == "name":
            tensors[random.choice(("x\x1b[2J", "größe", "x" * 2000))] = tensors.pop(name)
        elif kind == "swap":
            tensors[name], tensors[other] = tensors[other], tensors[name]
        elif len(tensors) > 1:
            del tensors[name]
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


def _change_tensor(random: Random, tensor: Tensor) -> Tensor:
    """Return a tensor of another dtype, shape or content."""
    kind = random.choice(("dtype", "shape", "fill", "byte"))
    if kind == "dtype":
        return tensor.to(random.choice(tuple(DTYPES.values())))
    if kind == "shape":
        shapes = (
            tensor.flatten(),
            tensor.unsqueeze(0),
            tensor.reshape(-1)[:0],
            torch.cat([tensor.flatten()] * 2),
            *((tensor[:0], tensor[:1], torch.cat([tensor, tensor])) if tensor.ndim else ()),
            *((tensor.mT,) if tensor.ndim > 1 else ()),
        )
        return random.choice(shapes)
    if kind == "byte" and tensor.numel():
        raw = tensor.clone().reshape(-1).view(torch.uint8)
        raw[random.randrange(len(raw))] = random.choice((0, 0x7F, 0x80, 254, 255))
        return raw.view(tensor.dtype).view(tensor.shape)
    values = (0, torch.nan, torch.inf) if tensor.is_floating_point() else (0, 1)
    return torch.full_like(
        tensor, random.choice((0, 255) if tensor.dtype == torch.uint8 else values)
    )


def replace_file(random: Random, path: Path) -> None:
    """Put something else in a file's place: a folder, a pipe, a link to itself, nothing …"""
    path.unlink()
    kind = random.choice(("nothing", "folder", "pipe", "loop", "device", "empty"))
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "empty":
        path.touch()


def _tweak(random: Random, value: Any) -> Any:
    """Return a value close to one."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, int):
        return random.choice((value + 1, value - 1, -value, 2 * value, value // 2, float(value)))
    if isinstance(value, float):
        return random.choice((-value, str(value), round(value) if abs(value) < 1e300 else 0))
    if isinstance(value, str):
        return random.choice((value[:-1], value + "x", value.upper(), value[::-1], value + "\x07"))
    if isinstance(value, list):
        return random.choice((value[::-1], value[1:], value * 2, dict(enumerate(map(str, value)))))
    return [list(pair) for pair in value.items()] if isinstance(value, dict) else value


def _list_places(tree: Any) -> Any:
    """Yield each container and key in a tree."""
    keys = tree if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ()
    for key in keys:
        yield tree, key
        yield from _list_places(tree[key])
