"""What is exported: a quantized folder or pipeline, checked, its layers read one at a time."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from loraq.checkpoint.folder import file_sha256
from loraq.checkpoint.links import find_files, require_own_weights
from loraq.checkpoint.manifest import FILE_NAME, Manifest
from loraq.checkpoint.model import insert_empty_layers
from loraq.checkpoint.model_index import is_pipeline, read_components
from loraq.errors import CheckpointError, ExportError, list_some
from loraq.experts import QuantizedExperts
from loraq.exports.factors import build_factors
from loraq.exports.layer import Head, Layer
from loraq.families import family_rules
from loraq.formats.scales import view_bytes
from loraq.integrations.diffusers import empty_model, model_folder
from loraq.integrations.hub import local_path
from loraq.integrations.lora import Adapter, Lora
from loraq.json_files import read_json
from loraq.layers import quantized_layers
from loraq.nn import QuantizedConv1x1, QuantizedLayer
from loraq.packed import PackedStack, PackedWeight
from loraq.safetensors.reader import TensorReader


@dataclass(frozen=True)
class ExportSource:
    """A quantized model of diffusers: its files, and LoRAs that are stacked onto it."""

    #: A pipeline's folder, or the model's own.
    root: Path
    #: Folder of the model.
    folder: Path
    #: Name of that folder in the pipeline, or "".
    component: str
    manifest: Manifest
    reader: TensorReader
    #: Content of `config.json`, without its `quantization_config`.
    config: dict[str, Any]
    #: On the meta device, its quantized layers empty.
    model: nn.Module
    heads: tuple[Head, ...]
    #: LoRAs with their scales multiplied in, by the name of the layer.
    adapters: dict[str, list[Adapter]]
    #: SHA-256 of the manifest.
    sha256: str

    @classmethod
    def open(
        cls, source: str | Path, loras: list[tuple[Path, float]], *, verify: bool = True
    ) -> "ExportSource":
        """Check a folder against its manifest and its class.

        Args:
            source: a quantized folder, a pipeline's, or a repository of the hub.
            loras: files and the strength of each.
            verify: whether the files' hashes are compared.

        Raises:
            CheckpointError: it is not a quantized folder, or damaged; or a LoRA cannot be read.
            ExportError: a LoRA touches what the model does not have.
        """
        root = local_path(source)
        folder = _find_folder(root)
        require_own_weights(root, folder)
        if not (folder / FILE_NAME).is_file():
            raise CheckpointError(
                f"'{folder}' is not a loraq checkpoint: it has no '{FILE_NAME}'. `loraq quantize "
                "SRC DST` makes one, and `loraq export` starts from that."
            )
        if not (folder / "config.json").is_file():
            raise CheckpointError(
                f"'{folder}' has no 'config.json', which names the class that other programs "
                "load. Quantize again with `--config`."
            )
        config = read_json(folder / "config.json")
        if "_class_name" not in config:
            raise ExportError(
                f"'{folder}' is no model of diffusers, and the targets are for those. Load it with "
                "`loraq.load`; `loraq.dequantize_` makes a float model of it."
            )
        sha256 = file_sha256(folder / FILE_NAME)
        model = empty_model(folder)
        manifest, reader = insert_empty_layers(model, folder, verify=verify)
        config.pop("quantization_config", None)
        adapters = _read_loras(loras, model)
        heads = _find_heads(model, manifest, reader, adapters)
        component = folder.name if folder != root else ""
        return cls(
            root, folder, component, manifest, reader, config, model, heads, adapters, sha256
        )

    def find_others(self) -> dict[str, Path]:
        """Return the files of a pipeline's other components by their path in it."""
        return find_files(self.root, without=self.component) if self.component else {}

    def find_floats(self) -> dict[str, str]:
        """Return the class of every module with a float weight of two or more axes."""
        return {
            name: type(module).__name__
            for name, module in self.model.named_modules(remove_duplicate=False)
            if name and not isinstance(module, QuantizedLayer) and _has_matrix(module)
        }

    def list_kept(self) -> list[str]:
        """Return the names of all tensors that are no part of a quantized weight."""
        owners = {head.name for head in self.heads}
        names = dict.fromkeys([*self.reader.names, *self.manifest.tied])
        return [
            name
            for name in names
            if (parts := name.rpartition("."))[0] not in owners or parts[2] == "bias"
        ]

    def stored_name(self, name: str) -> str:
        """Return the name in the files of a tensor, which may be that of another one."""
        return self.manifest.tied.get(name, name)

    def kept_spec(self, name: str) -> tuple[str, tuple[int, ...]]:
        """Return dtype, in safetensors' notation, and shape of a tensor of `list_kept`."""
        stored = self.stored_name(name)
        return self.reader.dtype(stored), self.reader.shape(stored)

    def read_kept(self, name: str) -> Tensor:
        """Return a tensor of `list_kept`; in fp32 if LoRAs add to it, whose sum is not rounded."""
        tensor = self.reader.read(self.stored_name(name))
        owner, _, leaf = name.rpartition(".")
        if leaf == "weight" and owner in self.adapters:
            tensor = tensor.float()
            for adapter in self.adapters[owner]:
                tensor = tensor + adapter.delta().view(tensor.shape)
        return tensor

    def read_scale(self, head: Head) -> Tensor:
        """Return the block scales of a main weight in fp32, without a global scale."""
        assert head.main is not None, "a format without blocks has no scales"
        name = self.stored_name(f"{head.stored}.weight_scale")
        return head.main.scale_format.decode(self.reader.read(name))

    def read_global_scale(self, head: Head) -> Tensor:
        """Return the scale above the block scales of a main weight, fp32, without axes."""
        raw = self.reader.read(self.stored_name(f"{head.stored}.weight_global_scale"))
        return view_bytes(raw, torch.float32)[0]

    def read_layer(self, head: Head) -> Layer:
        """Return a quantized layer that is not rotated, with what LoRAs add to its branch."""
        packed = PackedWeight.from_tensors(self._read_parts(head), head.scheme, head.shape)
        branch = build_factors(packed, self.adapters.get(head.name, []))
        return Layer(head, packed.main, branch, packed.branch)

    def read_dense(self, head: Head) -> Tensor:
        """Return the effective weight in fp32 (out, in), or (experts, out, in), with LoRAs."""
        parts = self._read_parts(head)
        if head.n_experts:
            shape = (head.n_experts, *head.shape)
            return PackedStack.from_tensors(parts, head.scheme, shape).reconstruct()
        dense = PackedWeight.from_tensors(parts, head.scheme, head.shape).reconstruct()
        for adapter in self.adapters.get(head.name, []):
            dense += adapter.delta()
        return dense

    def _read_parts(self, head: Head) -> dict[str, Tensor]:
        names = head.scheme.storage(head.packed_shape)
        return {part: self.reader.read(self.stored_name(f"{head.stored}.{part}")) for part in names}


def _find_folder(root: Path) -> Path:
    """Return the folder of the one quantized model of a source."""
    if is_pipeline(root):
        packed = [part.name for part in read_components(root).values() if part.is_packed]
        if len(packed) > 1:
            raise ExportError(
                f"'{root}' has {len(packed)} quantized models: {list_some(packed)}. Export each "
                f"from its own folder, such as '{root / packed[0]}', and put the results into a "
                "pipeline. No target holds a text encoder: `loraq.dequantize_` makes it float."
            )
    return model_folder(root, quantized=True)


def _find_heads(
    model: nn.Module, manifest: Manifest, reader: TensorReader, adapters: dict[str, list[Adapter]]
) -> tuple[Head, ...]:
    """Return every quantized layer, one that stands in several places under each of its names."""
    first = {module: name for name, module in quantized_layers(model).items()}
    rules = family_rules(type(model).__name__)
    heads = []
    for name, module in model.named_modules(remove_duplicate=False):
        if not isinstance(module, QuantizedLayer):
            continue
        stored, shape = first[module], (module.out_features, module.in_features)
        stack = module if isinstance(module, QuantizedExperts) else None
        bias = manifest.tied.get(f"{name}.bias", f"{name}.bias")
        rule = next((rule for rule in rules if rule.matches(name)), None)
        heads.append(
            Head(
                name=name,
                stored=stored,
                shape=shape,
                scheme=module.scheme,
                dense_shape=_shape_of(module),
                is_kept=manifest.layers[stored].is_kept,
                n_experts=stack.n_experts if stack else 0,
                is_transposed=stack is not None and stack.transposed,
                bias=reader.dtype(bias) if module.bias is not None else "",
                lora_rank=sum(adapter.down.shape[0] for adapter in adapters.get(name, [])),
                is_modulation=bool(rule and rule.weight_only),
            )
        )
    return tuple(heads)


def _shape_of(layer: QuantizedLayer) -> tuple[int, ...]:
    n_out, n_in = layer.out_features, layer.in_features
    if isinstance(layer, QuantizedExperts):
        return (layer.n_experts, *((n_in, n_out) if layer.transposed else (n_out, n_in)))
    return (n_out, n_in, 1, 1) if isinstance(layer, QuantizedConv1x1) else (n_out, n_in)


def _read_loras(loras: list[tuple[Path, float]], model: nn.Module) -> dict[str, list[Adapter]]:
    """Return what LoRAs add to each layer, their strengths multiplied in."""
    found: dict[str, list[Adapter]] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for path, strength in loras:
        lora = Lora.read(path, model)
        strange = [name for name in lora.adapters if not _takes(modules.get(name))]
        if strange:
            raise ExportError(
                f"'{lora.file}' touches {len(strange)} layers that {type(model).__name__} does not "
                f"have: {list_some(strange)}. Is the LoRA for this model, in names that diffusers "
                "understands?"
            )
        for name, adapter in lora.adapters.items():
            _require_shape(lora.file, name, adapter, modules[name])
            scaled = Adapter(adapter.down, adapter.up, strength * adapter.scale)
            found.setdefault(name, []).append(scaled)
    return found


def _takes(module: nn.Module | None) -> bool:
    """Return whether a LoRA can be for a module: it has a weight that is a matrix of some kind."""
    if isinstance(module, QuantizedLayer):
        return not isinstance(module, QuantizedExperts)
    return module is not None and _has_matrix(module)


def _has_matrix(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and weight.is_floating_point()


def _require_shape(file: Path, name: str, adapter: Adapter, module: nn.Module) -> None:
    if isinstance(module, QuantizedLayer):
        shape = (module.out_features, module.in_features)
    else:
        weight = module.get_parameter("weight")
        shape = (weight.shape[0], weight[0].numel())
    given = (adapter.up.shape[0], adapter.down[0].numel())
    if given != shape:
        raise ExportError(
            f"'{file}': layer '{name}' has factors {tuple(adapter.up.shape)} and "
            f"{tuple(adapter.down.shape)}, and the layer is {shape}. The LoRA is for another model."
        )
