"""Recurrent layers with exact hand-written gradients, on NumPy and CuPy, without torch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .backend import (
    BackendUnavailableError,
    KernelStoppedError,
    asarray,
    get_backend,
    synchronize,
    to_numpy,
    use_backend,
)
from .cells.definition import cell
from .diagnostics.gradient_check import GradientError, gradcheck
from .diagnostics.gradient_norms import gradient_flow
from .diagnostics.qualifying.entry import qualify
from .diagnostics.verification.comparison import verify
from .kernels import KernelUnavailableError, use_kernels
from .nn.cells import GRUCell, LSTMCell, RNNCell
from .nn.defined import Recurrent, RecurrentCell
from .nn.embedding import Embedding
from .nn.layers import GRU, LSTM, RNN
from .nn.linear import Linear
from .nn.losses import mse_loss, softmax_cross_entropy
from .nn.module import load

if TYPE_CHECKING:
    from . import cell_definitions, feature_first, functional, optim

__version__ = "0.2.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "BackendUnavailableError",
    "Embedding",
    "GRUCell",
    "GradientError",
    "KernelStoppedError",
    "KernelUnavailableError",
    "LSTMCell",
    "Linear",
    "RNNCell",
    "Recurrent",
    "RecurrentCell",
    "asarray",
    "cell",
    "cell_definitions",
    "feature_first",
    "functional",
    "get_backend",
    "gradcheck",
    "gradient_flow",
    "load",
    "mse_loss",
    "optim",
    "qualify",
    "softmax_cross_entropy",
    "synchronize",
    "to_numpy",
    "use_backend",
    "use_kernels",
    "verify",
]


if not TYPE_CHECKING:  # a type checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        """The modules that not every program needs, when they are first named."""
        if name in ("cell_definitions", "feature_first", "functional", "optim"):
            return import_module(f"{__name__}.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names."""
    return __all__
