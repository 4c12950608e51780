"""asv's benchmarks of one layer: forward, forward with backward, and streaming steps.

Each takes (cell, implementation, dtype, size). `time_*` decides about regressions;
`track_throughput_*` shows the same work as a rate.
"""

from __future__ import annotations

import statistics

from .common import CELLS, DTYPES, IMPLEMENTATIONS, SIZES, STEPS, UnusableError, numbers, skip
from .implementations import parts, prepare


class LayerBenchmark:
    """Prepares one combination, or skips it with a reason."""

    params = (CELLS, IMPLEMENTATIONS, DTYPES, SIZES)
    param_names = ("cell", "implementation", "dtype", "size")
    version = "1"  # of the work: asv shows results of one version only
    repeat = (5, 40, 0.3)  # minimum and maximum number of samples, and their seconds
    rounds = 2  # processes over which the samples are spread
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
        """Raise UnusableError if this benchmark does not apply to a backend."""

    def measure_once(self, size: str) -> None:
        """Measure anything but time; raise UnusableError if that is not possible."""

    def throughput(self, size: str) -> float:
        """Sequence steps per second: N T divided by the median time of a call."""
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
    """Forward in eval mode: nothing is saved for a gradient."""

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
    """The peak memory of a training process, interpreter and library included."""

    task = "training"

    def check(self, backend: str) -> None:
        if backend == "cupy":
            raise UnusableError("host memory is measured; this trains on a GPU")

    def peakmem_training(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        self.work.call()


class Step(LayerBenchmark):
    """A hundred calls of a cell, each one step from the same states, as in streaming.

    asv runs the setup before each sample; a single step would mostly measure cold caches.
    """

    params = (CELLS, IMPLEMENTATIONS, DTYPES, STEPS)
    task = "step"

    def time_100_steps(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        for _ in range(100):
            self.work.call()


class Stepper(LayerBenchmark):
    """A hundred steps of a stepper of three layers, each from the state of the step before."""

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
                "launches are counted by torch's profiler, and torch is not installed"
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
            raise UnusableError("launches: the profiler recorded none; it may lack permission")
        self.launches = kernels / numbers(size)["T"]


class TrainingLaunches(Launches):
    """Kernel launches per time step, forward and backward."""

    task = "training"
