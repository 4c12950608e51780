"""asv's benchmarks of one layer: forward, forward with backward, and streaming steps.

Each takes (cell, implementation, dtype, size). `time_*` is what regressions are judged by;
`track_throughput_*` shows the same work as a rate.
"""

from __future__ import annotations

import statistics

from .common import CELLS, DTYPES, IMPLEMENTATIONS, SIZES, STEPS, UnusableError, numbers, skip
from .implementations import parts, prepare


class LayerBenchmark:
    """Prepares one combination or skips it, saying why."""

    params = (CELLS, IMPLEMENTATIONS, DTYPES, SIZES)
    param_names = ("cell", "implementation", "dtype", "size")
    version = "1"  # of the work: results of another version are not shown with these
    repeat = (5, 40, 0.3)  # samples at least and at most, and seconds of them
    rounds = 2  # processes that they are taken in
    warmup_time = 0.05
    timeout = 300
    task = "forward"

    def setup(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        """Build, move, compile and warm up."""
        parameters = (cell, implementation, dtype, size)
        try:
            self.check(parts(implementation).backend)
            self.work = prepare(self.task, *parameters)
            self.measure_once(size)
        except UnusableError as error:
            skip(f"layers.{type(self).__name__}", parameters, str(error))
        self.timer = self.work.clock

    def check(self, backend: str) -> None:
        """Raise UnusableError where the work on a backend is nothing for this benchmark."""

    def measure_once(self, size: str) -> None:
        """For what is no matter of time; raise UnusableError where it cannot be measured."""

    def throughput(self, size: str) -> float:
        """Sequence steps per second: N sequences of T steps in the median time of a call."""
        seconds: list[float] = []
        least, most, budget = self.repeat
        end = self.timer() + budget
        while len(seconds) < least or (self.timer() < end and len(seconds) < most):
            start = self.timer()
            self.work.call()
            seconds.append(self.timer() - start)
        n = numbers(size)
        return n["N"] * n["T"] / statistics.median(seconds)


class Forward(LayerBenchmark):
    """Forward in eval mode: nothing is kept for a gradient."""

    def time_forward(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        self.work.call()

    def track_throughput_forward(
        self, cell: str, implementation: str, dtype: str, size: str
    ) -> float:
        return self.throughput(size)

    track_throughput_forward.unit = "sequence steps / s"  # type: ignore[attr-defined]


class Training(LayerBenchmark):
    """Forward and backward, with the gradients of x and of every weight."""

    task = "training"

    def time_training(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        self.work.call()

    def track_throughput_training(
        self, cell: str, implementation: str, dtype: str, size: str
    ) -> float:
        return self.throughput(size)

    track_throughput_training.unit = "sequence steps / s"  # type: ignore[attr-defined]


class TrainingMemory(LayerBenchmark):
    """The most memory that a training process holds, interpreter and library included."""

    task = "training"

    def check(self, backend: str) -> None:
        if backend == "cupy":
            raise UnusableError("memory is counted on the host; this trains on a GPU")

    def peakmem_training(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        self.work.call()


class Step(LayerBenchmark):
    """A hundred times one step of a cell from given states, as streaming takes it.

    asv takes each sample after a setup, and a single step would mostly be the cold caches of that.
    """

    params = (CELLS, IMPLEMENTATIONS, DTYPES, STEPS)
    task = "step"

    def time_100_steps(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        for _ in range(100):
            self.work.call()


class Stepper(LayerBenchmark):
    """A hundred steps of three layers by a stepper, each from the state that the last one left."""

    params = (CELLS, IMPLEMENTATIONS, DTYPES, STEPS)
    task = "stepper"

    def time_100_steps(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        for _ in range(100):
            self.work.call()


class Launches(LayerBenchmark):
    """Kernel launches per time step, counted on a GPU by CUPTI, through torch's profiler."""

    def check(self, backend: str) -> None:
        if backend == "numpy":
            raise UnusableError("nothing is launched on a CPU")
        try:
            import torch
        except ModuleNotFoundError as error:
            raise UnusableError(
                "launches are counted by torch's profiler, and it is not installed"
            ) from error
        if not torch.cuda.is_available():
            raise UnusableError(f"launches: torch {torch.__version__} has no usable CUDA device")

    def track_launches_per_step(
        self, cell: str, implementation: str, dtype: str, size: str
    ) -> float:
        return self.launches

    track_launches_per_step.unit = "launches / step"  # type: ignore[attr-defined]

    def measure_once(self, size: str) -> None:
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            self.work.call()
            self.work.backend.synchronize()
        names = [event.name for event in profiler.events() if event.device_type == DeviceType.CUDA]
        kernels = sum(not name.startswith(("Memcpy", "Memset")) for name in names)
        if not kernels:
            raise UnusableError("launches: the profiler saw none; it may not be allowed to look")
        self.launches = kernels / numbers(size)["T"]


class TrainingLaunches(Launches):
    """The same, forward and backward."""

    task = "training"
