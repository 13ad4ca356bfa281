"""The way back from `nunchaku-lite`: its layers as the same bytes in loraq's own order.

Each layer of a folder of Nunchaku Lite is settled first, from headers and small tensors: what it
is, and in which formats it is the same numbers. Its bytes are made when they are read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loraq.errors import CheckpointError, ExportError, list_some
from loraq.exports.codes import join_low_first, offset_codes
from loraq.exports.nunchaku import read_awq, read_svdq, vector_tiling
from loraq.formats import QTensor, get_format
from loraq.formats.packing import pack
from loraq.packed import LowRankBranch, PackedWeight
from loraq.safetensors.header import TensorSpec
from loraq.safetensors.reader import TensorReader
from loraq.scheme import Branch, Scheme

METHOD = "nunchaku_lite"
#: Formats of factors, by the dtype in the file.
_FACTORS = {"BF16": "bf16", "F16": "fp16"}
#: Values that share a scale, by the precision.
_GROUPS = {"int4": 64, "nvfp4": 16}
#: What sizes must be multiples of: (out, in).
_SVDQ_SIZES, _AWQ_SIZES = (128, 128), (4, 64)


@dataclass(frozen=True)
class LiteLayer:
    """A layer of a folder of Nunchaku Lite, and what becomes of it."""

    name: str
    #: (out, in).
    shape: tuple[int, int]
    #: "svdq" or "awq".
    kind: str
    #: Of the same numbers here.
    scheme: Scheme
    #: Tensors of the file that it is made of, without the bias.
    sources: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes that it takes here."""
        return self.scheme.nbytes(self.shape)

    def make(self, reader: TensorReader) -> PackedWeight:
        """Return the layer.

        Raises:
            CheckpointError: a tensor cannot be read, or a factor is no number.
        """
        tensors = {name: reader.read(name) for name in self.sources}
        make = _make_svdq if self.kind == "svdq" else _make_awq
        return make(self, tensors)


def find_layers(
    config: Mapping[str, Any], model: nn.Module, reader: TensorReader
) -> list[LiteLayer]:
    """Return what becomes of each layer.

    Args:
        config: content of `config.json`.
        model: its model on the meta device.
        reader: of the tensors.

    Raises:
        CheckpointError: the folder is not one of Nunchaku Lite, or damaged.
        ExportError: a layer has what no format here holds.
    """
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
        raise CheckpointError(
            f"'config.json' does not say `quant_method: {METHOD}`, which is what is imported: "
            "folders of diffusers for Nunchaku Lite. Files of the Nunchaku engine have fused "
            "layers, and other names."
        )
    layers = []
    for kind, section in (("svdq", "svdq_w4a4"), ("awq", "awq_w4a16")):
        settings = quantization.get(section, {})
        for name in _list_targets(section, settings):
            linear = _find_linear(model, name)
            shape = linear.out_features, linear.in_features
            settle = _settle_svdq if kind == "svdq" else _settle_awq
            layers.append(settle(name, shape, settings, reader))
    if not layers:
        raise CheckpointError("'config.json' names no layer of Nunchaku Lite.")
    return layers


def _list_targets(section: str, settings: object) -> list[str]:
    """Return the layers that a section names; none for one that is empty, or not there."""
    if not settings:
        return []
    targets = settings.get("targets") if isinstance(settings, dict) else None
    if (
        not isinstance(targets, list)
        or not all(isinstance(name, str) for name in targets)
        or len({*targets}) != len(targets)
    ):
        raise CheckpointError(
            f"'config.json': `targets` of `{section}` is {targets!r}. A list of names of layers is "
            "required, each once. Download the folder again."
        )
    return targets


def lay_bias_back(layer: LiteLayer, bias: Tensor) -> Tensor:
    """Return the bias of a layer in the order of its rows."""
    return vector_tiling(layer.shape[0]).gather(bias) if layer.kind == "svdq" else bias


def _find_linear(model: nn.Module, name: str) -> nn.Linear:
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if not isinstance(module, nn.Linear):
        raise CheckpointError(
            f"'config.json' names the layer '{name}', and {type(model).__name__} has no linear "
            "layer of this name. Install the diffusers version that the folder was made for."
        )
    return module


def _settle_svdq(
    name: str, shape: tuple[int, int], settings: Mapping[str, Any], reader: TensorReader
) -> LiteLayer:
    precision, rank = str(settings.get("precision")), settings.get("rank")
    if precision not in _GROUPS or not isinstance(rank, int) or rank < 0 or rank % 16:
        raise CheckpointError(
            f"'config.json' has precision {precision!r} and rank {rank!r}: int4 or nvfp4 and a "
            "multiple of 16 are required."
        )
    _require_sizes(name, shape, _SVDQ_SIZES)
    (n, k), groups = shape, shape[1] // _GROUPS[precision]
    kind = _factor_dtype(reader, f"{name}.proj_down")
    specs = {
        "qweight": TensorSpec("I8", (n, k // 2)),
        "smooth_factor": TensorSpec(kind, (k,)),
        "proj_down": TensorSpec(kind, (k, rank)),
        "proj_up": TensorSpec(kind, (n, rank)),
        "wscales": TensorSpec(kind if precision == "int4" else "F8_E4M3", (groups, n)),
    }
    if precision == "nvfp4":
        specs |= {"wtscale": TensorSpec(kind, (1,)), "wcscales": TensorSpec(kind, (n,))}
    sources = _require_tensors(reader, name, specs)
    read = {part: reader.read(f"{name}.{part}") for part in specs if "proj" not in part[:4]
            and part != "qweight"}  # fmt: skip
    _require_numbers(name, read)
    smooth = read["smooth_factor"].float()
    if not smooth.all():
        raise CheckpointError(f"Tensor '{name}.smooth_factor' has zeros. Download it again.")
    weight: str = precision
    if precision == "int4":
        _require_bf16(name, "wscales", read["wscales"])
    elif len(read["wcscales"].unique()) > 1:
        weight += "_rows"
    if (smooth != 1).any():
        weight += "_columns"
    branch = Branch(rank, _FACTORS[kind]) if rank else None
    return LiteLayer(name, shape, "svdq", Scheme(weight, branch=branch), sources)


def _settle_awq(
    name: str, shape: tuple[int, int], settings: Mapping[str, Any], reader: TensorReader
) -> LiteLayer:
    _require_sizes(name, shape, _AWQ_SIZES)
    (n, k), groups = shape, shape[1] // _GROUPS["int4"]
    kind = _factor_dtype(reader, f"{name}.wscales")
    specs = {
        "qweight": TensorSpec("I32", (n // 4, k // 2)),
        "wscales": TensorSpec(kind, (groups, n)),
        "wzeros": TensorSpec(kind, (groups, n)),
    }
    sources = _require_tensors(reader, name, specs)
    read = {part: reader.read(f"{name}.{part}") for part in ("wscales", "wzeros")}
    _require_numbers(name, read)
    _require_bf16(name, "wscales", read["wscales"])
    # Codes from 0 to 15 with zeros of −8 scales are signed ones. Any other zeros are a branch
    # with a factor of ones for each group, beside codes that leave half of int5 unused.
    is_signed = torch.equal(read["wzeros"], -8 * read["wscales"])
    scheme = Scheme("int4") if is_signed else Scheme("int5", branch=Branch(groups, _FACTORS[kind]))
    return LiteLayer(name, shape, "awq", scheme, sources)


def _make_svdq(layer: LiteLayer, tensors: Mapping[str, Tensor]) -> PackedWeight:
    read, scheme = read_svdq(tensors, layer.name, layer.shape), layer.scheme
    packed = join_low_first(read.codes.to(torch.uint8))
    above = []
    if read.above is not None:
        is_of_rows = "_rows" in scheme.weight
        above.append(read.above.flatten() if is_of_rows else read.above[:1].flatten())
    if scheme.weight.endswith("_columns"):
        above.append(1 / read.smooth.float())
    scale = read.scale if read.above is not None else read.scale.bfloat16()
    main = QTensor(
        packed,
        scale.contiguous().view(torch.uint8),
        torch.cat(above).view(torch.uint8) if above else None,
        layer.shape,
        scheme.weight_format,
    )
    if scheme.branch is None:
        return PackedWeight(scheme, main)
    return PackedWeight(scheme, main, _pack_factors(layer, read.branch.up, read.branch.down))


def _make_awq(layer: LiteLayer, tensors: Mapping[str, Tensor]) -> PackedWeight:
    read, scheme = read_awq(tensors, layer.name, layer.shape), layer.scheme
    codes, scale = read.codes.to(torch.uint8), read.scale.bfloat16().contiguous()
    fmt, raw = scheme.weight_format, scale.view(torch.uint8)
    if scheme.branch is None:
        packed = offset_codes(join_low_first(codes))
        return PackedWeight(scheme, QTensor(packed, raw, None, layer.shape, fmt))
    main = QTensor(pack(codes, fmt.bits), raw, None, layer.shape, fmt)
    ones = torch.eye(scheme.branch.rank).repeat_interleave(_GROUPS["int4"], 1)
    return PackedWeight(scheme, main, _pack_factors(layer, read.zeros.float(), ones))


def _pack_factors(layer: LiteLayer, up: Tensor, down: Tensor) -> LowRankBranch:
    assert layer.scheme.branch is not None
    fmt = get_format(layer.scheme.branch.weight)
    for factor in (up, down):
        _require_numbers(layer.name, {"the branch": factor})
    return LowRankBranch(proj_up=fmt.quantize(up), proj_down=fmt.quantize(down))


def _factor_dtype(reader: TensorReader, name: str) -> str:
    kind = reader.dtype(name) if name in reader.names else "missing"
    if kind not in _FACTORS:
        raise CheckpointError(f"Tensor '{name}' is {kind}. BF16 or F16 is required.")
    return kind


def _require_sizes(name: str, shape: tuple[int, int], units: Sequence[int]) -> None:
    if any(size % unit for size, unit in zip(shape, units, strict=True)):
        raise CheckpointError(
            f"Layer '{name}' is {shape[0]}×{shape[1]}, and Nunchaku has multiples of "
            f"{units[0]}×{units[1]}: the folder is damaged, or of another model."
        )


def _require_tensors(
    reader: TensorReader, name: str, specs: Mapping[str, TensorSpec]
) -> tuple[str, ...]:
    """Require the tensors of a layer, and return their names."""
    there = set(reader.names)
    for part, spec in specs.items():
        full = f"{name}.{part}"
        found = TensorSpec(reader.dtype(full), reader.shape(full)) if full in there else None
        if found != spec:
            raise CheckpointError(
                f"Tensor '{full}' is {f'{found.dtype} of {found.shape}' if found else 'missing'}, "
                f"and {spec.dtype} of {spec.shape} is required. Download the folder again."
            )
    return tuple(f"{name}.{part}" for part in specs)


def _require_numbers(name: str, tensors: Mapping[str, Tensor]) -> None:
    broken = [part for part, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if broken:
        raise CheckpointError(
            f"Layer '{name}' has values that are no numbers in {list_some(broken)}. Download the "
            "folder again."
        )


def _require_bf16(name: str, part: str, tensor: Tensor) -> None:
    """Require scales that our INT4 can store."""
    if not torch.equal(tensor.bfloat16().float(), tensor.float()):
        raise ExportError(
            f"'{name}.{part}' has scales of {tensor.dtype} that are no numbers of bfloat16, which "
            "INT4 has here: nothing would be the same. Ask for a folder that was made in bfloat16."
        )
