"""Worker process of `gate.py`: sets up one benchmark and runs it on request.

    python -P gate_worker.py FOLDER CLASS METHOD PARAMETER ...

xprnn must be imported from FOLDER; the benchmarks are those of this checkout. After the setup, and
after each line on stdin, which holds a number of calls, it writes a line of JSON with the seconds
per call, or with an error, after which it ends.
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
    os.dup2(2, 1)  # keep output of the benchmark out of the replies
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
    """A call of the benchmark; the process ends if xprnn is not imported from `folder`."""
    import xprnn

    imported = Path(xprnn.__file__).parent
    if imported.resolve() != (folder / "xprnn").resolve():
        sys.exit(f"gate: xprnn was imported from {imported}, expected {folder / 'xprnn'}")
    benchmark = getattr(import_module("benchmarks.layers"), kind)()
    benchmark.setup(*parameters)
    timed = getattr(benchmark, method)
    return lambda: timed(*parameters)


def _seconds(call: Callable[[], object], number: int) -> float:
    """Processor time per call, which other processes do not affect."""
    start = time.process_time()
    for _ in range(number):
        call()
    return (time.process_time() - start) / number


if __name__ == "__main__":
    main()
