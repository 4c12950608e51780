"""`explain` and XPRNN_KERNELS: the selected implementation; a forced one is never ignored."""

from __future__ import annotations

import pytest

import xprnn
from tests.support.targets import (
    LAYERS,
    MODULES,
    arguments,
    assert_same,
    backward,
    forward,
    make,
    run,
    state_of,
)


@pytest.mark.parametrize("forced", ["", "auto", "reference"])
@pytest.mark.parametrize("name", MODULES)
def test_explain_names_the_selected_implementation(
    name: str, forced: str, without_numba: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(name)
    inputs = arguments(module)
    expected = run(module, inputs)
    monkeypatch.setenv("XPRNN_KERNELS", forced)
    reason = "XPRNN_KERNELS=reference" if forced == "reference" else "the only one available"
    text = module.explain(inputs["x"].shape)
    lines = text.splitlines()
    kind = type(module).__name__
    assert lines[0].startswith(f"{kind}(3, 5) on numpy, float64, ")
    assert lines[0].endswith(" N=3: reference")
    assert lines[1] == f"  reason: {reason}"
    assert lines[2].startswith("  a step moves at least ")
    rest = [line.split(":")[0].strip() for line in lines[3:]]
    if name in LAYERS:
        assert rest.pop(0).startswith("a training step takes about ")
    assert rest == ["pointwise", "sequence"]
    assert_same(run(module, inputs), expected)


def test_explain_reads_shapes_as_a_call_does() -> None:
    assert "T=7 N=2:" in make("gru").explain((7, 2, 3))
    assert "T=2 N=7:" in make("gru", batch_first=True).explain((7, 2, 3))
    assert "T=7 N=1:" in make("gru", batch_first=True).explain((7, 3))
    for shape in [(7, 2, 4), (3,), (1, 7, 2, 3), ()]:
        with pytest.raises(ValueError, match=r"shape: expected .*3"):
            make("gru").explain(shape)


@pytest.mark.parametrize("forced", ["pointwise", "sequence"])
@pytest.mark.parametrize("name", MODULES)
def test_a_missing_forced_kernel_raises_at_the_call(
    name: str, forced: str, without_numba: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(name)
    inputs = arguments(module)
    expected = run(module, inputs)
    forward(module, inputs)
    before = state_of(module)
    monkeypatch.setenv("XPRNN_KERNELS", forced)
    with pytest.raises(
        xprnn.KernelUnavailableError, match=f"XPRNN_KERNELS={forced}: .* need Numba"
    ):
        forward(module, inputs)
    assert_same(state_of(module), before)
    monkeypatch.delenv("XPRNN_KERNELS")
    backward(module, inputs)
    assert_same(run(module, inputs), expected)


@pytest.mark.parametrize("forced", ["fast", "REFERENCE", "auto,reference", " "])
def test_an_unknown_forced_kernel_is_refused(forced: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("gru")
    monkeypatch.setenv("XPRNN_KERNELS", forced)
    with pytest.raises(ValueError, match="XPRNN_KERNELS: expected auto, reference, pointwise"):
        forward(layer, arguments(layer))
    with pytest.raises(ValueError, match="XPRNN_KERNELS"):
        layer.explain((4, 3, 3))
