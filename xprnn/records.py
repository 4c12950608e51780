"""Recorded calls that wait for `backward`."""

from __future__ import annotations

from typing import Any

from .parameters import Parameters


class Records(list[Any]):
    """The recorded calls of one module, oldest first.

    A record has a `version`, that of the parameters it was made with.
    """

    def last(self, owner: str, parameters: Parameters) -> Any:
        """The record that `backward` would undo; it stays where it is.

        :param owner: what the calls were calls of, for the message.
        :raises RuntimeError: there is none, or it cannot be undone any more.
        """
        if not self:
            raise RuntimeError(
                "backward: there is no recorded call to undo; call train() first, then the "
                f"{owner}, then backward once per call"
            )
        parameters.refuse_open("backward")
        record = self[-1]
        if record.version != parameters.version:
            raise RuntimeError(
                "backward: the parameters were changed after the call that would be undone; its "
                "gradients would be wrong. Undo calls before changing parameters, or drop them "
                "with eval()"
            )
        return record
