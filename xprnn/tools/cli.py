"""The command line: `xprnn demo`, `run`, `verify`, `qualify`, `bench` and `info`."""

from __future__ import annotations

import argparse
import runpy
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .. import __version__
from ..cells.definition import Definition
from ..diagnostics.verification.suite import LAYERS, PRECISIONS, verify_cells
from . import apply, demo, info
from .bench import run as bench
from .output import line_console, show, standard_output

if TYPE_CHECKING:
    from rich.progress import TaskID

ERRORS = (ValueError, TypeError, KeyError, OSError, RuntimeError, MemoryError)
TERMINATING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 on an error, 130 if interrupted."""
    # raise on these signals, so that unfinished files are removed; respect nohup's SIG_IGN
    handled = [number for number in TERMINATING if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _terminate) for number in handled}
    try:
        with standard_output():
            options = _parser().parse_args(arguments)
            options.command(options)
    except ERRORS as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        _print_error(f"error: {' '.join(str(text or type(error).__name__).split())}")
        return 1
    except KeyboardInterrupt:
        _print_error("interrupted")
        return 130
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def _terminate(number: int, frame: object) -> NoReturn:
    _print_error(f"terminated by {signal.Signals(number).name}")
    raise SystemExit(128 + number)


def _print_error(text: str) -> None:
    with suppress(OSError):  # stderr may be closed; the exit status reports the failure too
        print("xprnn:", text, file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"xprnn: error: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="xprnn", description="Recurrent layers without torch.")
    parser.add_argument("--version", action="version", version=f"xprnn {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("demo", help="train a layer to distinguish nine speakers")
    train.add_argument("--backend", help="numpy, cupy, cupy:N or auto")
    train.add_argument("--cell", choices=sorted(demo.LAYERS), default="gru")
    train.add_argument("--epochs", type=_positive, default=40, metavar="N")
    train.add_argument("--seed", type=int, default=0, metavar="N")
    train.add_argument("--out", type=Path, default=Path("xprnn-demo"), metavar="DIR")
    train.set_defaults(command=_demo)

    _add_run(commands.add_parser("run", help="apply a saved layer to an array on disk"))
    _add_verify(commands.add_parser("verify", help="check every kernel on this machine"))
    _add_qualify(commands.add_parser("qualify", help="compare and time every kernel, for auto"))
    _add_bench(commands.add_parser("bench", help="time a layer and those of other libraries"))
    details = commands.add_parser("info", help="versions, backends, devices, compiled kernels")
    details.add_argument("--warm", action="store_true", help="compile the CPU's kernels now")
    details.set_defaults(command=_info)
    return parser


def _add_run(run: argparse.ArgumentParser) -> None:
    run.add_argument("model", metavar="MODEL.safetensors", help="a layer written by save()")
    run.add_argument("x", metavar="X.npy", help="(T, N, I), batch first (N, T, I), or (T, I)")
    run.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="Y.npy",
        help="the last layer's output at every step, both directions concatenated: (T, N, D*H), "
        "in the layout of X, zero after the end of a row",
    )
    run.add_argument("--lengths", metavar="L.npy", help="(N,) integers: the steps of each row")
    run.add_argument(
        "--last",
        action="store_true",
        help="write each row's final state, (N, D*H), instead of every step's output",
    )
    run.add_argument(
        "--readout",
        metavar="READOUT.safetensors",
        help="a saved Linear: write its K scores of the D*H features",
    )
    run.add_argument(
        "--labels",
        metavar="Z.npy",
        help="(N,) integers from 0 to K-1: print the accuracy of the largest score; requires "
        "--readout and --last",
    )
    run.add_argument(
        "--batch", type=_positive, default=64, metavar="N", help="rows per batch, 64 by default"
    )
    run.add_argument("--backend", help="numpy, cupy, cupy:N or auto")
    run.set_defaults(command=_run)


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument("--backend", help="numpy, cupy, cupy:N or auto")
    for flag, names in (("--cell", LAYERS), ("--dtype", PRECISIONS)):
        verify.add_argument(flag, nargs="+", choices=[*names], metavar="NAME", help=_among(names))
    verify.set_defaults(command=_verify)


def _add_qualify(qualify: argparse.ArgumentParser) -> None:
    qualify.add_argument("--backend", help="numpy, cupy, cupy:N or auto")
    qualify.add_argument(
        "--cell", nargs="+", choices=[*LAYERS], metavar="NAME", help=_among(LAYERS)
    )
    qualify.add_argument(
        "--quick", action="store_true", help="less than a minute: fewer types and sizes"
    )
    qualify.add_argument(
        "-o", "--output", metavar="FILE", help="in the user's cache folder by default"
    )
    qualify.add_argument(
        "--share",
        metavar="DIR",
        help="also write a copy of the file and a table there, without names of host or user",
    )
    qualify.set_defaults(command=_qualify)


def _add_bench(timing: argparse.ArgumentParser) -> None:
    usual = bench.Setting()
    timing.add_argument(
        "--cell",
        type=_cell,
        default=usual.cell,
        metavar="NAME",
        help=f"{_among(LAYERS)}; or FILE.py:NAME, what xprnn.cell makes in a file, which is run",
    )
    timing.add_argument(
        "--dtype",
        choices=[*PRECISIONS],
        default=usual.kind,
        metavar="NAME",
        help=_among(PRECISIONS),
    )
    for flag, letter, number in (
        ("--hidden", "H", usual.hidden),
        ("--batch", "N", usual.batch),
        ("--steps", "T", usual.steps),
    ):
        timing.add_argument(
            flag, type=_positive, default=number, metavar=letter, help=f"{number} by default"
        )
    timing.add_argument("--input", type=_positive, metavar="I", help="equal to --hidden by default")
    timing.add_argument("--backend", help="numpy, cupy, cupy:N or auto")
    timing.add_argument(
        "--against", type=_peers, metavar="NAMES", help=f"any of {','.join(bench.PEERS)}"
    )
    timing.set_defaults(command=_bench)


def _among(names: Iterable[str]) -> str:
    return ", ".join(names)


def _cell(text: str) -> str:
    if text not in LAYERS and not text.rpartition(":")[0].endswith(".py"):
        raise argparse.ArgumentTypeError(
            f"expected {', '.join(LAYERS)} or FILE.py:NAME, got {text!r}"
        )
    return text


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected an integer from 1, got {text!r}")
    return int(text)


def _peers(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in bench.PEERS]:
        expected = " or ".join(bench.PEERS)
        raise argparse.ArgumentTypeError(f"expected {expected}, got {', '.join(unknown)!r}")
    return list(dict.fromkeys(names))


def _demo(options: argparse.Namespace) -> None:
    with _progress(
        "training", "loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.1%}"
    ) as bar:
        outcome = demo.run(
            options.cell,
            options.epochs,
            options.seed,
            options.backend,
            options.out,
            lambda epoch, loss, accuracy: bar(epoch, options.epochs, loss=loss, accuracy=accuracy),
        )
    names = "model.safetensors and readout.safetensors"
    print(f"saved, loaded again and compared: {names} in {outcome.folder}")
    print(
        f"trained on {outcome.backend} in {outcome.seconds:.1f} s, "
        f"{outcome.utterances_per_second:.0f} utterances per second"
    )
    print(f"test accuracy {100 * outcome.accuracy:.1f} %")


def _run(options: argparse.Namespace) -> None:
    inputs = apply.Inputs(
        options.model, options.x, options.lengths, options.readout, options.labels
    )
    with _progress("rows") as bar:
        written = apply.apply(
            inputs,
            options.output,
            last=options.last,
            batch=options.batch,
            backend=options.backend,
            report=bar,
        )
    print(f"wrote {options.output}: {' x '.join(map(str, written.shape))}")
    if written.accuracy is not None:
        print(f"accuracy {100 * written.accuracy:.1f} %")


def _verify(options: argparse.Namespace) -> None:
    with _progress("layers") as bar:
        report = verify_cells(options.backend, options.cell or LAYERS, options.dtype, bar)
    show(report)
    if not report.ok:
        names = ", ".join(
            f"{row.cell} ({row.implementation}, {row.check})" for row in report.failed
        )
        raise RuntimeError(f"{len(report.failed)} of {len(report.rows)} checks failed: {names}")


def _qualify(options: argparse.Namespace) -> None:
    from ..diagnostics.qualifying.run import check_outputs, measure, write

    check_outputs(options.output, options.share)
    with _progress("qualifying", "at most {task.fields[left]:.0f} s left") as bar:
        report = measure(
            options.backend,
            options.cell,
            quick=options.quick,
            progress=lambda done, total, left: bar(done, total, left=left),
        )
    show(report)
    if report.qualification is None:
        return
    path = write(report, options.output, options.share).path
    print(f"wrote {path}" + (f"; XPRNN_QUALIFIED={path} selects by it" if options.output else ""))
    if not report.ok:
        names = sorted({f"{row.cell} ({row.implementation}, {row.dtype})" for row in report.failed})
        raise RuntimeError(f"kernels failed and are not selected: {', '.join(names)}")


def _bench(options: argparse.Namespace) -> None:
    setting = bench.Setting(
        options.cell if options.cell in LAYERS else _definition(options.cell),
        options.hidden,
        options.input or options.hidden,
        options.batch,
        options.steps,
        options.dtype,
        options.backend,
    )
    show(bench.run(setting, options.against))


def _definition(text: str) -> Definition:
    """The definition at FILE.py:NAME; the file is run."""
    path, _, name = text.rpartition(":")
    definition = runpy.run_path(path).get(name)
    if not isinstance(definition, Definition):
        raise ValueError(f"{path}: has no definition of a cell {name!r}")
    return definition


@contextmanager
def _progress(what: str, fields: str = "") -> Iterator[Callable[..., None]]:
    """A progress bar that appears at its first update, `bar(done, total, **fields)`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = TextColumn(what), BarColumn(), MofNCompleteColumn(), TextColumn(fields)
    progress = Progress(*columns, console=line_console())
    tasks: list[TaskID] = []

    def bar(done: int, total: int, **values: Any) -> None:
        if not tasks:
            tasks.append(progress.add_task(what, **values))
            progress.start()
        progress.update(tasks[0], completed=done, total=total, **values)

    try:
        yield bar
    finally:
        if tasks:
            progress.stop()


def _info(options: argparse.Namespace) -> None:
    from rich.table import Column, Table
    from rich.text import Text

    sections = {
        "package": info.versions,
        "extra": info.extras,
        "backend": info.backends,
        "this copy": info.installation,
    }
    for title, section in sections.items():
        table = Table(Column(title, no_wrap=True), "value", box=None)
        for name, text in section().items():
            table.add_row(name, Text(text))
        show(table)
    if options.warm:
        _warm()


def _warm() -> None:
    """Compile every CPU kernel that is not in Numba's cache on disk yet."""
    from ..kernels.numba.package import compilations

    pending = compilations()
    with _progress("compiled") as bar:
        for done, compilation in enumerate(pending, 1):
            compilation()
            bar(done, len(pending))
    print(f"{len(pending)} kernels for the CPU are compiled")
