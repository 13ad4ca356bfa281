"""One forward as a program: what it computes of nothing is torch's own numbers."""

import torch
from torch import nn

from loraq.exports.trace import trace


class Embedding(nn.Module):
    """A timestep's sines, as diffusers makes them, and a layer behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8, device="meta")

    def forward(self, timestep, return_dict=True):
        frequencies = torch.exp(-9.21 * torch.arange(16, dtype=torch.float32) / 16)
        angles = timestep[:, None] * frequencies[None]
        ones = torch.ones(timestep.shape[0], 1)  # of a size that is not known
        return (self.layer(torch.cat((angles.sin(), angles.cos()), 1) * ones),)


def test_tables_are_those_of_torch():
    program = trace(Embedding(), {"timestep": torch.ones(2)}, {})
    (table,) = program.constants.values()
    assert torch.equal(table, torch.exp(-9.21 * torch.arange(16, dtype=torch.float32) / 16)[None])
    names = [str(node.target) for node in program.graph.nodes]
    assert not any("exp" in name and "expand" not in name for name in names)
    assert not any("arange" in name for name in names)
    assert "table_0" in names
    program.graph.lint()
