"""Faults injected into the kernels' arithmetic, one at a time: each must show in the values.

Every sign, factor, additional term and activation in the value functions of a header is changed by
text substitution, and every result is multiplied by 1.001.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.emulator.elementwise import needs_compiler, with_fault
from tests.support.pointwise_cases import draw, excess, needs_dtype, run_fused, with_specials
from xprnn.kernels.cuda import pointwise
from xprnn.kernels.cuda.pointwise import KERNELS, TABLE, PointwiseKernel

HEADERS = ("rnn.h", "gru.h", "lstm.h")
SUBSTITUTIONS = {
    "sign": [(r" \+ ", " - "), (r" - ", " + "), (r" \+= ", " -= ")],
    "missing": [(r" \* (\w+|\([^()]*\))", ""), (r" [+-] \w+( \* \w+)*(?=[;,)])", "")],
    "activation": [(r"sigmoid\(", "tanh_of("), (r"tanh_of\(", "sigmoid(")],
    "factor": [(r"(return|=) ([^;]+);", r"\1 A(1.001) * (\2);")],
}
KINDS = [
    *[("sign", "float32"), ("sign", "float16"), ("sign", "bfloat16")],
    *[("missing", "float32"), ("activation", "float32")],
    *[("factor", "float32"), ("factor", "float64")],
]


def functions(header: str) -> dict[str, str]:
    """The functions of a header by name, in order."""
    text = (Path(pointwise.__file__).parent / header).read_text("utf-8")
    return {m[1]: m[0] for m in re.finditer(r"XP_FN \w+ (\w+)\(.*?\n}", text, re.S)}


def faults(header: str, kind: str) -> Iterator[tuple[str, str, str]]:
    """The name of a value function, its text, and the text with one fault."""
    for name, text in functions(header).items():
        if text.startswith("XP_FN A "):  # element functions return void
            for pattern, replacement in SUBSTITUTIONS[kind]:
                for match in re.finditer(pattern, text):
                    broken = match.expand(replacement)
                    yield name, text, text[: match.start()] + broken + text[match.end() :]


def kernels_that_use(header: str, function: str) -> list[PointwiseKernel]:
    """The kernels whose element function calls a function, directly or through another."""
    used = {function}
    for name, text in functions(header).items():
        if any(re.search(rf"\b{other}[(<]", text) for other in used):
            used.add(name)
    return [k for k in KERNELS if k.header == header and k.operation.partition("<")[0] in used]


def shows(header: str, function: str, old: str, new: str, dtype: str) -> bool:
    """Whether a kernel's values lie outside their bound for the fault."""
    faulty = with_fault(old, new)
    kernels = kernels_that_use(header, function)
    return any(excess(kernel, draw(kernel, dtype, 5, 7), faulty) > 1 for kernel in kernels)


@needs_compiler
@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_fault_in_the_arithmetic_shows(header: str, kind: str, dtype: str) -> None:
    needs_dtype(dtype)
    injected = list(faults(header, kind))
    assert injected
    with ThreadPoolExecutor(2) as pool:  # most of the time is spent in g++
        detected = list(pool.map(lambda fault: shows(header, *fault, dtype), injected))
    undetected = [text for (_, _, text), one in zip(injected, detected, strict=True) if not one]
    assert not undetected


def test_faults_are_injected_into_every_value_function() -> None:
    of_values = {
        (header, name)
        for header in HEADERS
        for name, text in functions(header).items()
        if text.startswith("XP_FN A ")
    }
    hit = {(header, name) for header in HEADERS for name, *_ in faults(header, "factor")}
    assert hit == of_values
    assert {kernel.header for kernel in KERNELS} == set(HEADERS)


BY_HAND = {  # by kernel: faults of offsets, of loads and stores, and of NaN
    "rnn_tanh_forward_gates": ("return tanh_of(a);", "return a != a ? A(0) : tanh_of(a);"),
    "rnn_tanh_backward_gates": ("gates[idx] =", "gates[0] ="),
    "rnn_relu_forward_gates": ("return a < 0 ? A(0) : a;", "return a > 0 ? a : A(0);"),
    "rnn_relu_backward_gates": ("? A(1) : h_next", "? A(1) : A(0)"),
    "gru_forward_gates": ("(z);\n  gates[2 * H] =", "(r);\n  gates[2 * H] ="),
    "gru_forward_gates_bias": ("bias_hh[2 * H + idx", "bias_hh[H + idx"),
    "gru_backward_gates": ("dh[idx] = gru_step_backward", "dh[idx] += gru_step_backward"),
    "gru_forward_reset": ("gh_rz[0], gh_rz[H]", "gh_rz[0], gh_rz[0]"),
    "gru_forward_candidate": ("(n);\n  h_next[idx]", "(next);\n  h_next[idx]"),
    "gru_backward_candidate": (
        "gates[2 * H] = static_cast<C>(dgx_n)",
        "gates[2 * H] = static_cast<C>(dgx_z)",
    ),
    "gru_backward_reset": ("dh[idx] += gru_reset_backward", "dh[idx] = gru_reset_backward"),
    "lstm_forward_gates": ("c[idx], i, f", "c[0], i, f"),
    "lstm_backward_gates": ("gates += gate_offset(idx, H, 4)", "gates += gate_offset(idx, H, 3)"),
}


@needs_compiler
@pytest.mark.parametrize("name", TABLE)
def test_a_fault_around_the_arithmetic_shows(name: str) -> None:
    kernel, faulty = TABLE[name], with_fault(*BY_HAND[name])
    cases = [draw(kernel, "float32", 5, 7), with_specials(kernel, "float32")]
    assert all(excess(kernel, arrays) <= 1 for arrays in cases)
    assert any(excess(kernel, arrays, faulty) > 1 for arrays in cases)


@needs_compiler
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("if (idx == 0) h_next[-1] = h_next[0];", "writes outside h_next"),
        ("if (idx == 34) c_next[idx + 1] = 0;", "writes outside c_next"),
        ("const_cast<A*>(c)[idx] += 1;", "writes c"),
        ("const_cast<A*>(gh)[H] = 0;", "writes gh"),
    ],
)
def test_a_write_outside_the_outputs_shows(fault: str, message: str) -> None:
    kernel, store = TABLE["lstm_forward_gates"], "h_next[idx] = static_cast<C>(next);"
    with pytest.raises(AssertionError, match=message):
        run_fused(kernel, draw(kernel, "float32", 5, 7), with_fault(store, f"{store} {fault}"))


@needs_compiler
def test_a_write_to_an_input_does_not_compile() -> None:
    kernel, store = TABLE["lstm_forward_gates"], "h_next[idx] = static_cast<C>(next);"
    with pytest.raises(RuntimeError, match=r"g\+\+ refuses the kernel:(?s:.)*read-only"):
        run_fused(kernel, draw(kernel, "float32", 5, 7), with_fault(store, f"{store} c[idx] = 0;"))
