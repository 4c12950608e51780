"""Tiles: what of a product and of a transpose stays in vector registers, as LLVM instructions.

Loops that a compiler would have to guess at are spelled out here, on vectors as wide as the
processor's registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic


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
COLUMNS = range(VECTORS)
ALIGNED = 4  # bytes: nothing more is known of an array


def tile(rows: int) -> Any:
    """The product of the first `rows` rows with one panel, in registers."""

    @intrinsic
    def of_type(typing: Any, a: Any, panel: Any, start: Any, out: Any) -> Any:
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

    return of_type


def _emit(builder: Any, vector: Any, rows: int, a: Any, panel: Any, start: Any, out: Any) -> None:
    """The sums over k, a vector for each row and each register of a row.

    Tiles of few rows take several k at a time, in sums of their own: a sum waits for itself.
    """
    i64 = ir.IntType(64)
    K = builder.extract_value(a.shape, 1)
    firsts = [_row(builder, a, r) for r in range(rows)]
    width = VECTORS * vector.count

    def step(k: Any, sums: list[Any]) -> list[Any]:
        """The sums with what k adds to them."""
        places = [builder.add(builder.mul(k, i64(width)), i64(v * vector.count)) for v in COLUMNS]
        weights = [_load(builder, panel.data, place, vector) for place in places]
        numbers = [builder.load(builder.gep(first, [k])) for first in firsts]
        return _with_products(builder, vector, numbers, weights, sums)

    zero = [ir.Constant(vector, None)] * (rows * VECTORS)
    begin = zero
    if start is not None:
        begin = [_load(builder, start.data, i64(v * vector.count), vector) for v in COLUMNS] * rows
    apart = max(1, 4 // rows)
    whole = builder.sub(K, builder.urem(K, i64(apart)))

    def several(k: Any, sums: list[Any]) -> list[Any]:
        parts = [sums[i * len(zero) : (i + 1) * len(zero)] for i in range(apart)]
        new = [step(builder.add(k, i64(i)), part) for i, part in enumerate(parts)]
        return [total for part in new for total in part]

    sums = _loop(builder, i64(0), whole, apart, begin + zero * (apart - 1), several)
    totals = sums[: len(zero)]
    for i in range(1, apart):
        part = sums[i * len(zero) : (i + 1) * len(zero)]
        totals = [builder.fadd(x, y) for x, y in zip(totals, part, strict=True)]
    if apart > 1:
        totals = _loop(builder, whole, K, 1, totals, step)
    for r in range(rows):
        row = _row(builder, out, r)
        for v in COLUMNS:
            place = _vector(builder, row, i64(v * vector.count), vector)
            builder.store(totals[r * VECTORS + v], place, align=ALIGNED)


def tile_transposed(rows: int) -> Any:
    """The product of the first `rows` columns, as rows, with one panel, in registers."""

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
    """The sums over the rows of `a`, which begin at zero and are then added to `out`."""
    i64 = ir.IntType(64)
    starts = [i64(v * vector.count) for v in COLUMNS]
    places = [
        _vector(builder, _row(builder, out, r), start, vector)
        for r in range(rows)
        for start in starts
    ]
    for place in places:  # each row may be a page of its own, and not in the cache any more
        _prefetch(builder, place)

    def step(k: Any, sums: list[Any]) -> list[Any]:
        """The sums with what row k adds to them."""
        row, across = _row(builder, a, k), _row(builder, panel, k)
        weights = [_load(builder, across, start, vector) for start in starts]
        numbers = [builder.load(builder.gep(row, [i64(r)])) for r in range(rows)]
        return _with_products(builder, vector, numbers, weights, sums)

    zero = [ir.Constant(vector, None)] * len(places)
    sums = _loop(builder, i64(0), builder.extract_value(a.shape, 0), 1, zero, step)
    for place, total in zip(places, sums, strict=True):
        before = builder.load(place, align=ALIGNED)
        builder.store(builder.fadd(before, total), place, align=ALIGNED)


def _with_products(
    builder: Any, vector: Any, numbers: list[Any], weights: list[Any], sums: list[Any]
) -> list[Any]:
    """The sums with the products of each number and all weights, vectors, added to them."""
    spread = [_spread(builder, number, vector) for number in numbers]
    pairs = [(number, weight) for number in spread for weight in weights]
    return [
        _multiply_add(builder, vector, *pair, total)
        for pair, total in zip(pairs, sums, strict=True)
    ]


def _loop(builder: Any, start: Any, stop: Any, by: int, values: list[Any], step: Any) -> list[Any]:
    """`values` after step(k, values) for each k from `start` to `stop`."""
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
    """out[:width] = source[:width], through registers."""
    lanes = REGISTERS.bytes * 8 // source.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        given, place = (
            cgutils.create_struct_proxy(kind)(context, builder, value=value).data
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        vector = ir.VectorType(context.get_value_type(source.dtype), lanes)
        for start in [ir.IntType(64)(v * lanes) for v in COLUMNS]:
            whole = _load(builder, given, start, vector)
            builder.store(whole, _vector(builder, place, start, vector), align=ALIGNED)
        return context.get_dummy_value()

    return types.void(source, out), generate


@intrinsic
def transpose(typing: Any, matrix: Any, out: Any) -> Any:
    """out[:lanes, :lanes] = matrix[:lanes, :lanes].T, in registers."""
    lanes = REGISTERS.bytes * 8 // matrix.dtype.bitwidth

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, place = (
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
            to = _vector(builder, _row(builder, place, r), start, vector)
            builder.store(row, to, align=ALIGNED)
        return context.get_dummy_value()

    return types.void(matrix, out), generate


def _multiply_add(builder: Any, vector: Any, number: Any, weight: Any, total: Any) -> Any:
    bits = 64 if vector.element == ir.DoubleType() else 32
    kind = ir.FunctionType(vector, [vector] * 3)
    name = f"llvm.fmuladd.v{vector.count}f{bits}"
    function = cgutils.get_or_insert_function(builder.module, kind, name)
    return builder.call(function, [number, weight, total])


def _prefetch(builder: Any, place: Any) -> None:
    """Have what stands at an address brought to the nearest cache, to be written."""
    i32, address = ir.IntType(32), ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [address, i32, i32, i32])
    function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
    builder.call(function, [builder.bitcast(place, address), i32(1), i32(3), i32(1)])


def _row(builder: Any, array: Any, r: Any) -> Any:
    """The address of row r, a number or an i64, of an array (N, columns)."""
    number = ir.IntType(64)(r) if isinstance(r, int) else r
    apart = builder.mul(builder.extract_value(array.strides, 0), number)
    start = builder.bitcast(array.data, ir.IntType(8).as_pointer())
    return builder.bitcast(builder.gep(start, [apart]), array.data.type)


def _vector(builder: Any, data: Any, start: Any, vector: Any) -> Any:
    """The address of the vector that starts at element `start`."""
    return builder.bitcast(builder.gep(data, [start]), vector.as_pointer())


def _load(builder: Any, data: Any, start: Any, vector: Any) -> Any:
    return builder.load(_vector(builder, data, start, vector), align=ALIGNED)


def _spread(builder: Any, number: Any, vector: Any) -> Any:
    """A vector of one number."""
    i32, nothing = ir.IntType(32), ir.Constant(vector, ir.Undefined)
    alone = builder.insert_element(nothing, number, i32(0))
    return builder.shuffle_vector(
        alone, nothing, ir.Constant(ir.VectorType(i32, vector.count), None)
    )
