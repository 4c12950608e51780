"""asv's benchmarks on a GPU; asv finds none of them on a machine without one."""

from __future__ import annotations

from . import layers, programs
from .common import GPU, UnusableError, gpu_name, installed, numbers

PROGRAMS = ("xprnn-cupy-reference", "xprnn-cupy-pointwise", "torch-cuda")

if gpu_name():

    class Forward(layers.Forward):
        """Forward in eval mode: nothing is saved for a gradient."""

        params = GPU.params("forward")

    class Training(layers.Training):
        """Forward and backward, with the gradients of x and of every weight."""

        params = GPU.params("training")

    class DefinitionForward(layers.DefinitionForward):
        """Forward of cells whose steps are generated from a definition."""

        params = GPU.defined()

    class DefinitionTraining(layers.DefinitionTraining):
        """Forward and backward of cells whose steps are generated from a definition."""

        params = GPU.defined()

    class Step(layers.Step):
        """A hundred calls of a cell, each one step from the same states, as in streaming."""

        params = GPU.params("step")

    class Stepper(layers.Stepper):
        """A hundred steps of a stepper of three layers, each from the state of the step before."""

        params = GPU.params("stepper")

    class Launches(layers.LayerBenchmark):
        """Kernel launches per time step, counted by CUPTI, through torch's profiler."""

        params = GPU.params("forward")

        def track_launches_per_step(
            self, cell: str, implementation: str, dtype: str, size: str
        ) -> float:
            return self.launches

        track_launches_per_step.unit = "launches / step"  # type: ignore[attr-defined]

        def measure_once(self, size: str) -> None:
            try:
                import torch
            except ModuleNotFoundError as error:
                raise UnusableError(
                    "launches are counted by torch's profiler, and torch is not installed"
                ) from error
            if not torch.cuda.is_available():
                raise UnusableError(
                    f"launches: torch {torch.__version__} has no usable CUDA device"
                )
            from torch.autograd import DeviceType
            from torch.profiler import ProfilerActivity, profile

            with profile(activities=[ProfilerActivity.CUDA]) as profiler:
                self.work.call()
                self.work.backend.synchronize()
            events = [each for each in profiler.events() if each.device_type == DeviceType.CUDA]
            kernels = sum(not each.name.startswith(("Memcpy", "Memset")) for each in events)
            if not kernels:
                raise UnusableError("launches: the profiler recorded none; it may lack permission")
            self.launches = kernels / numbers(size)["T"]

    class TrainingLaunches(Launches):
        """Kernel launches per time step, forward and backward."""

        task = "training"
        params = GPU.params("training")

    class DemoEpoch(programs.DemoEpoch):
        """Build the demo's model and train it for one epoch."""

        params = (programs.DEMO_CELLS, installed(PROGRAMS))

    class Load(programs.Load):
        """Load a layer of 512 units and 512 inputs from a file, ready for a call."""

        params = (programs.DEMO_CELLS, installed(PROGRAMS))
