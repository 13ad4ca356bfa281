"""Tensor parallelism: `LoraqColwise` and `LoraqRowwise`, parallel styles for `parallelize_module`.

A style puts a rank's part of the packed bytes in place of the whole, on every rank, so that the
back end of the layer sees an ordinary smaller layer. Blocks are never cut, and nothing is decoded
but the branch with `exact_branch`.

* Columns (output channels) are split: the result is that of one process, bit for bit.
* Rows (input channels) are split: every rank rounds its own rank-space intermediate, unless
  `exact_branch` sums the intermediate over the ranks first, which costs one more reduction of
  (tokens, rank).

Sharding by tokens (data, context) needs nothing: scales of activations are never shared by tokens.
FSDP2 needs nothing either: packed bytes are parameters.
"""

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.parallel import ParallelStyle
from torch.nn.functional import linear

from loraq.autocast import cast_input, without_autocast
from loraq.errors import KernelError
from loraq.experts import QuantizedExperts
from loraq.formats import BlockFormat, Format
from loraq.kernels.base import decode_one, round_activation
from loraq.nn import QuantizedLayer
from loraq.options import Size, checked
from loraq.scheme import Branch
from loraq.transforms import block_side, rotate, smooth


class LoraqColwise(ParallelStyle):
    """Splits the output channels of a quantized linear layer; the input is whole on every rank."""

    @checked
    def __init__(self, *, fused: Size = 1, gather_output: bool = False) -> None:
        """Describe the split.

        Args:
            fused: how many projections of equal size the layer holds one after the other (3 for q,
                k, v in one); each of them is split.
            gather_output: whether every rank gets all channels back; else each keeps its own.
        """
        super().__init__()
        self.fused, self.gather_output = fused, gather_output

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer, n_ranks, rank = (
            _require_quantized(module),
            device_mesh.size(),
            device_mesh.get_local_rank(),
        )
        if layer.out_features % (n_ranks * self.fused):
            raise KernelError(
                f"{layer.out_features} output channels ({self.fused} fused projections) cannot be "
                f"split over {n_ranks} ranks evenly. Use fewer ranks, or leave this layer whole."
            )
        rows = (
            torch.arange(layer.out_features, device="cpu")
            .view(self.fused, n_ranks, -1)[:, rank]
            .flatten()
        )
        for name, parameter in list(layer.named_parameters(recurse=False)):
            if name == "bias" or (
                name.startswith(("weight", "proj_up")) and not name.endswith("global_scale")
            ):
                _put(layer, name, parameter.detach()[rows.to(parameter.device)])
        layer.out_features = len(rows)
        layer.invalidate()
        if self.gather_output:
            group, fused = device_mesh.get_group(), self.fused

            def gather(_: nn.Module, __: Any, y: Tensor) -> Tensor:
                parts = [torch.empty_like(y) for _ in range(n_ranks)]
                dist.all_gather(parts, y.contiguous(), group=group)
                return torch.cat([part.unflatten(-1, (fused, -1)) for part in parts], -1).flatten(
                    -2
                )

            layer.register_forward_hook(gather)
        return layer


class LoraqRowwise(ParallelStyle):
    """Splits the input channels of a quantized linear layer; the ranks sum the output."""

    @checked
    def __init__(self, *, exact_branch: bool = False, split_input: bool = False) -> None:
        """Describe the split.

        Args:
            exact_branch: whether the branch's intermediate is summed over the ranks before it is
                rounded. Else each rank rounds its own part, which changes the output by about 1 %
                of the branch's share.
            split_input: whether the input is whole on every rank; else each gets its own channels,
                as a layer split by `LoraqColwise` leaves them.
        """
        super().__init__()
        self.exact_branch, self.split_input = exact_branch, split_input

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        layer, n_ranks, rank = (
            _require_quantized(module),
            device_mesh.size(),
            device_mesh.get_local_rank(),
        )
        branch, group = layer.scheme.branch, device_mesh.get_group()
        _require_whole_blocks(layer, n_ranks)
        split = {"weight": layer.scheme.weight_format} | (
            {"proj_down": branch.weight_format} if branch else {}
        )
        for part, fmt in split.items():
            for name in ("packed", "scale"):
                stored = getattr(layer, f"{part}_{name}", None)
                if stored is not None and not (name == "scale" and _has_row_scale(fmt)):
                    _put(layer, f"{part}_{name}", stored.detach().chunk(n_ranks, -1)[rank])
        if layer.smooth_factor is not None:
            _put(layer, "smooth_factor", layer.smooth_factor.detach().chunk(n_ranks)[rank])
        layer.in_features //= n_ranks
        if rank:
            layer.bias = None  # it is added once, by the first rank
        layer.invalidate()
        if self.split_input:
            layer.register_forward_pre_hook(lambda _, args: (args[0].chunk(n_ranks, -1)[rank],))
        if branch is None or not self.exact_branch:
            layer.register_forward_hook(lambda _, __, y: _sum_over_ranks(y, group))
            return layer
        side = _Side(layer, branch)
        layer.scheme = replace(layer.scheme, branch=None)
        for name in [
            name for name, _ in layer.named_parameters(recurse=False) if name.startswith("proj_")
        ]:
            delattr(layer, name)
        layer.invalidate()
        layer.add_module("side", side)

        def add_branch(_: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
            x = cast_input(args[0])
            with without_autocast(x.device):
                x, rounds = smooth(x, layer.smooth_factor), layer.simulate
                x = rotate(x, layer.scheme.rotation)
                inner = _sum_over_ranks(side.down(x, rounds=rounds), group)
                branch = side.up(inner, rounds=rounds)
                return (_sum_over_ranks(y.float(), group) + branch).to(y.dtype)

        layer.register_forward_hook(add_branch)
        return layer


class _Side(nn.Module):
    """The branch of a layer split by rows: a part of proj_down, all of proj_up, decoded."""

    def __init__(self, layer: QuantizedLayer, branch: Branch) -> None:
        super().__init__()
        self.branch = branch
        stored = layer.packed.branch
        assert stored is not None
        self.proj_down = nn.Parameter(
            decode_one(stored.proj_down, torch.float32), requires_grad=False
        )
        self.proj_up = nn.Parameter(decode_one(stored.proj_up, torch.float32), requires_grad=False)

    def down(self, x: Tensor, *, rounds: bool) -> Tensor:
        return linear(_see(x, self.branch.activation_format, rounds=rounds), self.proj_down)

    def up(self, inner: Tensor, *, rounds: bool) -> Tensor:
        return linear(_see(inner, self.branch.intermediate_format, rounds=rounds), self.proj_up)


def _see(x: Tensor, fmt: Format, *, rounds: bool) -> Tensor:
    """Return what a product in fp32 sees of an activation; rounding is only simulated there."""
    return round_activation(x, fmt, torch.float32) if rounds else x.float()


def _sum_over_ranks(y: Tensor, group: Any) -> Tensor:
    y = y.contiguous()
    dist.all_reduce(y, group=group)
    return y


def _require_quantized(module: nn.Module) -> QuantizedLayer:
    if not isinstance(module, QuantizedLayer) or isinstance(module, QuantizedExperts):
        raise KernelError(
            f"A loraq parallel style was given a {type(module).__name__}. It splits "
            "QuantizedLinear layers only: use torch's own styles for the layers that are not "
            "quantized."
        )
    fmt = module.scheme.weight_format
    if isinstance(fmt, BlockFormat) and (fmt.of_rows or fmt.of_columns):
        raise KernelError(
            f"A layer of '{fmt.name}' has a scale of each row or column above its block scales, "
            "which the parallel styles do not split. Leave this layer whole."
        )
    return module


def _require_whole_blocks(layer: QuantizedLayer, n_ranks: int) -> None:
    """Raise `KernelError` if a rank's input channels would cut a byte, a block or a rotation."""
    scheme, branch = layer.scheme, layer.scheme.branch
    formats: list[Format] = [scheme.weight_format, scheme.activation_format]
    formats += [branch.weight_format, branch.activation_format] if branch else []
    units = {
        f"'{fmt.name}'": (fmt.block_size or 8) if isinstance(fmt, BlockFormat) else 1
        for fmt in formats
    }
    units["the rotation"] = block_side(layer.in_features, scheme.rotation)
    for of_what, unit in units.items():
        if layer.in_features % (n_ranks * unit):
            raise KernelError(
                f"{layer.in_features} input channels over {n_ranks} ranks cut a block of {of_what} "
                f"({unit} values). Use fewer ranks, or split this layer by columns."
            )


def _has_row_scale(fmt: Format) -> bool:
    return isinstance(fmt, BlockFormat) and fmt.block_size is None


def _put(layer: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter by a part of it that holds no memory of the whole."""
    setattr(
        layer,
        name,
        nn.Parameter(tensor.clone(memory_format=torch.contiguous_format), requires_grad=False),
    )
