"""Row tiles: the parts of a product and of a transpose held in vector registers, as LLVM IR.

The instructions are emitted explicitly, on vectors as wide as the processor's registers, instead of
relying on the compiler's vectorizer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


class Registers(NamedTuple):
    """The size of a tile that fits a processor's vector registers."""

    bytes: int  # of one register
    rows: int  # of a tile: rows * VECTORS sums, VECTORS weights and a scalar fit

    @classmethod
    def of_host(cls) -> Registers:
        """Return those of this machine's processor."""
        features = llvm.get_host_cpu_features()
        if features.get("avx512f"):
            return cls(64, 8)
        if features.get("avx"):
            return cls(32, 6)
        return cls(16, 6)


REGISTERS = Registers.of_host()
VECTORS = 2  # registers per row of a tile
COLUMNS = range(VECTORS)
ALIGNED = 4  # bytes that are guaranteed for an array


def tile(rows: int) -> Any:
    """Return an intrinsic: the product of the first `rows` rows with one panel, in registers."""

    @intrinsic
    def of_type(typing: Any, a: Any, panel: Any, start: Any, p: Any, out: Any) -> Any:
        """out[:rows, :width] = start[p, :width] + a[:rows] @ panel, K > 0; C-contiguous rows."""
        lanes = REGISTERS.bytes * 8 // a.dtype.bitwidth

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            a_view, panel_view, start_view, _, out_view = (
                cgutils.create_struct_proxy(kind)(context, builder, value=value)
                if isinstance(kind, types.Array)
                else None
                for kind, value in zip(signature.args, arguments, strict=True)
            )
            vector = ir.VectorType(context.get_value_type(a.dtype), lanes)
            begin = None if start_view is None else _row(builder, start_view, arguments[3])
            _emit(builder, vector, rows, a_view, panel_view, begin, out_view)
            return context.get_dummy_value()

        return types.void(a, panel, start, p, out), generate

    return of_type


def _emit(builder: Any, vector: Any, rows: int, a: Any, panel: Any, start: Any, out: Any) -> None:
    """Emit the sums over k, a vector for each row and each register of a row.

    They begin at the numbers at the address `start`; None: at zero.

    Tiles of few rows compute several k at a time in separate sums, since each sum is a chain of
    dependent additions.
    """
    i64 = ir.IntType(64)
    K = builder.extract_value(a.shape, 1)
    firsts = [_row(builder, a, r) for r in range(rows)]
    width = VECTORS * vector.count

    def step(k: Any, sums: list[Any]) -> list[Any]:
        """Add the products of index k to the sums."""
        starts = [builder.add(builder.mul(k, i64(width)), i64(v * vector.count)) for v in COLUMNS]
        weights = [_load(builder, panel.data, start, vector) for start in starts]
        scalars = [builder.load(builder.gep(first, [k])) for first in firsts]
        return _accumulate(builder, vector, scalars, weights, sums)

    zero = [ir.Constant(vector, None)] * (rows * VECTORS)
    begin = zero
    if start is not None:
        begin = [_load(builder, start, i64(v * vector.count), vector) for v in COLUMNS] * rows
    unroll = max(1, 4 // rows)
    end = builder.sub(K, builder.urem(K, i64(unroll)))

    def unrolled_step(k: Any, sums: list[Any]) -> list[Any]:
        groups = [sums[i * len(zero) : (i + 1) * len(zero)] for i in range(unroll)]
        new = [step(builder.add(k, i64(i)), group) for i, group in enumerate(groups)]
        return [total for group in new for total in group]

    sums = _loop(builder, i64(0), end, unroll, begin + zero * (unroll - 1), unrolled_step)
    totals = sums[: len(zero)]
    for i in range(1, unroll):
        group = sums[i * len(zero) : (i + 1) * len(zero)]
        totals = [builder.fadd(x, y) for x, y in zip(totals, group, strict=True)]
    if unroll > 1:
        totals = _loop(builder, end, K, 1, totals, step)
    for r in range(rows):
        row = _row(builder, out, r)
        for v in COLUMNS:
            address = _vector(builder, row, i64(v * vector.count), vector)
            builder.store(totals[r * VECTORS + v], address, align=ALIGNED)


def tile_transposed(rows: int) -> Any:
    """Return an intrinsic: the product of the first `rows` columns, transposed, with one panel."""

    @intrinsic
    def of_type(typing: Any, a: Any, panel: Any, out: Any) -> Any:
        """out[:rows, :width] += a[:, :rows].T @ panel; C-contiguous rows."""
        lanes = REGISTERS.bytes * 8 // a.dtype.bitwidth

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            views = [
                cgutils.create_struct_proxy(kind)(context, builder, value=value)
                for kind, value in zip(signature.args, arguments, strict=True)
            ]
            vector = ir.VectorType(context.get_value_type(a.dtype), lanes)
            _emit_transposed(builder, vector, rows, *views)
            return context.get_dummy_value()

        return types.void(a, panel, out), generate

    return of_type


def _emit_transposed(builder: Any, vector: Any, rows: int, a: Any, panel: Any, out: Any) -> None:
    """Emit the sums over the rows of `a`, which begin at zero and are then added to `out`."""
    i64 = ir.IntType(64)
    starts = [i64(v * vector.count) for v in COLUMNS]
    addresses = [
        _vector(builder, _row(builder, out, r), start, vector)
        for r in range(rows)
        for start in starts
    ]
    for address in addresses:  # each row may be on a page of its own, and evicted from the cache
        _prefetch(builder, address)

    def step(k: Any, sums: list[Any]) -> list[Any]:
        """Add the products of row k to the sums."""
        row, panel_row = _row(builder, a, k), _row(builder, panel, k)
        weights = [_load(builder, panel_row, start, vector) for start in starts]
        scalars = [builder.load(builder.gep(row, [i64(r)])) for r in range(rows)]
        return _accumulate(builder, vector, scalars, weights, sums)

    zero = [ir.Constant(vector, None)] * len(addresses)
    sums = _loop(builder, i64(0), builder.extract_value(a.shape, 0), 1, zero, step)
    for address, total in zip(addresses, sums, strict=True):
        before = builder.load(address, align=ALIGNED)
        builder.store(builder.fadd(before, total), address, align=ALIGNED)


def _accumulate(
    builder: Any, vector: Any, scalars: list[Any], weights: list[Any], sums: list[Any]
) -> list[Any]:
    """Add the products of each scalar and all weights, which are vectors, to the sums."""
    broadcast = [_broadcast(builder, scalar, vector) for scalar in scalars]
    pairs = [(scalar, weight) for scalar in broadcast for weight in weights]
    return [
        _multiply_add(builder, vector, *pair, total)
        for pair, total in zip(pairs, sums, strict=True)
    ]


def _loop(builder: Any, start: Any, stop: Any, by: int, values: list[Any], step: Any) -> list[Any]:
    """Emit `values = step(k, values)` for each k from `start` to `stop`; return the last values."""
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(start.type)
    phis = [builder.phi(value.type) for value in values]
    builder.cbranch(builder.icmp_signed("<", k, stop), body, after)
    builder.position_at_end(body)
    new = step(k, phis)
    following = builder.add(k, start.type(by))
    builder.branch(head)
    for phi, first, last in zip([k, *phis], [start, *values], [following, *new], strict=True):
        phi.add_incoming(first, before)
        phi.add_incoming(last, body)
    builder.position_at_end(after)
    return phis


@intrinsic
def move(typing: Any, source: Any, out: Any) -> Any:
    """Copy source[:width] to out[:width], through registers."""
    lanes = REGISTERS.bytes * 8 // source.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source_data, out_data = (
            cgutils.create_struct_proxy(kind)(context, builder, value=value).data
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        vector = ir.VectorType(context.get_value_type(source.dtype), lanes)
        for start in [ir.IntType(64)(v * lanes) for v in COLUMNS]:
            value = _load(builder, source_data, start, vector)
            builder.store(value, _vector(builder, out_data, start, vector), align=ALIGNED)
        return context.get_dummy_value()

    return types.void(source, out), generate


@intrinsic
def transpose(typing: Any, matrix: Any, out: Any) -> Any:
    """Write matrix[:lanes, :lanes].T to out[:lanes, :lanes], in registers."""
    lanes = REGISTERS.bytes * 8 // matrix.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, target = (
            cgutils.create_struct_proxy(kind)(context, builder, value=value)
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        vector, start = (
            ir.VectorType(context.get_value_type(matrix.dtype), lanes),
            ir.IntType(64)(0),
        )
        rows = [_load(builder, _row(builder, source, r), start, vector) for r in range(lanes)]
        half = lanes // 2  # rows i and i + half interleaved, log2(lanes) times
        masks = [[i // 2 + lanes * (i % 2) + part for i in range(lanes)] for part in (0, half)]
        kind = ir.VectorType(ir.IntType(32), lanes)
        for _ in range(lanes.bit_length() - 1):
            rows = [
                builder.shuffle_vector(rows[i], rows[i + half], ir.Constant(kind, mask))
                for i in range(half)
                for mask in masks
            ]
        for r, row in enumerate(rows):
            address = _vector(builder, _row(builder, target, r), start, vector)
            builder.store(row, address, align=ALIGNED)
        return context.get_dummy_value()

    return types.void(matrix, out), generate


def _multiply_add(builder: Any, vector: Any, scalar: Any, weight: Any, total: Any) -> Any:
    bits = 64 if vector.element == ir.DoubleType() else 32
    kind = ir.FunctionType(vector, [vector] * 3)
    name = f"llvm.fmuladd.v{vector.count}f{bits}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [scalar, weight, total])


def _prefetch(builder: Any, address: Any) -> None:
    """Prefetch the cache line of an address to L1, for writing."""
    i32, pointer = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [pointer, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.bitcast(address, pointer), i32(1), i32(3), i32(1)])


def _row(builder: Any, array: Any, r: Any) -> Any:
    """Return the address of row r, an int or an i64, of an array (N, columns)."""
    index = ir.IntType(64)(r) if isinstance(r, int) else r
    offset = builder.mul(builder.extract_value(array.strides, 0), index)
    start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [offset]), array.data.type)


def _vector(builder: Any, data: Any, start: Any, vector: Any) -> Any:
    """Return the address of the vector that starts at element `start`."""
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


def _load(builder: Any, data: Any, start: Any, vector: Any) -> Any:
    return builder.load(_vector(builder, data, start, vector), align=ALIGNED)


def _broadcast(builder: Any, scalar: Any, vector: Any) -> Any:
    """Return a vector with all elements equal to a scalar."""
    i32, undefined = ir.IntType(32), ir.Constant(vector, ir.Undefined)
    first = builder.insert_element(undefined, scalar, i32(0))
    return builder.shuffle_vector(
        first, undefined, ir.Constant(ir.VectorType(i32, vector.count), None)
    )
