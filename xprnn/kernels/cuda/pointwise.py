"""The pointwise kernels: one ElementwiseKernel for all that a step does between two products.

A kernel runs once for each of the N * H elements of the state. Its arithmetic is in the header
of its cell; the plain code that it replaces, and that it is checked against, is a part of that
cell in `cells/`. T is the type of what products read, A that of the rest. Arrays are C-contiguous.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ...backend import Array
from . import loading


class Buffer(NamedTuple):
    """An array that a kernel is given, as `Cell` describes it."""

    type: str  # T or A
    name: str
    use: str  # "read", "=", "+=", or "read, =": read, then written


class Kernel(NamedTuple):
    """One row of the table."""

    name: str
    header: str
    cell: str  # in cells.CELLS
    part: str  # the method of that cell which it replaces
    buffers: tuple[Buffer, ...]
    operation: str

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        """The buffers that it only reads."""
        return tuple([buffer for buffer in self.buffers if buffer.use == "read"])

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        """The buffers that it writes, whether it reads them first or not."""
        return tuple([buffer for buffer in self.buffers if buffer.use != "read"])


def _rnn(nonlinearity: str, relu: str) -> tuple[Kernel, Kernel]:
    """The two kernels of the Elman cell; `relu` is "true" or "false"."""
    name = f"rnn_{nonlinearity}"
    forward = (Buffer("T", "gates", "read"), Buffer("A", "gh", "read"), Buffer("T", "h_next", "="))
    backward = (
        Buffer("T", "h_next", "read"),
        Buffer("A", "dh", "read"),
        Buffer("T", "gates", "="),
    )
    return (
        Kernel(
            *(f"{name}_forward_gates", "rnn.h", name, "forward_gates", forward),
            operation=f"rnn_forward_gates<{relu}, T, A>(i, &gates[0], &gh[0], &h_next[0])",
        ),
        Kernel(
            *(f"{name}_backward_gates", "rnn.h", name, "backward_gates", backward),
            operation=f"rnn_backward_gates<{relu}, T, A>(i, &h_next[0], &dh[0], &gates[0])",
        ),
    )


def _gru_forward(name: str, bias: tuple[Buffer, ...], bias_hh: str) -> Kernel:
    """The GRU's forward kernel; `bias_hh` is the pointer that it passes on."""
    return Kernel(
        *(name, "gru.h", "gru", "forward_gates"),
        buffers=(
            Buffer("A", "gh", "read"),
            Buffer("T", "h", "read"),
            *bias,
            Buffer("T", "gates", "read, ="),
            Buffer("T", "saved", "="),
            Buffer("T", "h_next", "="),
        ),
        operation=f"gru_forward_gates<T, A>(i, H, &gh[0], &h[0], {bias_hh}, "
        "&gates[0], &saved[0], &h_next[0])",
    )


KERNELS = (
    *_rnn("tanh", "false"),
    *_rnn("relu", "true"),
    _gru_forward("gru_forward_gates", (), "nullptr"),
    _gru_forward("gru_forward_gates_bias", (Buffer("A", "bias_hh", "read"),), "&bias_hh[0]"),
    Kernel(
        *("gru_backward_gates", "gru.h", "gru", "backward_gates"),
        buffers=(
            Buffer("T", "h", "read"),
            Buffer("T", "gates", "read, ="),
            Buffer("T", "saved", "read, ="),
            Buffer("A", "dh", "read, ="),
        ),
        operation="gru_backward_gates<T, A>(i, H, &h[0], &gates[0], &saved[0], &dh[0])",
    ),
    Kernel(
        *("gru_forward_reset", "gru.h", "gru_reset_before", "forward_reset"),
        buffers=(
            Buffer("A", "gh_rz", "read"),
            Buffer("T", "h", "read"),
            Buffer("T", "gates", "read, ="),
            Buffer("T", "saved", "="),
        ),
        operation="gru_forward_reset<T, A>(i, H, &gh_rz[0], &h[0], &gates[0], &saved[0])",
    ),
    Kernel(
        *("gru_forward_candidate", "gru.h", "gru_reset_before", "forward_candidate"),
        buffers=(
            Buffer("A", "gh_n", "read"),
            Buffer("T", "h", "read"),
            Buffer("T", "gates", "read, ="),
            Buffer("T", "h_next", "="),
        ),
        operation="gru_forward_candidate<T, A>(i, H, &gh_n[0], &h[0], &gates[0], &h_next[0])",
    ),
    Kernel(
        *("gru_backward_candidate", "gru.h", "gru_reset_before", "backward_candidate"),
        buffers=(
            Buffer("T", "h", "read"),
            Buffer("T", "gates", "read, ="),
            Buffer("A", "dh", "read, ="),
        ),
        operation="gru_backward_candidate<T, A>(i, H, &h[0], &gates[0], &dh[0])",
    ),
    Kernel(
        *("gru_backward_reset", "gru.h", "gru_reset_before", "backward_reset"),
        buffers=(
            Buffer("A", "dq", "read"),
            Buffer("T", "h", "read"),
            Buffer("T", "gates", "read, ="),
            Buffer("A", "dh", "+="),
        ),
        operation="gru_backward_reset<T, A>(i, H, &dq[0], &h[0], &gates[0], &dh[0])",
    ),
    Kernel(
        *("lstm_forward_gates", "lstm.h", "lstm", "forward_gates"),
        buffers=(
            Buffer("A", "gh", "read"),
            Buffer("A", "c", "read"),
            Buffer("T", "gates", "read, ="),
            Buffer("T", "saved", "="),
            Buffer("T", "h_next", "="),
            Buffer("A", "c_next", "="),
        ),
        operation="lstm_forward_gates<T, A>(i, H, &gh[0], &c[0], &gates[0], &saved[0], "
        "&h_next[0], &c_next[0])",
    ),
    Kernel(
        *("lstm_backward_gates", "lstm.h", "lstm", "backward_gates"),
        buffers=(
            Buffer("T", "saved", "read"),
            Buffer("A", "c", "read"),
            Buffer("A", "dh", "read"),
            Buffer("T", "gates", "read, ="),
            Buffer("A", "dc", "read, ="),
        ),
        operation="lstm_backward_gates<T, A>(i, H, &saved[0], &c[0], &dh[0], &gates[0], &dc[0])",
    ),
)

TABLE = {kernel.name: kernel for kernel in KERNELS}


def launch(xp: Any, name: str, shape: tuple[int, int], *arrays: Array) -> None:
    """Run a kernel on an (N, H) state; nothing is launched where that is empty.

    `arrays` are those that it only reads, then those that it writes, as the table has them.
    """
    N, H = shape
    build(xp.ElementwiseKernel, name)(H, *arrays, size=N * H)


@cache
def build(elementwise_kernel: Any, name: str) -> Any:
    """A kernel of the table, made with an array module's `ElementwiseKernel`.

    CuPy compiles it when it is first called with given dtypes, and again on each device.
    """
    kernel = TABLE[name]
    return elementwise_kernel(
        ", ".join(["int32 H", *[f"raw {buffer.type} {buffer.name}" for buffer in kernel.inputs]]),
        ", ".join([f"raw {buffer.type} {buffer.name}" for buffer in kernel.outputs]),
        f"xprnn::{kernel.operation}",
        f"xprnn_{name}",
        preamble=source(kernel.header),
        no_return=True,
    )


def source(header: str) -> str:
    """The text of a cell's header, behind that of what all of them share."""
    return loading.text("common.h", header)
