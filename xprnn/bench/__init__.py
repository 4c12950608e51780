"""How fast a layer is on this machine, beside the same layer of other libraries."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

from .. import info
from ..backend import Backend
from ..backend.cupy import CupyBackend
from ..processors import processors
from ..tolerances import NARROW_DEVIATIONS, UNIT_ROUNDOFF, error_of, tolerance
from .clock import Function, measure, timer
from .peers import PEERS, installed, ours
from .report import BenchReport, Row
from .task import Peer, PeerUnavailableError, Setting, Task, make_task

__all__ = ["PEERS", "DisagreementError", "PeerUnavailableError", "Setting", "agreement", "run"]

MOST = 0.5  # of an array's largest element: no two libraries that agree are further apart


class DisagreementError(RuntimeError):
    """A peer computes something else than xprnn, so that its time means nothing."""


def run(setting: Setting, against: Sequence[str] | None = None) -> BenchReport:
    """Measure a layer, forward and with its backward pass, and its peers in turns with it.

    The peers get the same weights and the same x, and first have to find the same results.

    :param against: names of `PEERS`, of which the report says so where one is not installed;
        None: those that are installed, but for those that have no such layer here, which the
        report then says.
    :raises PeerUnavailableError: a peer that is named and installed cannot be measured.
    :raises DisagreementError: a peer's results are not xprnn's.
    :raises ValueError, BackendUnavailableError: as `make_task`.
    """
    task = make_task(setting)
    peers, lines = [ours(task)], []
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
    found = {(what, who): each for (what, who, _), each in zip(calls, times, strict=True)}
    return [Row(what, who, each, found[what, "xprnn"]) for (what, who), each in found.items()]


def agreement(setting: Setting, mine: Peer, peer: Peer) -> str:
    """How far a peer's results lie from xprnn's; DisagreementError if further than rounding goes.

    Each may be wrong by `tolerance`; a peer in a narrow dtype may add up its weights' gradients
    in it too, T roundings more.
    """
    width = max(setting.input + setting.hidden, setting.batch)
    limit = 2 * tolerance(setting.kind, steps=setting.steps, width=width, layers=1)
    if setting.kind in ("float16", "bfloat16"):
        limit += NARROW_DEVIATIONS * UNIT_ROUNDOFF[setting.kind] * sqrt(setting.steps)
    limit = min(limit, MOST)
    errors = {name: error_of(array, mine.results[name]) for name, array in peer.results.items()}
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
    """The lines that say on which machine and with which versions this ran."""
    versions = [f"{name} {found}" for name, found in info.versions().items() if "not " not in found]
    place = f"{_processor()}, {processors()} processors for this process, {platform.system()}"
    if isinstance(backend, CupyBackend):
        place = f"{info.backends()[backend.name].removeprefix('usable: ')}; {place}"
    return [f"machine: {place}", f"versions: {', '.join(versions)}"]


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
