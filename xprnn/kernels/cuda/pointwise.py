"""The pointwise kernels: one ElementwiseKernel for each pointwise op of a step.

A kernel runs once for each of the N * H elements of the state. Its arithmetic, and the type and use
of its buffers, are in the header of its cell. It replaces one method of that cell in `cells/`,
which is its reference in the tests. C is the compute dtype, of the operands of products, and A the
accumulation dtype, of everything else. Arrays are C-contiguous.
"""

from __future__ import annotations

import re
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


def _kernel(
    cell: str, function: str, name: str = "", constant: str = "", without: str = ""
) -> PointwiseKernel:
    """The kernel of an element function, whose signature describes the buffers.

    :param name: of the kernel; "": that of the function.
    :param constant: the function's first template argument.
    :param without: a buffer for which it gets a null pointer.
    """
    prefix, _, method = function.partition("_")
    header = f"{prefix}.h"
    signature = re.search(rf"void {function}\((.*?{{.*?)\n", loading.text(header), re.DOTALL)
    assert signature is not None, function
    parameters = re.findall(r"([CA])\* (\w+).*// (in|out|inout)\b", signature[1])
    sizes = ["i", "H"] if "Index H" in signature[1] else ["i"]
    pointers = ["nullptr" if each == without else f"&{each}[0]" for _, each, _ in parameters]
    types = ", ".join(filter(None, (constant, "C", "A")))
    return PointwiseKernel(
        *(name or function, header, cell, method),
        buffers=tuple([Buffer(*each) for each in parameters if each[1] != without]),
        operation=f"{function}<{types}>({', '.join([*sizes, *pointers])})",
    )


KERNELS = (
    _kernel("rnn_tanh", "rnn_forward_gates", "rnn_tanh_forward_gates", "false"),
    _kernel("rnn_tanh", "rnn_backward_gates", "rnn_tanh_backward_gates", "false"),
    _kernel("rnn_relu", "rnn_forward_gates", "rnn_relu_forward_gates", "true"),
    _kernel("rnn_relu", "rnn_backward_gates", "rnn_relu_backward_gates", "true"),
    _kernel("gru", "gru_forward_gates", without="bias_hh"),
    _kernel("gru", "gru_forward_gates", "gru_forward_gates_bias"),
    _kernel("gru", "gru_backward_gates"),
    _kernel("gru_reset_before", "gru_forward_reset"),
    _kernel("gru_reset_before", "gru_forward_candidate"),
    _kernel("gru_reset_before", "gru_backward_candidate"),
    _kernel("gru_reset_before", "gru_backward_reset"),
    _kernel("lstm", "lstm_forward_gates"),
    _kernel("lstm", "lstm_backward_gates"),
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
