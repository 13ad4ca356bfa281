"""What a user may ask of an export beside the target, and which target has no such thing."""

from dataclasses import dataclass

import torch

from loraq.errors import ExportError
from loraq.exports.target import Target
from loraq.safetensors.layout import DEFAULT_SHARD_BYTES
from loraq.targets import limits_of


@dataclass(frozen=True)
class Options:
    """What a user asks for; `None` leaves it to the target."""

    pad_rank: bool = False
    allow_dense: bool = False
    dtype: str | None = None
    shard_bytes: int | None = None

    def require_sense(self, kind: type[Target]) -> None:
        """Require that a target has what is asked for.

        Raises:
            ExportError: it has not; the message says what it has.
        """
        name = kind.about.name
        if self.dtype is not None and self.dtype not in Target.dtypes:
            raise ExportError(f"Dtype '{self.dtype}' is none of {', '.join(Target.dtypes)}.")
        if self.dtype is not None and self.dtype not in kind.dtypes:
            raise ExportError(
                f"Target '{name}' holds its floats in {' or '.join(kind.dtypes)}, and not in "
                f"'{self.dtype}'. Use `--dtype {kind.dtypes[0]}`, or leave it out."
            )
        if self.pad_rank and not limits_of(name).one_rank:
            raise ExportError(
                f"Target '{name}' takes another rank in each layer, and `--pad-rank` fills up for "
                "targets that need one. Leave it out."
            )
        if self.shard_bytes is not None and kind.one_file:
            raise ExportError(
                f"Target '{name}' has one weight file, '{kind.one_file}', and `--shard-size` is "
                "for targets that have several. Leave it out."
            )

    def dtype_for(self, kind: type[Target]) -> torch.dtype | None:
        """Return the dtype of all floats; `None` for a target that takes those of the source."""
        only = kind.dtypes[0] if len(kind.dtypes) == 1 else None
        name = self.dtype or only
        found: torch.dtype | None = getattr(torch, name) if name else None
        return found

    @property
    def largest_file(self) -> int:
        """Bytes of a weight file where there may be several."""
        return self.shard_bytes or DEFAULT_SHARD_BYTES
