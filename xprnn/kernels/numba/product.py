"""Products of a few rows with weights packed once: what a step of a sequence multiplies.

A BLAS packs its operands anew in every call, which a step is too short to pay for. Here the
weights stand in panels as wide as a tile, for all steps, and a tile of the result stays in
registers while the sum runs. Each sum runs over k in order: the same bits at every N.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .jit import at, inlined


class Registers(NamedTuple):
    """What a processor's vector registers allow a tile to be."""

    bytes: int  # of one register
    rows: int  # of a tile: rows * VECTORS sums, VECTORS weights and a number fit

    @classmethod
    def of_host(cls) -> Registers:
        """Those of the processor that this runs on."""
        features = llvm.get_host_cpu_features()
        if features.get("avx512f"):
            return cls(64, 8)
        if features.get("avx"):
            return cls(32, 6)
        return cls(16, 6)


REGISTERS = Registers.of_host()
VECTORS = 2  # registers in a row of a tile
ALIGNED = 4  # bytes: nothing more is known of an array


def width_of(dtype: np.dtype[Any]) -> int:
    """The columns of a panel."""
    return VECTORS * REGISTERS.bytes // dtype.itemsize


def panels_of(columns: int, dtype: np.dtype[Any]) -> int:
    """The panels of a matrix; the last one is filled up with zeros."""
    return -(-columns // width_of(dtype))


@inlined
def pack(matrix: Any, panels: Any) -> None:
    """Write a matrix (K, columns) into `panels` (panels, K, width)."""
    K, columns, width = matrix.shape[0], matrix.shape[1], panels.shape[2]
    for p in range(panels.shape[0]):
        panel, first = panels[p], p * width
        filled = min(width, columns - first)
        for k in range(K):
            source, place = matrix[k], panel[k]
            for j in range(filled):
                place[j] = source[first + j]
            for j in range(filled, width):
                place[j] = 0.0


@inlined
def pack_transposed(matrix: Any, panels: Any) -> None:
    """Write the transpose of a matrix (columns, K) into `panels` (panels, K, width)."""
    columns, K, width = matrix.shape[0], matrix.shape[1], panels.shape[2]
    for p in range(panels.shape[0]):
        panel, first = panels[p], p * width
        for start in range(0, K, 16):  # a cache line of a row at a time
            stop = min(K, start + 16)
            for j in range(width):
                if first + j < columns:
                    source = matrix[first + j]
                    for k in range(start, stop):
                        panel[k, j] = source[k]
                else:
                    for k in range(start, stop):
                        panel[k, j] = 0.0


@inlined
def product(a: Any, panels: Any, start: Any, out: Any) -> None:
    """Write start + a @ panels to `out`; sums begin at `start`, None for zero.

    `a` is (N, K), `panels` (panels, K, width), `start` (panels, width), `out`
    (N, panels * width).
    """
    rows, width = a.shape[0], panels.shape[2]
    for p in range(panels.shape[0]):
        panel, place = panels[p], out[:, p * width :]
        begin = at(start, p)
        n = 0
        while n + _MOST <= rows:
            _most(a[n:], panel, begin, place[n:])
            n += _MOST
        while n + 3 < rows:
            _four(a[n:], panel, begin, place[n:])
            n += 4
        if n + 1 < rows:
            _two(a[n:], panel, begin, place[n:])
            n += 2
        if n < rows:
            _one(a[n:], panel, begin, place[n:])


def _tile(rows: int) -> Any:
    """The product of the first `rows` rows with one panel, in registers."""

    @intrinsic
    def tile(typing: Any, a: Any, panel: Any, start: Any, out: Any) -> Any:
        """out[:rows, :width] = start[:width] + a[:rows] @ panel, K > 0; C-contiguous rows."""
        lanes = REGISTERS.bytes * 8 // a.dtype.bitwidth

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            views = [
                None
                if isinstance(kind, types.NoneType)
                else cgutils.create_struct_proxy(kind)(context, builder, value=value)
                for kind, value in zip(signature.args, arguments, strict=True)
            ]
            _emit(builder, ir.VectorType(context.get_value_type(a.dtype), lanes), rows, *views)
            return context.get_dummy_value()

        return types.void(a, panel, start, out), generate

    return tile


_MOST = REGISTERS.rows
_most, _four, _two, _one = (_tile(rows) for rows in (_MOST, 4, 2, 1))


def _emit(builder: Any, vector: Any, rows: int, a: Any, panel: Any, start: Any, out: Any) -> None:
    """The loop over k, with a vector of sums for each row and each register of a row."""
    i64, bytes_of = ir.IntType(64), ir.IntType(8).as_pointer()
    K = builder.extract_value(a.shape, 1)
    firsts = [_row(builder, a, r, bytes_of) for r in range(rows)]
    begin = [ir.Constant(vector, None)] * VECTORS
    if start is not None:
        columns = [i64(v * vector.count) for v in range(VECTORS)]
        places = [_vector(builder, start.data, column, vector) for column in columns]
        begin = [builder.load(place, align=ALIGNED) for place in places]
    before = builder.block
    loop, after = (builder.append_basic_block(name) for name in ("sum", "summed"))
    builder.branch(loop)

    builder.position_at_end(loop)
    k = builder.phi(i64)
    sums = [[builder.phi(vector) for _ in range(VECTORS)] for _ in firsts]
    row_of = builder.mul(k, i64(VECTORS * vector.count))
    weights = []
    for v in range(VECTORS):
        place = _vector(builder, panel.data, builder.add(row_of, i64(v * vector.count)), vector)
        weights.append(builder.load(place, align=ALIGNED))
    multiply_add = cgutils.get_or_insert_function(
        builder.module,
        ir.FunctionType(vector, [vector] * 3),
        f"llvm.fmuladd.v{vector.count}f{64 if vector.element == ir.DoubleType() else 32}",
    )
    new = []
    for first, row in zip(firsts, sums, strict=True):
        number = _spread(builder, builder.load(builder.gep(first, [k])), vector)
        new.append(
            [
                builder.call(multiply_add, [number, weight, total])
                for weight, total in zip(weights, row, strict=True)
            ]
        )
    following = builder.add(k, i64(1))
    k.add_incoming(i64(0), before)
    k.add_incoming(following, loop)
    for row, totals in zip(sums, new, strict=True):
        for phi, total, first in zip(row, totals, begin, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(total, loop)
    builder.cbranch(builder.icmp_signed("<", following, K), loop, after)

    builder.position_at_end(after)
    for r, totals in enumerate(new):
        row = _row(builder, out, r, bytes_of)
        for v, total in enumerate(totals):
            place = _vector(builder, row, i64(v * vector.count), vector)
            builder.store(total, place, align=ALIGNED)


def _row(builder: Any, array: Any, r: int, bytes_of: Any) -> Any:
    """The address of row r of an array (N, columns)."""
    apart = builder.mul(builder.extract_value(array.strides, 0), ir.IntType(64)(r))
    moved = builder.gep(builder.bitcast(array.data, bytes_of), [apart])
    return builder.bitcast(moved, array.data.type)


def _vector(builder: Any, data: Any, start: Any, vector: Any) -> Any:
    """The address of the vector that starts at element `start`."""
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


def _spread(builder: Any, number: Any, vector: Any) -> Any:
    """A vector of one number."""
    i32, nothing = ir.IntType(32), ir.Constant(vector, ir.Undefined)
    alone = builder.insert_element(nothing, number, i32(0))
    return builder.shuffle_vector(
        alone, nothing, ir.Constant(ir.VectorType(i32, vector.count), None)
    )
