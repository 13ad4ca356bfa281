"""What the processes of a run tell each other: plain data by key, in a store of torch.distributed.

A store is small and knows no collectives: keys are written once, counters are added to. The one of
torchrun is used where there is one; `--workers` has its own on the loopback, where other users of
the machine could write to it: so each value is sealed with a secret that only this run has.
"""

import hmac
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch.distributed

from loraq.errors import MissingLibraryError, RankError

#: Seconds between two signs of life.
_BEAT = 1.0
#: Seconds between two looks for a key that is not there yet.
_LOOK = 0.05
#: Most characters of one value: a store takes 8 MiB.
_PIECE = 4 * 2**20
#: On Windows torch is built without.
_USES_LIBUV = sys.platform != "win32"
#: Without types: what stores there are depends on how torch was built.
_distributed: Any = torch.distributed


@dataclass(frozen=True)
class Address:
    """Where the store of a run is; a worker process is started with it."""

    host: str
    port: int
    #: What the keys of the run begin with.
    prefix: str
    #: Seals what is written; empty on a cluster, whose network is trusted as torch trusts it.
    secret: bytes = field(default=b"", repr=False)

    def connect(self, *, n_ranks: int | None = None, serve: bool = False) -> "Board":
        """Return the board there.

        Args:
            n_ranks: how many are waited for, the one that serves included; `None` waits for nobody.
            serve: whether this process keeps the store.

        Raises:
            RankError: nobody is there within five minutes.
        """
        try:
            store = _distributed.TCPStore(
                self.host,
                self.port,
                n_ranks,
                serve,
                wait_for_workers=n_ranks is not None,
                multi_tenant=serve,
                use_libuv=_USES_LIBUV,
            )
        except RuntimeError as error:
            raise RankError(
                f"The ranks cannot meet at {self.host}:{self.port}: {error}. All of them must be "
                "started at about the same time, with the address of one machine that all reach "
                "(MASTER_ADDR, MASTER_PORT)."
            ) from error
        return Board(_distributed.PrefixStore(self.prefix, store), self.secret)


def open_on_loopback() -> tuple[Address, "Board"]:
    """Return a new board that this machine alone can reach, and where it is."""
    # The backend without libuv takes no socket of ours; it listens on every address.
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    address = Address("127.0.0.1", port, "loraq", secrets.token_bytes())
    if not _USES_LIBUV:
        listener.close()
        return address, address.connect(serve=True)
    store = _distributed.TCPStore(
        "127.0.0.1", port, None, True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    return address, Board(_distributed.PrefixStore("loraq", store), address.secret)


def require_distributed() -> None:
    """Raise `MissingLibraryError` if torch was built without what several processes need."""
    if not torch.distributed.is_available():
        raise MissingLibraryError(
            "Several workers share the layers by torch.distributed, which this build of torch does "
            "not have. Use one worker, or a build that has it."
        )


class Board:
    """Values and counters that all processes of a run see.

    Every method raises `RankError` when the store has gone.
    """

    def __init__(self, store: Any, secret: bytes) -> None:
        """Wrap a store."""
        self._store, self._secret = store, secret

    def write(self, key: str, value: Any) -> None:
        """Write plain data under a key that nobody else writes to."""
        text = json.dumps(value)
        pieces = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
        with _explain_loss():
            for i, piece in enumerate(pieces[1:], start=1):
                self._store.set(f"{key}#{i}", piece)
            # The first piece last: when it is there, all are.
            self._store.set(key, f"{self._seal(key, text)} {len(pieces)} {pieces[0]}")

    def has(self, key: str) -> bool:
        """Return whether something stands under a key."""
        with _explain_loss():
            return bool(self._store.check([key]))

    def read(self, key: str) -> Any:
        """Return what stands under a key, once it is there.

        Raises:
            RankError: another program wrote it.
        """
        while not self.has(key):
            time.sleep(_LOOK)
        try:
            with _explain_loss():
                seal, n_pieces, text = self._store.get(key).decode().split(" ", 2)
                others = [f"{key}#{i}" for i in range(1, int(n_pieces))]
                if others and not self._store.check(others):  # they are written first
                    raise ValueError(others)
                text += "".join(self._store.get(other).decode() for other in others)
            if not hmac.compare_digest(seal.encode(), self._seal(key, text).encode()):
                raise ValueError(seal)
            return json.loads(text)
        except ValueError as error:
            raise RankError(
                "Another program has written into the store by which the workers share layers. "
                "Run the same command again, with one worker if it happens again."
            ) from error

    def count(self, key: str, by: int = 1) -> int:
        """Add to a counter, and return what it has become."""
        with _explain_loss():
            return int(self._store.add(key, by))

    def _seal(self, key: str, text: str) -> str:
        return hmac.digest(self._secret, f"{key} {text}".encode(), "sha256").hex()


@contextmanager
def _explain_loss() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            "The store by which the ranks share layers has gone, and with it the process that "
            "kept it: rank 0, or torchrun on its machine."
        ) from error


class Pulse:
    """Signs of life of this process, each second; and its end when the run fails elsewhere."""

    def __init__(self, board: Board) -> None:
        """Watch over the run of a board."""
        self._board = board
        self._closed = threading.Event()
        #: The counter that shows that the job at hand is not lost; "" for none.
        self.key = ""

    def __enter__(self) -> Self:
        """Begin."""
        threading.Thread(target=self._beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """End."""
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(_BEAT):
            try:
                if key := self.key:
                    self._board.count(key)
                failed = has_failed(self._board)
            except RankError:
                failed = True
            if failed and not self._closed.wait(_BEAT):  # who has failed can say so first
                os._exit(1)


def has_failed(board: Board) -> bool:
    """Return whether a process of the run has ended with an error."""
    return board.count("failed", 0) > 0
