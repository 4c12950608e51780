"""The other end of `gate.py`'s pipes: sets one benchmark up and runs it as often as it is told.

    python -P gate_worker.py FOLDER CLASS METHOD PARAMETER ...

FOLDER is where xprnn has to come from; the benchmarks are those of this checkout. After the
setup, and after each line on stdin, a number of calls, a line of JSON says how many seconds one
call took; or what went wrong, and that is the last one.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def main() -> None:
    folder, kind, method, *parameters = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a benchmark prints is no reply
    try:
        call = _set_up(Path(folder), kind, method, parameters)
        _seconds(call, 1)
        print(json.dumps({"seconds": _seconds(call, 3)}), file=replies)
        for line in sys.stdin:
            print(json.dumps({"seconds": _seconds(call, int(line))}), file=replies)
    except Exception as error:
        reply = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        print(json.dumps(reply), file=replies)


def _set_up(folder: Path, kind: str, method: str, parameters: list[str]) -> Callable[[], object]:
    """A call of the benchmark; the process ends if it would run another xprnn than `folder`'s."""
    import xprnn

    found = Path(xprnn.__file__).parent
    if found.resolve() != (folder / "xprnn").resolve():
        sys.exit(f"gate: xprnn was imported from {found}, expected {folder / 'xprnn'}")
    benchmark = getattr(import_module("benchmarks.layers"), kind)()
    benchmark.setup(*parameters)
    timed = getattr(benchmark, method)
    return lambda: timed(*parameters)


def _seconds(call: Callable[[], object], number: int) -> float:
    """Of the processor, not of the clock: what neighbours take from this process does not count."""
    start = time.process_time()
    for _ in range(number):
        call()
    return (time.process_time() - start) / number


if __name__ == "__main__":
    main()
