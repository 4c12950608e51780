"""Compare layers of definitions with built-in layers, torch loops and the matrix products alone.

    python -m benchmarks.definitions_report [--parts PART ...] [--rounds 51] [--out FOLDER]
    python -m benchmarks.definitions_report --docs

The first measures on one thread, in float32, and writes definitions.json to FOLDER, by default
benchmarks/results/<machine>/, where the parts that are not measured stay as they are; with --cells
or --shapes it writes only with --out. The second writes the tables of docs/performance.md from the
recorded reports.

A figure is the median of the rounds' ratios, time of one / time of the other, with its 95 %
interval from order statistics; in each round all that a row compares are sampled in turn, and a
sample is the least processor time of the calls of 20 ms. The torch loop does the cell's operations
step by step, with one product per read of a state and with the same masks drawn, and its gradients
are autograd's. `torch.compile` of the loop runs in its own process, which has --limit seconds for
each cell; most of them pass while it compiles. The products alone are NumPy's; "sums" is a cell of
as many gates whose state is the sum of its products, by the same compiled products as the others.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .cpu_report import _shape
from .reports import Report, check_fields, check_writable, read_all, slug, write, write_section
from .result_store import processor, versions

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
NAME = "definitions.json"
MARKS = (
    "<!-- definitions: `python -m benchmarks.definitions_report --docs` writes this -->",
    "<!-- end of definitions -->",
)
SMALL, LARGE = (128, 8, 64, 64), (64, 32, 256, 256)  # T, N, I, H
FORWARD_SHAPES = (SMALL, (64, 32, 128, 128), (128, 1, 128, 128))
BASE = {  # the built-in layer beside which each is timed, per gate
    "li_gru": "gru",
    "peephole_lstm": "lstm",
    "recurrent_dropout": "lstm",
    "zoneout": "lstm",
    "layer_norm_lstm": "lstm",
    "slstm": "lstm",
    "gru_reset_before": "gru",
}
MASKED = ("recurrent_dropout", "zoneout")
TURN = 0.02  # processor seconds of a sample
PARTS = ("training", "compiled", "forward", "keras")
FIELDS = {
    **dict.fromkeys(("machine", "versions", "commits"), (dict,)),
    **dict.fromkeys(PARTS, (list,)),
    "date": (str,),
    "rounds": (int,),
}
Call = Callable[[], object]
Ratio = tuple[float, float, float]  # the lower bound, the median and the upper bound


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.definitions_report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--cells", nargs="+", choices=BASE, default=[*BASE])
    parser.add_argument("--shapes", nargs="+", type=_shape, default=[SMALL, LARGE])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=51)
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for torch.compile")
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("--docs", action="store_true", help="write the tables of docs instead")
    parser.add_argument("--compile", choices=BASE, help=argparse.SUPPRESS)  # in its own process
    options = parser.parse_args(arguments)
    if options.docs:
        write_section(ROOT / "docs" / "performance.md", MARKS, section(stored(RESULTS)))
        return 0
    if options.rounds < 1:
        parser.error("--rounds: expected a positive number")
    if find_spec("numba") is None:
        parser.error("Numba is not installed, and the report is of its code")
    if options.compile:
        print(json.dumps(compiled(options.compile, options.shapes[0], options.rounds)))
        return 0
    report = measured(options)
    complete = options.cells == [*BASE] and options.shapes == [SMALL, LARGE]
    folder = options.out or (RESULTS / slug(report["machine"]["name"]) if complete else None)
    if folder and (folder / NAME).exists():
        report = merged(json.loads((folder / NAME).read_text("utf-8")), report)
    print(section([report]))
    if folder:
        check_writable(folder)
        write(folder, {NAME: json.dumps(report, indent=1)})
    return 0


def one_thread() -> None:
    """Limit every library to one thread; it must come before NumPy's import."""
    for library in ("OMP", "OPENBLAS", "MKL", "NUMBA"):
        os.environ[f"{library}_NUM_THREADS"] = "1"


def measured(options: argparse.Namespace) -> Report:
    from tests.support.machine import commit

    cells, shapes, rounds = options.cells, options.shapes, options.rounds
    small, parts = shapes[0], {part: list[Report]() for part in PARTS}
    for part in options.parts:
        if part == "training":
            rows = [training_row(cell, shape, rounds) for shape in shapes for cell in cells]
        elif part == "compiled":
            rows = [compiled_row(cell, small, rounds, options.limit) for cell in cells]
        elif part == "forward":
            chosen = FORWARD_SHAPES if SMALL in shapes else shapes
            rows = [forward_row(shape, rounds) for shape in chosen]
        else:
            rows = [keras_row(small, rounds)]
        parts[part] = rows
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"name": f"{processor()}, {os.cpu_count()} cores"},
        "versions": versions(("numpy", "numba", "torch", "onnxruntime")),
        "commits": dict.fromkeys(options.parts, commit(ROOT)),
        "rounds": rounds,
        **parts,
    }


def merged(stored: Report, report: Report) -> Report:
    """A report with the parts of the stored one that it does not have, of the same versions."""
    check_report(stored)
    if stored["versions"] != report["versions"]:
        raise SystemExit(f"the stored parts are of other versions: {stored['versions']}")
    kept = {part: stored[part] for part in PARTS if part not in report["commits"]}
    rounds = min(stored["rounds"], report["rounds"])
    commits = {**stored["commits"], **report["commits"]}
    return {**report, **kept, "rounds": rounds, "commits": commits}


# -- calls


def task_of(cell: str, shape: Sequence[int]) -> Any:
    """The layer and the inputs; `cell` is a key of `BASE` or a built-in cell."""
    from tests.support.definitions import PAPERS
    from xprnn.cell_definitions import peephole_lstm
    from xprnn.tools.bench.task import Setting, make_task

    T, N, width, H = shape
    definitions = {**PAPERS, "peephole_lstm": peephole_lstm}
    definition = sums(int(cell[-1])) if cell.startswith("sums") else definitions.get(cell, cell)
    task = make_task(Setting(definition, H, width, N, T, backend="numpy"))
    for name, value in task.layer.parameters.items():
        if name.startswith("a"):  # the gains of a norm
            task.layer.parameters[name] = 1 + 0 * value
    return task


def sums(count: int) -> Any:
    """The cell of `count` gates whose state is the sum of its products."""
    import xprnn

    names = tuple([f"g{k}" for k in range(count)])

    def step(f: Any, x: Any, s: Any) -> Any:
        products = f.recurrent(s.h)
        values = [getattr(x, name) + getattr(products, name) for name in names]
        return sum(values[1:], start=values[0]) * 0.1  # bounded

    return xprnn.cell(gates=names)(step)


def gates(task: Any) -> int:
    """The number of gates, of which the rows of W_ih are the blocks."""
    return int(len(task.weights["weight_ih_l0"]) // task.setting.hidden)


def training(task: Any) -> Call:
    """Forward and backward in train mode, with the gradients of x and of every weight."""
    layer = task.layer.train()

    def call() -> object:
        layer.zero_grad()
        layer(task.x)
        return layer.backward(task.doutput)

    return call


def torch_loop(task: Any, wrap: Callable[[Any], Any] = lambda loop: loop) -> Call:
    """The same by a loop over the definition's operations in torch, and its autograd.

    :param wrap: of the loop, such as `torch.compile`.
    """
    import torch
    from torch.nn.functional import linear

    from xprnn.cells.shipped import BUILTIN

    cell = task.setting.cell
    definition = BUILTIN[cell][0] if isinstance(cell, str) else cell
    names, starts = definition.signature.gates, definition.signature.states
    weights = {n.removesuffix("_l0"): torch.from_numpy(w) for n, w in task.weights.items()}
    x, doutput = torch.from_numpy(task.x), torch.from_numpy(task.doutput)
    leaves = [value.requires_grad_() for value in (x, *weights.values())]
    f, named = torch_functions(definition, weights)
    first = [torch.full((len(x[0]), task.setting.hidden), value) for value in starts.values()]

    def loop() -> Any:
        f.restart(first[0])
        given = linear(x, weights["weight_ih"], weights.get("bias_ih")).chunk(len(names), 2)
        states: Any = first
        outputs = []
        for values in zip(*(gate.unbind() for gate in given), strict=True):
            step = named(zip(names, values, strict=True)), named(zip(starts, states, strict=True))
            states = definition._step(f, *step)
            states = states if isinstance(states, tuple) else (states,)
            outputs.append(states[0])
        return torch.stack(outputs)

    run = wrap(loop)
    return lambda: torch.autograd.grad(run(), leaves, doutput)


def torch_functions(definition: Any, weights: Mapping[str, Any]) -> tuple[Any, Any]:
    """The `f` of a definition in torch, and what makes `x` and `s` from names and values."""
    import torch
    from torch.nn.functional import linear, softplus

    from tests.support.torch_definition import Named, TorchFunctions

    class Functions(TorchFunctions):
        """With one product per read of a state, torch's softplus, and masks drawn at each call."""

        def restart(self, like: Any) -> None:
            self._like, self._mask = like, None

        def recurrent(self, value: Any, *gates: str, bias: bool = True) -> Named:
            gates = gates or self._gates
            results = linear(value, *self._rows(gates, bias)).chunk(len(gates), 1)
            return Named(dict(zip(gates, results, strict=True)))

        def _rows(self, gates: tuple[str, ...], bias: bool) -> list[Any]:
            """The rows of adjacent gates in W_hh and in its bias."""
            rows = [self._parameters["weight_hh"].split(self._like.shape[1])]
            if bias and "bias_hh" in self._parameters:
                rows.append(self._parameters["bias_hh"].split(self._like.shape[1]))
            if gates == tuple(self._blocks):
                return [self._parameters[n] for n in ("weight_hh", "bias_hh")[: len(rows)]]
            start = self._blocks.index(gates[0])
            return [torch.cat(each[start : start + len(gates)]) for each in rows]

        def softplus(self, value: Any) -> Any:
            return softplus(value)

        def keep(self, rate: float, per: str = "step") -> Any:
            if per == "step":
                return (torch.rand_like(self._like) >= rate).to(self._like.dtype)
            if self._mask is None:
                self._mask = (torch.rand_like(self._like) >= rate).to(self._like.dtype)
            return self._mask

    f = Functions(definition, {}, weights, ())
    return f, lambda pairs: Named(dict(pairs))


def check_equal(cell: str, task: Any, call: Call, loop: Call) -> None:
    """RuntimeError unless dx of both is equal; cells with random masks are not compared."""
    import numpy as np

    if cell in MASKED:
        return
    ours, theirs = call()[0], loop()[0].numpy()  # type: ignore[index]
    error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
    if not error < 1e-3:  # float32, accumulated over the steps
        raise RuntimeError(f"{cell}: dx differs from that of the torch loop by {error:.2g}")


# -- rows


def ratios(calls: Mapping[str, Call], rounds: int) -> Callable[[str, str, float], Ratio]:
    """Sample all in turn; what returns the ratio of two, of the first's time times a factor."""
    for call in calls.values():
        call()  # compile and allocate
    times: dict[str, list[float]] = {name: [] for name in calls}
    for count in range(rounds):
        names = list(calls)
        for name in names if count % 2 else names[::-1]:
            times[name].append(sample(calls[name]))

    def ratio(one: str, other: str, factor: float = 1.0) -> Ratio:
        pairs = zip(times[one], times[other], strict=True)
        return interval([factor * a / b for a, b in pairs])

    ratio.times = times  # type: ignore[attr-defined]
    return ratio


def sample(call: Call) -> float:
    """Processor seconds of a call, the least of a turn's: other processes do not count."""
    best, end = math.inf, time.process_time() + TURN
    while (start := time.process_time()) < end:
        call()
        best = min(best, time.process_time() - start)
    return best


def interval(values: Sequence[float]) -> Ratio:
    """The median with its interval of at least 95 % from order statistics."""
    ordered, n = sorted(values), len(values)
    rank, below = 0, 0.5**n
    while rank < (n - 1) // 2 and below + math.comb(n, rank + 1) * 0.5**n <= 0.025:
        rank += 1
        below += math.comb(n, rank) * 0.5**n
    return ordered[rank], statistics.median(ordered), ordered[n - 1 - rank]


def training_row(cell: str, shape: Sequence[int], rounds: int) -> Report:
    """Forward and backward beside the built-in layer; the loop or the products where they count."""
    from .cpu.products import products

    task, base = task_of(cell, shape), task_of(BASE[cell], shape)
    lower_bound = products(task).both
    assert lower_bound is not None
    calls = {"cell": training(task), "base": training(base)}
    if tuple(shape) == LARGE:
        calls["products"] = lower_bound
        calls["sums"] = training(task_of(f"sums{gates(task)}", shape))
    else:
        calls["loop"] = torch_loop(task)
        check_equal(cell, task, calls["cell"], calls["loop"])
    ratio = ratios(calls, rounds)
    row: Report = {"cell": cell, "shape": [*shape], "base": BASE[cell]}
    row["us"] = 1e6 * statistics.median(ratio.times["cell"])  # type: ignore[attr-defined]
    row["per_gate"] = ratio("cell", "base", gates(base) / gates(task))
    if "loop" in calls:
        row["loop"] = ratio("loop", "cell", 1.0)
    else:
        row["products"] = ratio("cell", "products", 1.0)
        row["sums"] = ratio("cell", "sums", 1.0)
    print(f"{row}", file=sys.stderr, flush=True)
    return row


def forward_row(shape: Sequence[int], rounds: int) -> Report:
    """The GRU of 2014 beside the built-in GRU and ONNX Runtime with linear_before_reset=0."""
    from xprnn.tools.bench.peers import onnxruntime_peer

    task, base = task_of("gru_reset_before", shape), task_of("gru", shape)
    layer, other = task.layer.eval(), base.layer.eval()
    calls: dict[str, Call] = {"cell": lambda: layer(task.x), "gru": lambda: other(base.x)}
    calls["onnxruntime"] = onnxruntime_peer(task).forward
    ratio = ratios(calls, rounds)
    row: Report = {"shape": [*shape]}
    row["us"] = 1e6 * statistics.median(ratio.times["cell"])  # type: ignore[attr-defined]
    row |= {"gru": ratio("cell", "gru", 1.0), "onnxruntime": ratio("onnxruntime", "cell", 1.0)}
    print(f"{row}", file=sys.stderr, flush=True)
    return row


def compiled_row(cell: str, shape: Sequence[int], rounds: int, limit: float) -> Report:
    """`torch.compile` of the loop, measured in its own process; no ratio, but a reason, if not."""
    row: Report = {"cell": cell, "shape": [*shape], "ratio": None, "reason": ""}
    command = [sys.executable, "-m", "benchmarks.definitions_report", "--compile", cell]
    command += ["--shapes", ",".join(map(str, shape)), "--rounds", str(rounds)]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {**row, "reason": f"not compiled within {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {**row, "reason": f"failed: {last[:100]}"}
    return {**row, "ratio": json.loads(done.stdout.splitlines()[-1])}


def compiled(cell: str, shape: Sequence[int], rounds: int) -> Ratio:
    """The time of the compiled loop / that of the layer."""
    import torch

    task = task_of(cell, shape)
    calls = {"cell": training(task), "loop": torch_loop(task, torch.compile)}
    check_equal(cell, task, calls["cell"], calls["loop"])
    return ratios(calls, rounds)("loop", "cell", 1.0)


def keras_row(shape: Sequence[int], rounds: int) -> Report:
    """Keras's LSTM with recurrent_dropout beside the definition; a reason where it is missing."""
    row: Report = {"shape": [*shape], "version": "", "backend": "", "ratio": None}
    if find_spec("keras") is None:
        return {**row, "reason": "Keras is not installed"}
    os.environ.setdefault("KERAS_BACKEND", "torch")
    import keras
    import torch

    if keras.backend.backend() != "torch":
        return {**row, "reason": "Keras's backend is not torch"}
    task = task_of("recurrent_dropout", shape)
    layer = keras.layers.LSTM(shape[3], recurrent_dropout=0.25, return_sequences=True)
    x = torch.from_numpy(task.x.swapaxes(0, 1).copy()).requires_grad_()
    doutput = torch.from_numpy(task.doutput.swapaxes(0, 1).copy())
    layer(x)  # makes the weights
    leaves = [x, *[variable.value for variable in layer.trainable_variables]]
    calls: dict[str, Call] = {
        "cell": training(task),
        "keras": lambda: torch.autograd.grad(layer(x, training=True), leaves, doutput),
    }
    ratio = ratios(calls, rounds)("keras", "cell")
    return {**row, "version": keras.__version__, "backend": "torch", "ratio": ratio, "reason": ""}


# -- text


def check_report(report: Any) -> None:
    """ValueError unless it is a report that this script has written."""
    check_fields(report, FIELDS, "report")


def stored(results: Path) -> list[Report]:
    return read_all(results, NAME, check_report)


def section(reports: Sequence[Report]) -> str:
    """The tables of reports, in Markdown."""
    return "\n\n".join("\n".join(_lines(report)) for report in reports)


def _lines(report: Report) -> list[str]:
    listed = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    large = [row for row in report["training"] if "products" in row]
    small = [row for row in report["training"] if "loop" in row]
    lines = [
        f"**{report['machine']['name']}**, {report['date']}, {_commits(report)}; "
        f"{listed}. One thread, float32, at least {report['rounds']} interleaved rounds: medians "
        "of the ratios of processor times with their 95 % intervals.",
        "",
        'Forward+backward with Numba; "per gate" is time per gate / that of the built-in layer:',
    ]
    heads = (
        (small, {"loop": "torch loop / xprnn"}),
        (large, {"products": "xprnn / NumPy's products alone", "sums": "xprnn / sums"}),
    )
    for rows, columns in heads:
        if not rows:
            continue
        lines += ["", _row("cell", "T, N, I, H", "ms", "beside", "per gate", *columns.values())]
        lines += [_row(*["---"] * (5 + len(columns)))]
        for row in rows:
            cells = (row["cell"], _numbers(row["shape"]), f"{row['us'] / 1e3:.3g}", row["base"])
            lines.append(_row(*cells, *[_text(row[key]) for key in ("per_gate", *columns)]))
    if report["compiled"]:
        lines += ["", "| cell | T, N, I, H | torch.compile of the loop / xprnn |", "|---|---|---|"]
        for row in report["compiled"]:
            text = _text(row["ratio"]) if row["ratio"] else row["reason"]
            lines.append(_row(row["cell"], _numbers(row["shape"]), text))
    for row in report["keras"]:
        text = row["reason"]
        if row["ratio"]:
            text = f"Keras {row['version']} ({row['backend']}) / xprnn {_text(row['ratio'])}"
        lines += ["", f"An LSTM with recurrent dropout, {_numbers(row['shape'])}: {text}."]
    if report["forward"]:
        lines += ["", "The GRU of 2014, `GRU(reset_after=False)`, forward:", ""]
        lines += ["| T, N, I, H | ms | xprnn / built-in GRU | ONNX Runtime / xprnn |"]
        lines += ["|---|---|---|---|"]
        for row in report["forward"]:
            cells = (_numbers(row["shape"]), f"{row['us'] / 1e3:.3g}")
            lines.append(_row(*cells, _text(row["gru"]), _text(row["onnxruntime"])))
    return lines


def _commits(report: Report) -> str:
    """The commits of the parts; "+changes" where files differed."""
    parts: dict[str, list[str]] = {}
    for part, commit in report["commits"].items():
        parts.setdefault(commit[:8] + commit[40:], []).append(part)
    if len(parts) == 1:
        return f"commit {next(iter(parts))}"
    return "; ".join(f"{', '.join(names)}: commit {commit}" for commit, names in parts.items())


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _numbers(shape: Sequence[int]) -> str:
    return ", ".join(map(str, shape))


def _text(ratio: Sequence[float]) -> str:
    low, median, high = ratio
    return f"{median:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    one_thread()
    from xprnn.tools.output import standard_output

    with standard_output():
        sys.exit(main())
