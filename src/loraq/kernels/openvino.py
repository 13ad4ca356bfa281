"""OpenVINO's products of INT4 or INT8 weights and INT8 activations, one compiled graph a layer.

For CPUs with AVX-512 VNNI or AMX. Main weight and branch are constants of integers, each block of
which a scale multiplies. OpenVINO multiplies them with activations that it rounds to INT8, one
scale for the values of a block, and keeps both in 4 and 8 bits. What it multiplies is a copy in its
own order, beside the stored bytes. A model of many layers took more memory than on `resident`, and
more time than in bf16 (docs/backends.md); `loraq export --to openvino` makes one graph of it.

Intel GPUs are refused: graphs share the memory of the host, and none was at hand to test another
way.

A graph is for one number of tokens, which saves the copy of the output that OpenVINO makes
otherwise, and keeps. Another number of tokens compiles the layer again.
"""

import threading
import weakref
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, library
from torch.nn.functional import pad

from loraq.formats import BlockFormat, CastFormat, Format, QTensor
from loraq.kernels.base import Backend, finish, flatten_tokens, work_dtype
from loraq.kernels.low_memory import packed_backward, save_packed, write_scheme
from loraq.packed import PackedWeight
from loraq.scheme import Branch, Scheme

#: Values of an activation that share a scale, beside main weights whose blocks are as long.
_GROUPS = (64, 32)

#: Every graph by its number: a compiler takes numbers into a graph of its own, and no objects.
_graphs: "weakref.WeakValueDictionary[int, _Graph]" = weakref.WeakValueDictionary()


class OpenVinoOperands(NamedTuple):
    """What `openvino` keeps."""

    graph: "_Graph"
    #: Number of the graph.
    number: Tensor
    #: The stored bytes, for a gradient.
    tensors: list[Tensor]


class OpenVino(Backend):
    """One graph of OpenVINO for each layer."""

    name = "openvino"
    keeps_operands = True

    def as_run(self, scheme: Scheme) -> Scheme:
        """Return the scheme with the INT8 activations that OpenVINO has.

        Their blocks are shorter than a token, and their scales are no powers of two: more exact
        than `int8` and than `mxint8`. Beside shorter blocks of a weight they stay in floats.
        """
        group = _group_of(scheme)
        if not group or not _is_integer(scheme.activation_format, 8) or _rounds_too_much(scheme):
            return scheme
        branch, rounded = scheme.branch, f"int8_b{group}"
        if branch is not None:
            fits = _fits(branch.weight_format, group)
            branch = replace(
                branch,
                activation=rounded if fits else "bf16",
                intermediate=rounded if fits and filled_rank(branch) >= group else "bf16",
            )
        return replace(scheme, activation=rounded, branch=branch)

    def refusal(self, scheme: Scheme, shape: tuple[int, int], device: torch.device) -> str | None:
        """Return why a layer (out, in) cannot run here, judged without its values, or `None`."""
        if not is_installed():
            return 'openvino is not installed (pip install "loraq[openvino]")'
        if device.type not in ("cpu", "meta"):
            return f"it is known on 'cpu', not on '{device.type}'"
        branch = scheme.branch
        if branch and not _is_integer(branch.weight_format, 8):
            return f"its branch is in '{branch.weight}', and 8-bit integers are required"
        if not _group_of(scheme) or shape[1] < _group_of(scheme):
            return f"rows of {shape[1]} in '{scheme.weight}' are no INT4 or INT8 in blocks of 32"
        if _rounds_too_much(scheme):
            return "it would round the branch's activations too, which keep 16 bits"
        own = f"int8_b{_group_of(scheme)}"
        if scheme.activation != own or self.as_run(scheme) != scheme:
            return f"activations in '{scheme.activation}' are none of its '{own}'"
        for name, (fmt, (_, n)) in scheme.parts(shape).items():
            assert isinstance(fmt, BlockFormat)
            if name != "proj_up" and n % min(fmt.block_size or n, n):  # a rank is filled up
                return f"rows of {n} in '{fmt.name}' are no multiple of {fmt.block_size}"
        return None

    def bound(self, scheme: Scheme, dtype: torch.dtype) -> float:
        """Return what codes do that fall on the other side of a tie, and sums in bf16.

        The reference stores the scales of activations in bf16, OpenVINO in fp32.
        """
        return 2e-2 if dtype == torch.bfloat16 else 1e-2

    def prepare(self, packed: PackedWeight, scheme: Scheme, dtype: torch.dtype) -> OpenVinoOperands:
        """Return a graph, which is compiled when tokens come."""
        graph = _Graph(packed, _group_of(scheme), work_dtype(dtype))
        _graphs[id(graph)] = graph
        number = torch.tensor(id(graph), device=packed.device)
        return OpenVinoOperands(graph, number, list(packed.tensors.values()))

    def linear(
        self, x: Tensor, operands: OpenVinoOperands, scheme: Scheme, bias: Tensor | None
    ) -> Tensor:
        """Return y (…, out) in the dtype of x (…, in)."""
        rows = flatten_tokens(x)
        text = write_scheme(scheme, 0)
        y = _openvino_linear(rows, operands.number, operands.tensors, text, bias)
        return finish(y, x, scheme, is_exact=x.dtype != torch.bfloat16)  # the bias is in

    def kept_nbytes(self, operands: OpenVinoOperands, packed: PackedWeight) -> int:
        """Return the bytes of the copy: codes as they are, scales in fp32."""
        return operands.graph.nbytes


@cache
def is_installed() -> bool:
    """Return whether OpenVINO is there."""
    return find_spec("openvino") is not None


def filled_rank(branch: Branch) -> int:
    """Return the rank of a graph's branch, filled up with zeros: whole blocks, and even.

    OpenVINO's bf16 product with an odd number of INT8 columns is wrong by a tenth.
    """
    fmt, rank = branch.weight_format, branch.rank
    if not isinstance(fmt, BlockFormat):
        return rank
    step = fmt.block_size if fmt.block_size and fmt.block_size < rank else 2
    return -(-rank // step) * step


def _is_integer(fmt: Format, *bits: int) -> bool:
    return isinstance(fmt, BlockFormat) and not fmt.element.is_float and fmt.bits in bits


def _fits(fmt: Format, group: int) -> bool:
    """Return whether blocks of a weight are cut by those of an activation without a rest."""
    return isinstance(fmt, BlockFormat) and (fmt.block_size or group) % group == 0


def _group_of(scheme: Scheme) -> int:
    """Return how many values of an activation share a scale beside a main weight; 0 for none."""
    fmt = scheme.weight_format
    groups = (group for group in _GROUPS if _fits(fmt, group))
    return next(groups, 0) if _is_integer(fmt, 4, 8) else 0


def _rounds_too_much(scheme: Scheme) -> bool:
    """Return whether a graph, which has one group size, would round what the scheme does not."""
    group, branch = _group_of(scheme), scheme.branch
    if not group or branch is None or not isinstance(branch.activation_format, CastFormat):
        return False
    return _fits(branch.weight_format, group)


class _Matrix(NamedTuple):
    """A matrix of a graph."""

    #: As they are stored, (rows, bytes).
    codes: Tensor
    #: What a block's codes are multiplied by, (rows, blocks, 1).
    scales: Tensor
    #: Of a code.
    bits: int

    @classmethod
    def of(cls, matrix: QTensor, rows: int = 0, columns: int = 0) -> "_Matrix":
        """Return a matrix with so many rows or 8-bit columns of zeros below or beside it."""
        fmt = matrix.format
        assert isinstance(fmt, BlockFormat)
        codes, scales = matrix.packed, fmt.code_scales(matrix)
        if rows or columns:
            codes = pad(codes, (0, columns, 0, rows))
            scales = pad(scales, (0, 0, 0, 0, 0, rows))
        return cls(codes, scales, fmt.bits)

    @property
    def nbytes(self) -> int:
        """Codes as they are stored, scales in fp32."""
        return self.codes.numel() + 4 * self.scales.numel()

    def constant(self) -> Any:
        """Return the codes, in the memory where they are, times the scales."""
        import openvino
        from openvino import opset13 as ops

        rows, blocks, _ = self.scales.shape
        n = self.codes.shape[1] * 8 // self.bits
        kind = openvino.Type.i4 if self.bits == 4 else openvino.Type.i8
        shape = openvino.Shape([rows, blocks, n // blocks])
        codes = ops.constant(openvino.Tensor(self.codes.numpy(), shape, kind), shared_memory=True)
        wide = ops.multiply(ops.convert(codes, "f32"), ops.constant(self.scales.numpy()))
        return ops.reshape(wide, [rows, n], False)


class _Graph:
    """A layer as OpenVINO runs it, compiled for the number of tokens that it saw last."""

    def __init__(self, packed: PackedWeight, group: int, dtype: torch.dtype) -> None:
        self._group, self._dtype, self._n_out = group, dtype, packed.shape[0]
        self._matrices = [_Matrix.of(packed.main)]
        if packed.branch is not None:
            assert packed.scheme.branch is not None
            more = filled_rank(packed.scheme.branch) - packed.scheme.branch.rank
            self._matrices.append(_Matrix.of(packed.branch.proj_down, rows=more))
            self._matrices.append(_Matrix.of(packed.branch.proj_up, columns=more))
        self._lock = threading.Lock()
        self._shape: tuple[int, bool] | None = None
        self._compiled: Any = None
        self._request: Any = None

    @property
    def nbytes(self) -> int:
        """Bytes of the copy: codes as they are stored, scales in fp32."""
        return sum(matrix.nbytes for matrix in self._matrices)

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return y (tokens, out) for x (tokens, in), both in the dtype of the graph."""
        y = x.new_empty((len(x), self._n_out))
        if not len(x):
            return y
        with self._lock:  # a request takes one call at a time
            if self._shape != (len(x), bias is not None):
                self._compile(len(x), with_bias=bias is not None)
            given = [x.contiguous(), *([] if bias is None else [bias.contiguous()])]
            for i, tensor in enumerate(given):
                self._request.set_input_tensor(i, _share(tensor))
            self._request.set_output_tensor(_share(y))
            self._request.infer()
            self._compiled.release_memory()  # of what lay between input and output
        return y

    def _compile(self, n_tokens: int, *, with_bias: bool) -> None:
        import openvino
        from openvino import opset13 as ops

        kind, codes = _kind(self._dtype), self._matrices[0]
        x = ops.parameter([n_tokens, codes.codes.shape[1] * 8 // codes.bits], kind)
        inputs, main, *branch = [x], *(matrix.constant() for matrix in self._matrices)
        wide = ops.convert(x, "f32")
        y = ops.matmul(wide, main, False, True)
        if branch:
            down, up = branch
            y = ops.add(y, ops.matmul(ops.matmul(wide, down, False, True), up, False, True))
        if with_bias:
            bias = ops.parameter([self._n_out], kind)
            inputs.append(bias)
            y = ops.add(y, ops.convert(bias, "f32"))
        options = {
            "INFERENCE_PRECISION_HINT": kind.get_type_name(),
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": str(self._group),
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "NUM_STREAMS": 1,
        }
        model = openvino.Model([ops.convert(y, kind)], inputs, "loraq")
        self._request = self._compiled = None  # before another copy of the weights is made
        self._compiled = _core().compile_model(model, "CPU", options)
        self._request = self._compiled.create_infer_request()
        self._shape = n_tokens, with_bias


@cache
def _core() -> Any:
    import openvino

    return openvino.Core()


def _kind(dtype: torch.dtype) -> Any:
    import openvino

    return openvino.Type.bf16 if dtype == torch.bfloat16 else openvino.Type.f32


def _share(tensor: Tensor) -> Any:
    """Return a tensor of OpenVINO in the memory of one of torch; numpy has no bf16."""
    import openvino

    if tensor.dtype == torch.bfloat16:
        raw = tensor.view(torch.int16).numpy()
        return openvino.Tensor(raw, openvino.Shape(tensor.shape), openvino.Type.bf16)
    return openvino.Tensor(tensor.numpy(), shared_memory=True)


# One opaque operator, so that a compiler does not look for tensors in OpenVINO's graph.
@library.custom_op("loraq::openvino_linear", mutates_args=())
def _openvino_linear(
    x: Tensor, number: Tensor, tensors: list[Tensor], scheme: str, bias: Tensor | None
) -> Tensor:
    """Return the layer's output (tokens, out) in its work dtype.

    Args:
        x: (tokens, in).
        number: of the graph.
        tensors: those of `PackedWeight.tensors`, for the gradient.
        scheme: by `write_scheme`, for the gradient.
        bias: (out).
    """
    dtype = work_dtype(x.dtype)
    graph, shift = _graphs[int(number)], None if bias is None else bias.to(dtype)
    if x.sum().isfinite():
        return graph.run(x.to(dtype), shift)
    # Rounding would make a number of a NaN; infinities saturate, as in every format of integers.
    y = graph.run(x.nan_to_num(0.0).to(dtype), shift)
    return y.masked_fill_(x.isnan().any(-1, keepdim=True), torch.nan)


@_openvino_linear.register_fake
def _(x: Tensor, number: Tensor, tensors: list[Tensor], scheme: str, bias: Tensor | None) -> Tensor:
    return x.new_empty((x.shape[0], len(tensors[0])), dtype=work_dtype(x.dtype))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, tensors, scheme, bias = inputs
    save_packed(ctx, (x, tensors, scheme, bias), output)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    back, *rest = packed_backward(ctx, gradient)
    return back, None, *rest


_openvino_linear.register_autograd(_backward, setup_context=_save)
