"""Recorded calls that wait for `backward`."""

from __future__ import annotations

import logging
from typing import Any

from .parameters import Parameters

_log = logging.getLogger("xprnn")


class Records(list[Any]):
    """The recorded calls of one module, oldest first; all that can be used are of one version.

    A record has a `version`, that of the parameters it was made with.

    :param many: the number of waiting calls at which one line is logged, once; None: at none.
    """

    def __init__(self, many: int | None) -> None:
        super().__init__()
        self._many = many
        self._dropped = False  # whether calls before the first of these were dropped

    def waiting(self, version: int) -> int:
        """How many of them `backward` can use with the parameters of this version."""
        return len(self) if self and self[-1].version == version else 0

    def drop_older(self, version: int) -> None:
        """Drop, before a call is recorded, those made with other parameters than it will be."""
        if not self:
            self._dropped = False
        elif self[-1].version != version:
            self._dropped = True
            super().clear()

    def add(self, record: Any, owner: str) -> None:
        """Add the record of a call of `owner`."""
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
        """The record that `backward` would undo; it stays where it is.

        :param owner: what the calls were calls of, for the message.
        :raises RuntimeError: there is none, or it cannot be undone any more.
        """
        if not self and not self._dropped:
            raise RuntimeError(
                "backward: there is no recorded call to undo; call train() first, then the "
                f"{owner}, then backward once per call"
            )
        parameters.refuse_open("backward")
        if not self or self[-1].version != parameters.version:
            raise RuntimeError(
                "backward: the parameters were changed after the call that would be undone; its "
                "gradients would be wrong. Undo calls before changing parameters, or drop them "
                "with eval()"
            )
        return self[-1]
