"""A worker process of `qualify`: it answers requests about one implementation.

Requests and answers are lines of JSON on standard input and output. The process ends when its
standard input does, also during a request.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from queue import SimpleQueue
from threading import Thread
from typing import Any, cast

from ... import __version__, kernels
from ...backend import Backend, BackendName, get_backend
from ...backend.floating_point import environment
from ...backend.processors import usable
from ...core.precision import check_precision_policy
from ...kernels.qualification import Shape
from ..verification.suite import Problem, build, types_of
from .comparing import compare
from .grid import Case
from .timing import Timer


class Session:
    """The state of a worker."""

    def __init__(self, backend: str, implementation: str) -> None:
        self._backend: Backend = get_backend(cast("BackendName", backend))
        self._implementation = implementation
        self._timer = Timer(self._backend)

    def describe(self) -> dict[str, Any]:
        """What the file says about this machine, and the types that apply."""
        backend, package = self._backend, kernels.package_of(self._backend)
        plain = check_precision_policy("float32", None, "ieee")
        answer = {"backend": backend.name, "kernels": backend.kernels, "gpu": backend.on_gpu}
        if why_not := package.unsupported(plain):
            return {**answer, "unsupported": str(why_not)}
        facts = {
            "backend": backend.name,
            "machine": platform.machine(),
            "python": platform.python_version(),
            "system": platform.system(),
            "threads": str(usable()),
            "xprnn": __version__,
        }
        identity = package.identity(backend)
        return {**answer, "identity": identity, "facts": facts, "dtypes": types_of(backend)}

    def default(self, case: Case) -> str:
        """The implementation that "auto" selects without a qualification."""
        N, H, T = case.shape
        layer = build(case.cell, case.dtype, Problem(T, N, H, H), self._backend)
        if case.kind == "step":
            plan = kernels.plan_step(layer._spec, self._backend, layer.arithmetic, N)
            return plan.implementation
        layer = layer.train() if case.kind == "training" else layer.eval()
        return layer._plan(T, N).implementation

    def compare(self, case: Case) -> dict[str, Any]:
        """The outcome of a comparison with the equations."""
        with environment():
            return compare(self._backend, self._implementation, case)._asdict()

    def sample(self, case: Case) -> float:
        """Seconds of a call."""
        with kernels.use_kernels(self._implementation):
            return self._timer.sample(case)

    def peaks(self, dtype: str) -> list[float]:
        """Multiply-adds and bytes per second."""
        return [*self._timer.peaks(dtype)]


METHODS = ("describe", "default", "compare", "sample", "peaks")


def main() -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is not an answer
    requests: SimpleQueue[str] = SimpleQueue()
    Thread(target=_read, args=(requests,), daemon=True).start()
    session: Session | None = None
    while True:
        request = json.loads(requests.get())
        try:
            if session is None:
                _restore(request["variables"])
                session = Session(request["backend"], request["implementation"])
            answer = {"value": _answer(session, request)}
        except Exception as error:
            answer = {"raised": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _read(requests: SimpleQueue[str]) -> None:
    for line in sys.stdin:
        requests.put(line)
    os._exit(0)  # the process that asks has ended


def _restore(variables: dict[str, str | None]) -> None:
    """Set the variables that limit threads as the caller has them.

    The BLAS has read others if this worker compares. Kernels read these at each call: what is
    compared uses as many threads as what is timed.
    """
    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def _answer(session: Session, request: dict[str, Any]) -> Any:
    """The result of one of METHODS."""
    if request["method"] not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {request['method']!r}")
    method: Callable[..., Any] = getattr(session, request["method"])
    arguments = [_case(value) if isinstance(value, list) else value for value in request["with"]]
    return method(*arguments)


def _case(values: list[Any]) -> Case:
    cell, dtype, kind, shape = values
    return Case(cell, dtype, kind, Shape(*shape))


if __name__ == "__main__":
    main()
