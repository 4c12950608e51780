"""What a qualification of the CPU's kernels selects, and that bits are those of that selection."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.numba_cases import needs_numba, python
from tests.support.qualifications import Qualify, make, preferring, selected, write
from tests.support.targets import arguments, assert_same, backward, forward, run
from tests.support.targets import make as make_layer
from xprnn import kernels
from xprnn.kernels import qualification
from xprnn.kernels.numba import package
from xprnn.kernels.qualification import IMPLEMENTATIONS, PASSES

pytestmark = needs_numba
NUMPY = xprnn.get_backend("numpy")
T, N, H = 9, 5, 16
NAMES = pytest.mark.parametrize("name", IMPLEMENTATIONS)
TYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])


@pytest.fixture(autouse=True)
def automatic(select_kernels: Any) -> None:
    select_kernels("auto")


def layer_of(cell: str = "gru", dtype: str = "float32", **options: Any) -> Any:
    return make_layer(cell, 3, H, dtype=dtype, **options)


def results(layer: Any, lengths: Any = None) -> list[Any]:
    """All results and gradients of a recorded call."""
    inputs = arguments(layer, T, N)
    first = forward(layer, inputs, lengths=lengths)
    return [first, backward(layer, inputs), [*layer.grads.values()]]


@NAMES
@TYPES
@pytest.mark.parametrize("cell", ["gru", "lstm", "rnn_tanh"])
def test_a_training_call(name: str, dtype: str, cell: str, qualify: Qualify) -> None:
    qualify(NUMPY, preferring(name, cell=cell, dtype=dtype))
    layer, other = (layer_of(cell, dtype, num_layers=2, bidirectional=True) for _ in range(2))
    actual = results(layer, [9, 0, 4, 9, 1])
    with xprnn.use_kernels(name):
        assert_same(actual, results(other, [9, 0, 4, 9, 1]))
    assert selected(layer, (T, N, 3))[0] == name


@NAMES
@TYPES
def test_a_call_that_is_not_recorded(name: str, dtype: str, qualify: Qualify) -> None:
    qualify(NUMPY, preferring(name, dtype=dtype))
    layer, other = (layer_of(dtype=dtype).eval() for _ in range(2))
    inputs = arguments(layer, T, N)
    actual = forward(layer, inputs)
    with xprnn.use_kernels(name):
        assert_same(actual, forward(other, inputs))
    implementation, reason = selected(layer, (T, N, 3))
    assert implementation == name
    assert name == "sequence" or reason.startswith("qualified 2026-12-03 on ")


@pytest.mark.parametrize(
    ("name", "takes"), [("reference", "reference"), ("sequence", "sequence"), ("pointwise", None)]
)
def test_a_stepper(name: str, takes: str | None, qualify: Qualify) -> None:
    """On a CPU a stepper cannot use pointwise kernels: the default, without an error."""
    x = np.random.default_rng(0).standard_normal((T, N, 3)).astype(np.float32)
    layer = layer_of().eval()
    qualify(NUMPY, preferring(name))
    stepper, call = layer.stepper(N), layer(x[:1])
    actual = [stepper.step(each).copy() for each in x]
    with xprnn.use_kernels(takes or "auto"):
        qualify.use("off")
        other = layer_of().eval()
        expected = other.stepper(N)
        assert_same(actual, [expected.step(each).copy() for each in x])
        assert_same(call, other(x[:1]))
    default = expected.explain().splitlines()[0].rpartition(": ")[2]
    first, reason, *_ = stepper.explain().splitlines()
    assert first.rpartition(": ")[2] == (takes or default)
    if takes == "reference":
        assert "qualified 2026-12-03" in reason


@pytest.mark.parametrize("kind", PASSES)
def test_the_rows_of_a_pass_decide_its_calls(kind: str, qualify: Qualify) -> None:
    rows = [each for each in preferring("reference") if each.kind == kind]
    qualify(NUMPY, rows)
    layer = layer_of()
    reasons = {"training": selected(layer, (T, N, 3))[1]}
    reasons["forward"] = selected(layer.eval(), (T, N, 3))[1]
    assert selected(layer, (1, N, 3))[1] == layer.stepper(N).explain().splitlines()[1][10:]
    reasons["step"] = selected(layer, (1, N, 3))[1]
    assert {name for name, why in reasons.items() if why.startswith("qualified")} == {kind}


def test_what_is_not_selected_is_explained_shortly(qualify: Qualify) -> None:
    qualified = qualify(NUMPY, preferring("reference"))
    lines = layer_of().explain((T, N, 3)).splitlines()
    assert lines[1].startswith("  reason: qualified 2026-12-03 on ")
    assert f"(file {qualified.digest})" in lines[1]
    assert lines[1].endswith(", 2.0 times as fast as sequence")
    why = "slower here, or not right, by the qualification"
    assert lines[-2:] == [f"  pointwise: {why}", f"  sequence: {why}"]


@pytest.mark.parametrize("forced", ["reference", "sequence"])
def test_requests_come_first(
    forced: str, qualify: Qualify, monkeypatch: pytest.MonkeyPatch
) -> None:
    qualify(NUMPY, preferring("pointwise"))
    layer = layer_of()
    assert selected(layer, (T, N, 3))[0] == "pointwise"
    with xprnn.use_kernels(forced):
        assert selected(layer, (T, N, 3)) == (forced, f"use_kernels({forced!r})")
    monkeypatch.setattr(kernels.request, "_context", type("", (), {"get": lambda: None}))
    monkeypatch.setenv("XPRNN_KERNELS", forced)
    assert selected(layer, (T, N, 3)) == (forced, f"XPRNN_KERNELS={forced}")
    monkeypatch.setenv("XPRNN_KERNELS", "auto")
    assert selected(layer, (T, N, 3))[0] == "pointwise"


def test_the_variable_off_ignores_all_files(
    qualify: Qualify, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = package.identity(NUMPY)
    write(tmp_path / "numba-1.json", make(preferring("reference"), identity=identity))
    monkeypatch.setattr(qualification, "folder", lambda: tmp_path)
    for value, expected in (("", "reference"), ("off", "sequence")):
        qualify.use(value)
        assert selected(layer_of(), (T, N, 3))[0] == expected


def test_a_file_that_is_not_used_is_named_once(
    qualify: Qualify, caplog: pytest.LogCaptureFixture
) -> None:
    qualify(NUMPY, preferring("reference"), identity={"device": "another"})
    for layer in (layer_of(), layer_of("lstm"), layer_of(dtype="float64")):
        assert selected(layer, (T, N, 3))[0] == "sequence"
        last = layer.explain((T, N, 3)).splitlines()[-1]
        assert last.startswith("  qualification: ") and "device: another in the file, " in last
        results(layer)
    assert len(caplog.records) == 1 and caplog.records[0].levelno == logging.WARNING


def test_mixed_precision_has_no_kernels_to_select(qualify: Qualify) -> None:
    qualify(NUMPY, preferring("pointwise", dtype="float16"))
    layer, before = layer_of(compute_dtype="float16"), kernels.dispatch._qualification.cache_info()
    assert selected(layer, (T, N, 3))[0] == "reference"
    assert kernels.dispatch._qualification.cache_info() == before  # nothing is read


def test_recomputed_segments_count_as_calls_of_their_steps(qualify: Qualify) -> None:
    """The grid has up to 4 steps more than one, for rows whose segments are that long."""
    grid = {"N": (1, 64), "H": (16,), "T": (4, 8)}
    qualify(NUMPY, preferring("reference", grid))
    for steps, recompute, expected in ((3, None, "sequence"), (9, 3, "sequence"), (9, 4, "refer")):
        layer = layer_of(recompute=recompute)
        assert selected(layer, (steps, N, 3))[0].startswith(expected), (steps, recompute)
    qualify(NUMPY, preferring("reference", grid))
    layer, other = (layer_of(recompute=4) for _ in range(2))
    actual = results(layer)
    with xprnn.use_kernels("reference"):
        assert_same(actual, results(other))


@NAMES
def test_rows_without_steps(name: str, qualify: Qualify) -> None:
    qualify(NUMPY, preferring(name))
    for lengths in ([0] * N, [0, 0, 2, 0, 0]):
        actual = results(layer_of(), lengths)
        with xprnn.use_kernels(name):
            assert_same(actual, results(layer_of(), lengths))
    for shape in ((T, 0, 3), (0, N, 3)):  # outside the grid: the default
        layer, x = layer_of(), np.zeros(shape, np.float32)
        actual = layer(x)
        qualify.use("off")
        assert_same(actual, layer_of()(x))
        qualify(NUMPY, preferring(name))


def test_a_function_too(qualify: Qualify) -> None:
    qualify(NUMPY, preferring("reference"))
    function, other = (make_layer("gru_function", 3, H, dtype="float32") for _ in range(2))
    inputs = arguments(function, T, N)
    actual = run(function, inputs)
    with xprnn.use_kernels("reference"):
        assert_same(actual, run(other, inputs))


def test_without_numba_nothing_is_read(qualify: Qualify, without_numba: None) -> None:
    qualify.use("/missing")
    assert "qualification" not in layer_of().explain((T, N, 3))


def test_a_kernel_that_cannot_be_compiled_ends_the_selection(
    qualify: Qualify, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    from xprnn.kernels.numba import cells

    qualify(NUMPY, preferring("pointwise"))
    package._compiled.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(package, "_failed", [])
        patch.setattr(cells, "needed", fail)
        assert selected(layer_of(), (T, N, 3))[0] == "reference"
    package._compiled.cache_clear()


CALLS = [
    (cell, dtype, training, T, N)
    for cell in ("gru", "gru_reset_before", "lstm", "rnn_tanh", "rnn_relu")
    for dtype in ("float32", "float64")
    for training in (False, True)
    for T, N in ((1, 1), (1, 300), (2, 2), (5, 1), (12, 4), (40, 64))
]


def test_without_a_file_nothing_changes(qualify: Qualify) -> None:
    """Implementations, reasons and bits are those of "off"."""

    def everything() -> list[Any]:
        found = []
        for cell, dtype, training, steps, rows in CALLS:
            layer = layer_of(cell, dtype)
            if not training:
                layer.eval()
            inputs = arguments(layer, steps, rows)
            found.append(layer.explain((steps, rows, 3)))
            found.append(run(layer, inputs) if training else forward(layer, inputs))
            if training:
                layer.eval()
            found.append(layer.stepper(rows).explain())
        return found

    texts: list[list[str]] = []
    values = []
    for value in ("off", None):
        qualify.use(value)
        every = everything()
        texts.append([each for each in every if isinstance(each, str)])
        values.append([each for each in every if not isinstance(each, str)])
    assert texts[0] == texts[1] and "qualif" not in "".join(texts[0])
    assert_same(*values)


def test_the_users_folder_is_read_in_a_new_process(tmp_path: Path) -> None:
    """And without a home folder there is none."""
    folder = tmp_path / "xprnn" / "qualified"
    folder.mkdir(parents=True)
    rows = preferring("reference")
    write(folder / "numba-1.json", make(rows, identity=package.identity(NUMPY)))
    code = "import xprnn; print(xprnn.GRU(3, 16, seed=0).explain((9, 5, 3)).splitlines()[0][-9:])"
    environment = {"XDG_CACHE_HOME": str(tmp_path), "XPRNN_QUALIFIED": "", "XPRNN_KERNELS": ""}
    assert python(code, **environment) == "reference\n"
    unknown = "import os, pwd; del os.environ['HOME']; pwd.getpwuid = {}.__getitem__\n"
    assert python(unknown + code, **{**environment, "XDG_CACHE_HOME": ""}) == " sequence\n"
