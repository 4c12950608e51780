"""Recorded calls that wait for `backward`."""

from __future__ import annotations

import logging
from typing import Any

from .parameters import Parameters

_log = logging.getLogger("xprnn")


class RecordedCalls(list[Any]):
    """The recorded calls of one module, oldest first; all usable ones have the same version.

    Each has a `version`: that of the parameters it was computed with.

    :param many: the number of waiting calls at which a warning is logged, once; None: never.
    """

    def __init__(self, many: int | None) -> None:
        super().__init__()
        self._many = many
        self._dropped = False  # whether calls older than the first of these were dropped

    def waiting(self, version: int) -> int:
        """How many calls `backward` can use with parameters of this version."""
        return len(self) if self and self[-1].version == version else 0

    def drop_older(self, version: int) -> None:
        """Before a call is recorded, drop those computed with another version of the parameters."""
        if not self:
            self._dropped = False
        elif self[-1].version != version:
            self._dropped = True
            super().clear()

    def add(self, record: Any, owner: str) -> None:
        """Append a recorded call of `owner`, the name of a module's class."""
        self.append(record)
        if len(self) == self._many:
            self._many = None
            _log.warning(
                "%s: %d recorded calls wait for backward(), and each keeps its memory; call "
                "backward() once for each, or eval() before calls that need no gradient",
                owner,
                len(self),
            )

    def clear(self) -> None:
        """Drop all of them."""
        super().clear()
        self._dropped = False

    def last(self, owner: str, parameters: Parameters) -> Any:
        """The recorded call that `backward` uses next; it is not removed.

        :param owner: the name of the module's class, for the error message.
        :raises RuntimeError: there is none, or the parameters have changed since.
        """
        if not self and not self._dropped:
            raise RuntimeError(
                "backward: there is no recorded call; call train() first, then the "
                f"{owner}, then backward once per call"
            )
        parameters.check_not_in_writable_block("backward")
        if not self or self[-1].version != parameters.version:
            raise RuntimeError(
                "backward: the parameters were changed after the call, so its gradients would be "
                "wrong. Call backward before changing parameters, or drop recorded calls with "
                "eval()"
            )
        return self[-1]
