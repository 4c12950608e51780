"""asv's benchmarks of programs on a CPU: the demo's training, loading a file, importing."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from .common import UnusableError, clock, installed, module_of, skip, usable_backend
from .implementations import force

PROGRAMS = ("xprnn-numpy-reference", "xprnn-numpy-auto", "torch-cpu")
LIBRARIES = ("numpy", "xprnn", "torch", "onnxruntime")
DEMO_CELLS = ("gru", "lstm", "rnn")
HIDDEN = 512  # of the loaded model


class Program:
    """Prepares one program, or skips it with a reason."""

    params = (DEMO_CELLS, installed(PROGRAMS))
    param_names = ("cell", "implementation")
    version = "1"  # of the work: asv shows results of one version only
    repeat = (5, 30, 1.0)
    rounds = 2
    warmup_time = 0.1
    timeout = 300

    def setup(self, cell: str, implementation: str) -> None:
        """Find library, backend and device, and prepare."""
        try:
            self.package, backend, _ = force(implementation)
            self.backend = usable_backend(backend)
            self.device = "cpu" if backend == "numpy" else "cuda"
            if self.package != "xprnn" and self.device == "cuda":
                self.check_torch()
            self.prepare(cell)
        except UnusableError as error:
            skip(self, (cell, implementation), str(error))
        self.timer = clock(self.backend)

    def check_torch(self) -> None:
        """Raise UnusableError unless torch can use the GPU."""
        import torch

        if not torch.cuda.is_available():
            raise UnusableError(f"torch: {torch.__version__} has no usable CUDA device")

    def prepare(self, cell: str) -> None:
        """Prepare the program, untimed."""


class DemoEpoch(Program):
    """Build the demo's model and train it for one epoch: 270 utterances of 7 to 29 frames."""

    def prepare(self, cell: str) -> None:
        try:
            data = module_of("xprnn.tools.data.japanese_vowels", "xprnn.data")
        except ImportError as error:
            raise UnusableError(f"this version of xprnn has no demo: {error}") from error
        self.data, _ = data.japanese_vowels()

    def time_epoch(self, cell: str, implementation: str) -> None:
        if self.package == "torch":
            from .demo_vs_torch import train_in_torch

            train_in_torch(cell, self.data, 1, 0, self.device)
        else:
            demo = module_of("xprnn.tools.demo", "xprnn.demo")
            model = demo.build(cell, 0, self.backend.name)
            demo.train(model, self.data, 1, 0, lambda *_: None)


class Load(Program):
    """Load a layer of 512 units and 512 inputs from a file, ready for a call."""

    folder = ""

    def prepare(self, cell: str) -> None:
        self.folder = tempfile.mkdtemp()
        path = Path(self.folder)
        if self.package == "torch":
            import torch

            kind = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM, "rnn": torch.nn.RNN}[cell]
            self.file = path / "model.pt"
            torch.save(kind(HIDDEN, HIDDEN).state_dict(), self.file)
            self.load = lambda: self._load_in_torch(kind)
        else:
            import xprnn

            kind = {"gru": xprnn.GRU, "lstm": xprnn.LSTM, "rnn": xprnn.RNN}[cell]
            self.file = path / "model.safetensors"
            kind(HIDDEN, HIDDEN, backend="numpy", seed=0).save(self.file)
            self.load = lambda: xprnn.load(self.file, backend=self.backend.name)

    def _load_in_torch(self, kind: type) -> object:
        import torch

        layer = kind(HIDDEN, HIDDEN)
        layer.load_state_dict(torch.load(self.file, weights_only=True))
        return layer.to(self.device)

    def teardown(self, cell: str, implementation: str) -> None:
        if self.folder:  # asv calls this after a skip too
            shutil.rmtree(self.folder)

    def time_load(self, cell: str, implementation: str) -> None:
        self.load()


class Import:
    """A new interpreter imports one library; NumPy is imported by xprnn in any case."""

    params = (installed(LIBRARIES),)
    param_names = ("library",)
    version = "1"
    rounds = 2
    timeout = 120

    def timeraw_import(self, library: str) -> str:
        return f"import {library}"
