"""Read a LoRA from a safetensors file, with its scales, under the names of the model's layers.

diffusers', PEFT's and the dotted down/up names are read here; all others by diffusers' converters.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from loraq.checkpoint.folder import file_sha256
from loraq.errors import CheckpointError, list_some
from loraq.integrations.lora_names import convert_names
from loraq.json_files import parse_json, read_json
from loraq.safetensors.header import read_header
from loraq.safetensors.reader import ShardReader

#: Names of the weights in a folder, the first that is there.
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
#: The most tensors of a LoRA; one of FLUX with text encoders has 2000.
_MOST_TENSORS = 10_000
#: What trainers put in front of a layer's name.
_PREFIXES = ("base_model.model.", "transformer.", "unet.", "diffusion_model.")
#: Where the names of other components of a pipeline begin, kohya's too.
_OTHER_COMPONENT = re.compile(r"(text_encoder|vae)[^.]*|lora_te\d?")
#: What a pattern of PEFT is here: a layer's name or its end, perhaps anchored.
_PATTERN = re.compile(r"(?P<whole>\^?)(?P<name>(?:[\w-]|\\?\.)+)\$?")
_KEY = re.compile(
    r"(?P<layer>.+)\.(?:"
    r"(?:(?P<down>lora_A(?:\.(?P<of_down>\w+))?|lora[._]down)"
    r"|(?P<up>lora_B(?:\.(?P<of_up>\w+))?|lora[._]up))\.weight"
    r"|(?P<alpha>alpha))"
)


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a LoRA adds to one layer: `scale · up @ down`."""

    #: (rank, in), or the 4-D weight of a convolution.
    down: Tensor
    #: (out, rank), or the 4-D weight of a convolution.
    up: Tensor
    #: alpha / rank.
    scale: float

    def delta(self, device: Any = None) -> Float[Tensor, "out in"]:
        """Return the dense product in fp32."""
        up, down = (part.to(device).float().flatten(1) for part in (self.up, self.down))
        return self.scale * (up @ down)


@dataclass(frozen=True)
class Lora:
    """A LoRA for one model."""

    file: Path
    #: By the dotted name of the layer.
    adapters: dict[str, Adapter]
    #: Other components of a pipeline that the file has adapters for.
    others: tuple[str, ...]

    @classmethod
    def read(cls, path: str | Path, model: nn.Module | None = None) -> "Lora":
        """Read a safetensors file, or a folder with one in it.

        Args:
            path: the file or folder.
            model: what the LoRA is for. Names that are not those of its layers go through
                diffusers' converter for its class.

        Raises:
            CheckpointError: no such file, not safetensors, or tensors that are not a plain LoRA's;
                the message lists them.
        """
        file = find_lora_file(Path(path))
        reader = ShardReader(file)
        if len(reader.names) > _MOST_TENSORS:
            raise CheckpointError(
                f"'{file}' has {len(reader.names)} tensors; a LoRA of at most {_MOST_TENSORS} is "
                "read. Is it one?"
            )
        tensors = {name: reader.read(name) for name in reader.names}
        others = {match[0] for name in tensors if (match := _OTHER_COMPONENT.match(name))}
        tensors = {name: t for name, t in tensors.items() if not _OTHER_COMPONENT.match(name)}
        _require_floats(file, tensors)
        parts, strange = _sort(tensors)
        known = dict(model.named_modules()) if model is not None else parts
        converted = bool(tensors) and bool(strange or not parts.keys() <= known.keys())
        if model is not None and converted:
            _require_plain(file, [name for name in tensors if "dora_scale" in name])
            _require_plain(file, _find_lone_alphas(tensors))
            tensors, left_out = convert_names(tensors, model, file)
            parts, strange = _sort(tensors)
            strange += left_out
        _require_plain(file, strange)
        if not parts:
            raise CheckpointError(f"'{file}' has no LoRA for a transformer.")
        options = _read_options(file, reader.files[file.name].metadata)
        if converted:  # a converter splits factors, of which the configuration has the rank before
            options |= {"r": None, "rank_pattern": {}}
        adapters = {
            layer: _build_adapter(file, layer, found, options) for layer, found in parts.items()
        }
        return cls(file, adapters, tuple(sorted(others)))


def find_lora_file(path: Path) -> Path:
    """Return the safetensors file that a path to a LoRA stands for: itself, or the one in a folder.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    if path.is_file():
        return path
    files = [path / name for name in _FILES if (path / name).is_file()] or sorted(
        path.glob("*.safetensors")
    )
    if len(files) != 1 and not (files and files[0].name in _FILES):
        raise CheckpointError(
            f"'{path}' is not a LoRA: {len(files)} .safetensors files there. Give the file itself."
        )
    return files[0]


def read_lora(path: str | Path, model: nn.Module) -> tuple[Lora, str]:
    """Return a LoRA for a model, and the hash of the file that it is in.

    Raises:
        CheckpointError: as for `Lora.read`, or the file changed meanwhile.
    """
    file = find_lora_file(Path(path))
    read_header(file)  # a file that is not one is not hashed for minutes
    before = file_sha256(file)
    lora = Lora.read(path, model)
    if file_sha256(lora.file) != before:
        raise CheckpointError(f"'{lora.file}' changed while it was read. Try again.")
    return lora, before


def name_of(file: Path) -> str:
    """Return what a LoRA is called: its file, or the folder if all such files are called alike."""
    return (file.resolve().parent.name if file.name in _FILES else "") or file.stem


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return factors and alphas by layer, and the names that are neither."""
    parts: dict[str, dict[str, Tensor]] = {}
    adapters: dict[str, str | None] = {}
    strange = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_strip_prefix(key))
        kind = match and next(kind for kind in ("down", "up", "alpha") if match[kind])
        if match is None or kind is None or kind in parts.get(match["layer"], {}):
            strange.append(key)  # also a second adapter of the same layer, in whatever spelling
            continue
        adapter = match["of_down"] or match["of_up"]
        if kind != "alpha" and adapters.setdefault(match["layer"], adapter) != adapter:
            strange.append(key)  # a factor of another adapter
            continue
        parts.setdefault(match["layer"], {})[kind] = tensor
    return parts, strange


def _find_lone_alphas(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the alphas that belong to no factor, which a converter would drop."""
    stems = {key.rpartition(".lora_")[0] for key in tensors} | {
        key.rpartition(".lora.")[0] for key in tensors
    }
    alphas = {key: key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")}
    return [key for key, stem in alphas.items() if stem not in stems]


def _require_floats(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Require floats, of FP8 too; an alpha may be an integer."""
    for name, tensor in tensors.items():
        is_number = not tensor.is_complex() and tensor.dtype != torch.bool
        if not (tensor.is_floating_point() or (is_number and name.endswith("alpha"))):
            raise CheckpointError(f"'{file}': '{name}' is {tensor.dtype}. Floats are required.")


def _require_plain(file: Path, strange: list[str]) -> None:
    if strange:
        raise CheckpointError(
            f"'{file}' holds tensors that are not of a plain LoRA: {list_some(strange)}. Only "
            "lora_A/lora_B (or down/up) weights and alphas can be absorbed or appended; DoRA, LoKr "
            "and LoRA biases cannot."
        )


def _strip_prefix(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _read_options(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Return what PEFT's configuration says.

    diffusers keeps it in the header, PEFT beside the file.
    """
    beside = file.parent / "adapter_config.json"
    try:
        options = parse_json(metadata.get("lora_adapter_metadata") or "{}")
    except ValueError as error:
        raise CheckpointError(
            f"The header of '{file}' is damaged: {error}. Copy it again."
        ) from error
    if not isinstance(options, dict):
        raise _build_options_error(file, f"it is {options!r}, not an object")
    if not options and os.path.lexists(beside):
        options = read_json(beside)
    options = _strip_prefixes(file, options)
    for key, kinds in _OPTIONS.items():
        value = options.get(key)
        wrong_bool = isinstance(value, bool) and bool not in kinds
        if value is not None and (wrong_bool or not isinstance(value, kinds)):
            raise _build_options_error(file, f"'{key}' is {value!r}")
    for key in ("alpha_pattern", "rank_pattern"):
        options[key] = _parse_patterns(file, key, options.get(key) or {})
    return options


def _strip_prefixes(file: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the transformer under their plain names."""
    plain: dict[str, Any] = {}
    for key, value in options.items():
        if _OTHER_COMPONENT.match(key):
            continue
        name = _strip_prefix(key)
        if plain.setdefault(name, value) != value:
            raise _build_options_error(file, f"'{name}' is both {plain[name]!r} and {value!r}")
    return plain


#: Types of the options that are read.
_OPTIONS: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "rank_pattern": (dict,),
    "alpha_pattern": (dict,),
    "use_dora": (bool,),
    "use_rslora": (bool,),
}


#: Place and number of each pattern, by what it requires a layer's name to end with; see `_look_up`.
Patterns = dict[str, tuple[int, float]]


def _parse_patterns(file: Path, option: str, patterns: dict[str, Any]) -> Patterns:
    """Return what patterns say.

    PEFT reads a pattern as a regular expression for the end of a name. A stranger's expression may
    take Python longer than anybody lives, and files have names there: only these are read, to which
    "^" before and "$" behind change what PEFT would change.
    """
    found: Patterns = {}
    for pattern, number in patterns.items():
        match = _PATTERN.fullmatch(pattern)
        if match is None:
            raise _build_options_error(
                file,
                f"'{option}' has the regular expression '{pattern}', and only names of layers, or "
                "their ends, are read",
            )
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise _build_options_error(file, f"'{option}' has {number!r} for '{pattern}'")
        name = match["name"].replace("\\", "")
        found.setdefault(match["whole"] + name, (len(found), number))
    return found


def _look_up(patterns: Patterns, layer: str, default: Any) -> Any:
    """Return the number of the first pattern that is a layer's name, or its end after a period."""
    parts = layer.split(".")
    ends = ("^" + layer, *(".".join(parts[i:]) for i in range(len(parts))))
    return min((patterns[end] for end in ends if end in patterns), default=(0, default))[1]


def _build_options_error(file: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"The configuration of '{file}' is damaged: {reason}. Copy it again.")


def _build_adapter(
    file: Path, layer: str, found: dict[str, Tensor], options: dict[str, Any]
) -> Adapter:
    if "down" not in found or "up" not in found:
        raise CheckpointError(
            f"'{file}': layer '{layer}' has only {', '.join(found)}. Both factors are required."
        )
    if options.get("use_dora"):
        raise CheckpointError(f"'{file}' is a DoRA. Only a plain LoRA can be absorbed or appended.")
    down, up = found["down"], found["up"]
    rank = down.shape[0] if down.ndim else 0
    if (
        {down.ndim, up.ndim} - {2, 4}
        or up.shape[1] != rank
        or set(up.shape[2:]) - {1}
        or not down.numel()
        or not up.numel()
    ):
        raise CheckpointError(
            f"'{file}': layer '{layer}' has factors {tuple(up.shape)} and {tuple(down.shape)}. "
            "(out, rank) and (rank, in) are required, or the 4-D weights of convolutions with one "
            "pixel in the first."
        )
    if not all(factor.float().isfinite().all() for factor in (down, up)):
        raise CheckpointError(
            f"'{file}': layer '{layer}' has factors with NaN or infinity. Download the LoRA again."
        )
    if (said := _look_up(options["rank_pattern"], layer, options.get("r"))) not in (None, rank):
        raise CheckpointError(
            f"'{file}': layer '{layer}' has factors of rank {rank}, and its configuration says "
            f"{said}. Download the LoRA again."
        )
    alpha = options.get("lora_alpha")
    alpha = float(_look_up(options["alpha_pattern"], layer, rank if alpha is None else alpha))
    if "alpha" in found:
        alpha = _read_alpha(file, layer, found["alpha"])
    scale = alpha / (math.sqrt(rank) if options.get("use_rslora") else rank)
    largest = math.prod(float(factor.float().abs().max()) for factor in (down, up))
    if abs(scale) * rank * largest > torch.finfo(torch.float32).max:
        raise CheckpointError(
            f"'{file}': layer '{layer}' has factors up to {largest:.3g}, multiplied, and the scale "
            f"{scale:.3g}, which together overflow fp32. Download the LoRA again."
        )
    return Adapter(down, up, scale)


def _read_alpha(file: Path, layer: str, stored: Tensor) -> float:
    if stored.numel() != 1:
        raise CheckpointError(
            f"'{file}': layer '{layer}' has an alpha of shape {tuple(stored.shape)}. One number is "
            "required."
        )
    alpha: float = stored.item()
    if not math.isfinite(alpha):
        raise CheckpointError(
            f"'{file}': layer '{layer}' has the alpha {alpha}. A finite number is required."
        )
    return alpha
