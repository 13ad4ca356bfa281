"""Read a LoRA from a safetensors file: diffusers', PEFT's and the older down/up names, with their scales."""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loraq.checkpoint.reader import read_json
from loraq.errors import CheckpointError

#: Names of the weights in a folder, the first that is there.
_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
#: What trainers put in front of a layer's name.
_PREFIXES = ("base_model.model.", "transformer.", "unet.", "diffusion_model.")
_OTHER_COMPONENTS = ("text_encoder", "vae")
_KEY = re.compile(
    r"(?P<layer>.+)\.(?:(?:(?P<down>lora_A(?:\.\w+)?|lora\.down|lora_down)|(?P<up>lora_B(?:\.\w+)?|lora\.up|lora_up))"
    r"\.weight|(?P<alpha>alpha))"
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
    def read(cls, path: str | Path) -> "Lora":
        """Read a safetensors file, or a folder with one in it.

        Raises:
            CheckpointError: no such file, not safetensors, or tensors that are no LoRA; the message
            lists them.
        """
        file = _find(Path(path))
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                tensors = {name: handle.get_tensor(name) for name in handle.keys()}
                metadata = handle.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"'{file}' is truncated or no safetensors file: {error}. Copy it again."
            ) from error
        parts: dict[str, dict[str, Tensor]] = {}
        others, strange = set(), []
        for key, tensor in tensors.items():
            if key.startswith(_OTHER_COMPONENTS):
                others.add(key.split(".")[0])
            elif match := _KEY.fullmatch(_plain(key)):
                kind = next(kind for kind in ("down", "up", "alpha") if match[kind])
                parts.setdefault(match["layer"], {})[kind] = tensor
            else:
                strange.append(key)
        if strange:
            raise CheckpointError(
                f"'{file}' holds tensors that are no plain LoRA: {', '.join(strange[:6])}. Only "
                f"lora_A/lora_B (or "
                "down/up) weights and alphas can be absorbed; DoRA, LoKr and LoRA biases cannot."
            )
        if not parts:
            raise CheckpointError(f"'{file}' has no LoRA for a transformer.")
        options = _options(file, metadata)
        adapters = {layer: _adapter(file, layer, found, options) for layer, found in parts.items()}
        return cls(file, adapters, tuple(sorted(others)))


def _find(path: Path) -> Path:
    if path.is_file():
        return path
    files = [path / name for name in _FILES if (path / name).is_file()] or sorted(
        path.glob("*.safetensors")
    )
    if len(files) != 1 and not (files and files[0].name in _FILES):
        raise CheckpointError(
            f"'{path}' is no LoRA: {len(files)} .safetensors files there. Give the file itself."
        )
    return files[0]


def _plain(key: str) -> str:
    for prefix in _PREFIXES:
        key = key.removeprefix(prefix)
    return key


def _options(file: Path, metadata: dict[str, str]) -> dict[str, Any]:
    """Return what PEFT's configuration says, which diffusers keeps in the header and PEFT beside the file."""
    beside = file.parent / "adapter_config.json"
    try:
        options = json.loads(metadata.get("lora_adapter_metadata") or "{}")
    except ValueError as error:
        raise CheckpointError(
            f"The header of '{file}' is damaged: {error}. Copy it again."
        ) from error
    if not options and beside.is_file():
        options = read_json(beside)
    return {
        _plain(key): value
        for key, value in options.items()
        if not key.startswith(_OTHER_COMPONENTS)
    }


def _adapter(file: Path, layer: str, found: dict[str, Tensor], options: dict[str, Any]) -> Adapter:
    if "down" not in found or "up" not in found:
        raise CheckpointError(
            f"'{file}': layer '{layer}' has only {', '.join(found)}. Both factors are required."
        )
    if options.get("use_dora"):
        raise CheckpointError(f"'{file}' is a DoRA. Only a plain LoRA can be absorbed.")
    down, up = found["down"], found["up"]
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise CheckpointError(
            f"'{file}': layer '{layer}' has factors {tuple(up.shape)} and {tuple(down.shape)}."
        )
    if not all(factor.float().isfinite().all() for factor in (down, up)):
        raise CheckpointError(
            f"'{file}': layer '{layer}' has factors with NaN or infinity. Download the LoRA again."
        )
    patterns = options.get("alpha_pattern") or {}
    matching = (
        alpha for name, alpha in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{name})", layer)
    )
    alpha = (
        found["alpha"].item()
        if "alpha" in found
        else next(matching, options.get("lora_alpha", rank))
    )
    return Adapter(down, up, alpha / (math.sqrt(rank) if options.get("use_rslora") else rank))
