"""Find stacked experts: the matrices of a mixture of experts in one parameter of three axes."""

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Stack:
    """How a parameter holds the matrices of experts."""

    #: (experts, out, in).
    shape: tuple[int, ...]
    #: Whether the parameter has the axes (experts, in, out) instead, as `x @ weight` needs them.
    transposed: bool

    @classmethod
    def of(cls, weight: Tensor, *, transposed: bool) -> "Stack":
        """Describe a parameter."""
        n_experts, rows, columns = weight.shape
        matrix = (columns, rows) if transposed else (rows, columns)
        return cls((n_experts, *matrix), transposed)


def stacks_in(module: nn.Module) -> dict[str, Stack]:
    """Return the stacks among a module's own parameters by their names in it, in that order.

    Nothing on a parameter says what it is: its owner multiplies with it as it likes. Two things
    are enough to know. Experts of transformers say whether they are `is_transposed`. And where a
    gate is fused, the shapes leave one reading: what the first stack puts out is twice what the
    second one takes in, and what the second puts out is what the first takes in. All else, such as
    tables of three axes, is no stack.
    """
    found = {
        name: parameter
        for name, parameter in sorted(module._parameters.items())
        if parameter is not None
        and parameter.dim() == 3
        and parameter.is_floating_point()
        and min(parameter.shape) > 0
    }
    declared = getattr(module, "is_transposed", None)
    if isinstance(declared, bool) and hasattr(module, "_apply_gate"):
        return {name: Stack.of(weight, transposed=declared) for name, weight in found.items()}
    if len(found) != 2:
        return {}
    transposed = _read_gate(*found.values())
    if transposed is None:
        return {}
    return {name: Stack.of(weight, transposed=transposed) for name, weight in found.items()}


def _read_gate(first: Tensor, second: Tensor) -> bool | None:
    """Return whether two stacks, the gated one first or second, are transposed; `None` for none."""
    for up, down in ((first, second), (second, first)):
        n_experts, rows, columns = up.shape
        if down.shape == (n_experts, columns, rows // 2) and rows % 2 == 0:
            return False
        if down.shape == (n_experts, columns // 2, rows) and columns % 2 == 0:
            return True
    return None
