"""Read a LoRA from a safetensors file, with its scales, under the names of the model's layers.

diffusers', PEFT's and the dotted down/up names are read here; all others by diffusers' converters.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from loraq.errors import CheckpointError
from loraq.integrations.lora_names import convert_names
from loraq.json_files import read_json
from loraq.safetensors.reader import ShardReader

#: Names of the weights in a folder, the first that is there.
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
#: What trainers put in front of a layer's name.
_PREFIXES = ("base_model.model.", "transformer.", "unet.", "diffusion_model.")
#: Where the names of other components of a pipeline begin, kohya's too.
_OTHER_COMPONENT = re.compile(r"(text_encoder|vae)[^.]*|lora_te\d?")
_KEY = re.compile(
    r"(?P<layer>.+)\.(?:"
    r"(?:(?P<down>lora_A(?:\.\w+)?|lora[._]down)|(?P<up>lora_B(?:\.\w+)?|lora[._]up))\.weight"
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
        tensors = {name: reader.read(name) for name in reader.names}
        others = {match[0] for name in tensors if (match := _OTHER_COMPONENT.match(name))}
        tensors = {name: t for name, t in tensors.items() if not _OTHER_COMPONENT.match(name)}
        parts, strange = _sort(tensors)
        known = dict(model.named_modules()) if model is not None else parts
        if model is not None and tensors and (strange or not parts.keys() <= known.keys()):
            _require_plain(file, [name for name in tensors if "dora_scale" in name])
            tensors, left_out = convert_names(tensors, model, file)
            parts, strange = _sort(tensors)
            strange += left_out
        _require_plain(file, strange)
        if not parts:
            raise CheckpointError(f"'{file}' has no LoRA for a transformer.")
        options = _read_options(file, reader.files[file.name].metadata)
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


def _sort(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Return factors and alphas by layer, and the names that are neither."""
    parts: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(_strip_prefix(key))
        kind = match and next(kind for kind in ("down", "up", "alpha") if match[kind])
        if match and kind and kind not in (part := parts.setdefault(match["layer"], {})):
            part[kind] = tensor
        else:  # also a second adapter of the same layer
            strange.append(key)
    return parts, strange


def _require_plain(file: Path, strange: list[str]) -> None:
    if strange:
        raise CheckpointError(
            f"'{file}' holds tensors that are not of a plain LoRA: {', '.join(strange[:6])}. Only "
            "lora_A/lora_B (or down/up) weights and alphas can be absorbed; DoRA, LoKr and LoRA "
            "biases cannot."
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
        options = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"The header of '{file}' is damaged: {error}. Copy it again."
        ) from error
    if not options and beside.is_file():
        options = read_json(beside)
    if not isinstance(options, dict):
        raise _build_options_error(file, f"it is {options!r}, not an object")
    return {
        _strip_prefix(key): value
        for key, value in options.items()
        if not _OTHER_COMPONENT.match(key)
    }


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
        raise CheckpointError(f"'{file}' is a DoRA. Only a plain LoRA can be absorbed.")
    down, up = found["down"], found["up"]
    if down.ndim < 2 or up.ndim < 2 or up.shape[1] != down.shape[0] or not down.shape[0]:
        raise CheckpointError(
            f"'{file}': layer '{layer}' has factors {tuple(up.shape)} and {tuple(down.shape)}. "
            "(out, rank) and (rank, in) are required."
        )
    if not all(factor.float().isfinite().all() for factor in (down, up)):
        raise CheckpointError(
            f"'{file}': layer '{layer}' has factors with NaN or infinity. Download the LoRA again."
        )
    rank = down.shape[0]
    alpha = (
        _read_alpha(file, layer, found["alpha"])
        if "alpha" in found
        else _choose_alpha(file, layer, options, rank)
    )
    return Adapter(down, up, alpha / (math.sqrt(rank) if options.get("use_rslora") else rank))


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


def _choose_alpha(file: Path, layer: str, options: dict[str, Any], rank: int) -> float:
    """Return the alpha that PEFT's configuration has for a layer: the first pattern's, or all's."""
    try:
        matching = (
            alpha
            for name, alpha in dict(options.get("alpha_pattern") or {}).items()
            if re.fullmatch(rf"(?:.*\.)?(?:{name})", layer)
        )
        alpha = next(matching, options.get("lora_alpha", rank))
        finite = math.isfinite(alpha)
    except (TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise _build_options_error(file, str(error)) from error
    if not finite:
        raise _build_options_error(file, f"layer '{layer}' has the alpha {alpha}")
    return float(alpha)
