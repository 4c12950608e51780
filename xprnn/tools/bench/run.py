"""Time a layer on this machine and compare it with the same layer of other libraries."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from math import sqrt

from ...backend import Backend
from ...backend.cupy import CupyBackend
from ...backend.processors import processor_name, processors
from ...diagnostics.tolerances import LOW_PRECISION_DEVIATIONS, UNIT_ROUNDOFF, error_of, tolerance
from .. import info
from .clock import Function, measure, timer
from .peers import PEERS, installed, xprnn_peer
from .report import BenchReport, Row
from .task import Peer, PeerUnavailableError, Setting, Task, make_task

__all__ = ["PEERS", "DisagreementError", "PeerUnavailableError", "Setting", "agreement", "run"]

MAX_LIMIT = 0.5  # of an array's largest element: the largest difference accepted in any case


class DisagreementError(RuntimeError):
    """A peer's results differ from xprnn's, so that its times are not comparable."""


def run(setting: Setting, against: Sequence[str] | None = None) -> BenchReport:
    """Time a layer, forward and with its backward pass, interleaved with its peers.

    The peers get the same weights and the same x, and their results are compared first.

    :param against: names of `PEERS`; None: the installed ones. Peers that are not installed, or
        with None do not support the setting, are listed in the report.
    :raises PeerUnavailableError: a peer is named and installed but does not support the setting.
    :raises DisagreementError: a peer's results differ from xprnn's.
    :raises ValueError, BackendUnavailableError: as `make_task`.
    """
    task = make_task(setting)
    peers, lines = [xprnn_peer(task)], []
    for name in installed() if against is None else against:
        try:
            peers.append(PEERS[name](task))
        except PeerUnavailableError as error:
            if against is not None and name in installed():
                raise
            lines.append(f"not measured: {error}")
    agreed = [agreement(setting, peers[0], peer) for peer in peers[1:]]
    rows = _rows(peers, task)
    lines = [*(peer.note for peer in peers), *agreed, *lines, *_machine(task.layer.backend)]
    title = (
        f"{type(task.layer).__name__}({setting.input}, {setting.hidden}), {setting.cell}, "
        f"T={setting.steps} N={setting.batch}, {task.layer.arithmetic}"
    )
    return BenchReport(title, setting.steps, setting.batch, tuple(rows), tuple(lines))


def _rows(peers: Sequence[Peer], task: Task) -> list[Row]:
    calls: list[tuple[str, str, Function]] = []
    for what in ("forward", "with backward"):
        for peer in peers:
            function = peer.forward if what == "forward" else peer.both
            if function is not None:
                calls.append((what, peer.name, function))
    times = measure([function for *_, function in calls], timer(task.layer.backend))
    seconds = {(what, name): each for (what, name, _), each in zip(calls, times, strict=True)}
    return [Row(what, name, s, seconds[what, "xprnn"]) for (what, name), s in seconds.items()]


def agreement(setting: Setting, own: Peer, peer: Peer) -> str:
    """The largest difference of a peer's results from xprnn's; DisagreementError beyond the limit.

    Each may deviate by `tolerance`; a peer in low precision may also accumulate the gradients of
    its weights in it, with T more roundings.
    """
    width = max(setting.input + setting.hidden, setting.batch)
    limit = 2 * tolerance(setting.kind, steps=setting.steps, width=width, layers=1)
    if setting.kind in ("float16", "bfloat16"):
        limit += LOW_PRECISION_DEVIATIONS * UNIT_ROUNDOFF[setting.kind] * sqrt(setting.steps)
    limit = min(limit, MAX_LIMIT)
    errors = {name: error_of(array, own.results[name]) for name, array in peer.results.items()}
    worst = max(errors, key=lambda name: errors[name])
    if not all(error <= limit for error in errors.values()):
        raise DisagreementError(
            f"{peer.name}: its {worst} differs from xprnn's by {errors[worst]:.2g} of the largest "
            f"element, expected at most {limit:.2g}; it is not measured"
        )
    return (
        f"{peer.name}'s results: at most {errors[worst]:.1e} of the largest element from xprnn's, "
        f"in {worst} (limit {limit:.1e})"
    )


def _machine(backend: Backend) -> list[str]:
    """Lines that describe the machine and the versions."""
    versions = [f"{name} {text}" for name, text in info.versions().items() if "not " not in text]
    machine = f"{processor_name()}, {processors()} processors for this process, {platform.system()}"
    if isinstance(backend, CupyBackend):
        machine = f"{info.backends()[backend.name].removeprefix('usable: ')}; {machine}"
    return [f"machine: {machine}", f"versions: {', '.join(versions)}"]
