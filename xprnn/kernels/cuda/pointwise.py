"""The pointwise kernels: one ElementwiseKernel for each pointwise op of a step.

A kernel runs once for each of the N * H elements of the state. Its arithmetic is in the header of
its cell. It replaces one method of that cell in `cells/`, which is its reference in the tests. C is
the compute dtype, of the operands of products, and A the accumulation dtype, of everything else.
Arrays are C-contiguous.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from ...backend import Array
from . import loading


class Buffer(NamedTuple):
    """An array argument of a kernel, as `Cell` describes it."""

    type: str  # C or A
    name: str
    use: str  # "in", "out" or "inout"


class PointwiseKernel(NamedTuple):
    """One row of the table."""

    name: str
    header: str
    cell: str  # in cells.CELLS
    method: str  # of that cell, which it replaces
    buffers: tuple[Buffer, ...]
    operation: str

    @property
    def inputs(self) -> tuple[Buffer, ...]:
        """The buffers that it only reads."""
        return tuple([buffer for buffer in self.buffers if buffer.use == "in"])

    @property
    def outputs(self) -> tuple[Buffer, ...]:
        """The buffers that it writes, whether or not it also reads them."""
        return tuple([buffer for buffer in self.buffers if buffer.use != "in"])


def _rnn(nonlinearity: str, relu: str) -> tuple[PointwiseKernel, PointwiseKernel]:
    """The two kernels of the Elman cell; `relu` is "true" or "false"."""
    name = f"rnn_{nonlinearity}"
    forward = (Buffer("C", "gates", "in"), Buffer("A", "gh", "in"), Buffer("C", "h_next", "out"))
    backward = (
        Buffer("C", "h_next", "in"),
        Buffer("A", "dh", "in"),
        Buffer("C", "gates", "out"),
    )
    return (
        PointwiseKernel(
            *(f"{name}_forward_gates", "rnn.h", name, "forward_gates", forward),
            operation=f"rnn_forward_gates<{relu}, C, A>(i, &gates[0], &gh[0], &h_next[0])",
        ),
        PointwiseKernel(
            *(f"{name}_backward_gates", "rnn.h", name, "backward_gates", backward),
            operation=f"rnn_backward_gates<{relu}, C, A>(i, &h_next[0], &dh[0], &gates[0])",
        ),
    )


def _gru_forward(name: str, bias: tuple[Buffer, ...], bias_hh: str) -> PointwiseKernel:
    """The GRU's forward kernel; `bias_hh` is the C++ argument for the bias."""
    return PointwiseKernel(
        *(name, "gru.h", "gru", "forward_gates"),
        buffers=(
            Buffer("A", "gh", "in"),
            Buffer("C", "h", "in"),
            *bias,
            Buffer("C", "gates", "inout"),
            Buffer("C", "saved", "out"),
            Buffer("C", "h_next", "out"),
        ),
        operation=f"gru_forward_gates<C, A>(i, H, &gh[0], &h[0], {bias_hh}, "
        "&gates[0], &saved[0], &h_next[0])",
    )


KERNELS = (
    *_rnn("tanh", "false"),
    *_rnn("relu", "true"),
    _gru_forward("gru_forward_gates", (), "nullptr"),
    _gru_forward("gru_forward_gates_bias", (Buffer("A", "bias_hh", "in"),), "&bias_hh[0]"),
    PointwiseKernel(
        *("gru_backward_gates", "gru.h", "gru", "backward_gates"),
        buffers=(
            Buffer("C", "h", "in"),
            Buffer("C", "gates", "inout"),
            Buffer("C", "saved", "inout"),
            Buffer("A", "dh", "inout"),
        ),
        operation="gru_backward_gates<C, A>(i, H, &h[0], &gates[0], &saved[0], &dh[0])",
    ),
    PointwiseKernel(
        *("gru_forward_reset", "gru.h", "gru_reset_before", "forward_reset"),
        buffers=(
            Buffer("A", "gh_rz", "in"),
            Buffer("C", "h", "in"),
            Buffer("C", "gates", "inout"),
            Buffer("C", "saved", "out"),
        ),
        operation="gru_forward_reset<C, A>(i, H, &gh_rz[0], &h[0], &gates[0], &saved[0])",
    ),
    PointwiseKernel(
        *("gru_forward_candidate", "gru.h", "gru_reset_before", "forward_candidate"),
        buffers=(
            Buffer("A", "gh_n", "in"),
            Buffer("C", "h", "in"),
            Buffer("C", "gates", "inout"),
            Buffer("C", "h_next", "out"),
        ),
        operation="gru_forward_candidate<C, A>(i, H, &gh_n[0], &h[0], &gates[0], &h_next[0])",
    ),
    PointwiseKernel(
        *("gru_backward_candidate", "gru.h", "gru_reset_before", "backward_candidate"),
        buffers=(
            Buffer("C", "h", "in"),
            Buffer("C", "gates", "inout"),
            Buffer("A", "dh", "inout"),
        ),
        operation="gru_backward_candidate<C, A>(i, H, &h[0], &gates[0], &dh[0])",
    ),
    PointwiseKernel(
        *("gru_backward_reset", "gru.h", "gru_reset_before", "backward_reset"),
        buffers=(
            Buffer("A", "dq", "in"),
            Buffer("C", "h", "in"),
            Buffer("C", "gates", "inout"),
            Buffer("A", "dh", "inout"),
        ),
        operation="gru_backward_reset<C, A>(i, H, &dq[0], &h[0], &gates[0], &dh[0])",
    ),
    PointwiseKernel(
        *("lstm_forward_gates", "lstm.h", "lstm", "forward_gates"),
        buffers=(
            Buffer("A", "gh", "in"),
            Buffer("A", "c", "in"),
            Buffer("C", "gates", "inout"),
            Buffer("C", "saved", "out"),
            Buffer("C", "h_next", "out"),
            Buffer("A", "c_next", "out"),
        ),
        operation="lstm_forward_gates<C, A>(i, H, &gh[0], &c[0], &gates[0], &saved[0], "
        "&h_next[0], &c_next[0])",
    ),
    PointwiseKernel(
        *("lstm_backward_gates", "lstm.h", "lstm", "backward_gates"),
        buffers=(
            Buffer("C", "saved", "in"),
            Buffer("A", "c", "in"),
            Buffer("A", "dh", "in"),
            Buffer("C", "gates", "inout"),
            Buffer("A", "dc", "inout"),
        ),
        operation="lstm_backward_gates<C, A>(i, H, &saved[0], &c[0], &dh[0], &gates[0], &dc[0])",
    ),
)

TABLE = {kernel.name: kernel for kernel in KERNELS}


def launch(xp: Any, name: str, shape: tuple[int, int], *arrays: Array) -> None:
    """Run a kernel on an (N, H) state; an empty state launches nothing.

    :param arrays: those that it only reads, then those that it writes, in the table's order.
    """
    N, H = shape
    build(xp.ElementwiseKernel, name)(H, *arrays, size=N * H)


@cache
def build(elementwise_kernel: Any, name: str) -> Any:
    """A kernel of the table, made with an array module's `ElementwiseKernel`.

    CuPy compiles it at the first call with given dtypes, on each device.
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
    """The source of a cell's header, preceded by common.h."""
    return loading.text("common.h", header)
