"""`activations`, `proj_size` and `xprnn.cell_definitions`.

The references are torch's LSTM with a projection, ONNX Runtime in float32, and steps written in
torch, whose autograd gives every gradient.
"""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.layers.test_defined_layers import (
    BOUND,
    REORDERED,
    Case,
    Problem,
    assert_equal,
    by_torch,
    run,
)
from tests.support import written_cells as written
from tests.support.torch_cases import on_one_thread
from xprnn import cell_definitions
from xprnn.backend import Backend
from xprnn.cells.activations import FUNCTIONS
from xprnn.cells.shipped import DEFINITIONS

PARAMETERS = {"affine": (0.5, 0.25), "scaled_tanh": (1.5, 0.75)}
OTHER = {
    "leaky_relu": (0.3,),
    "elu": (0.5,),
    "hard_sigmoid": (0.3, 0.4),
    "thresholded_relu": (0.1,),
}
EVERY = (
    *[(name, *PARAMETERS[name]) if name in PARAMETERS else name for name in FUNCTIONS],
    *[(name, *numbers) for name, numbers in OTHER.items()],
)
GRU = ("hard_sigmoid", "relu")
FOUR = (*GRU, "sigmoid", ("leaky_relu", 0.2))
LSTM = (("hard_sigmoid", 0.25, 0.5), "softsign", ("scaled_tanh", 1.5, 0.5))
SIX = (*LSTM, "sigmoid", "tanh", "relu")
USUAL = ("sigmoid", "tanh", "tanh")

LAYERS: dict[str, tuple[type, dict[str, Any], Any]] = {
    "gru": (xprnn.GRU, {"activations": GRU}, written.gru(GRU)),
    "gru, four": (xprnn.GRU, {"activations": FOUR}, written.gru(FOUR)),
    "gru of 2014": (
        xprnn.GRU,
        {"activations": FOUR, "reset_after": False},
        written.gru(FOUR, reset_after=False),
    ),
    "lstm": (xprnn.LSTM, {"activations": LSTM}, written.lstm(LSTM)),
    "lstm, six": (xprnn.LSTM, {"activations": SIX}, written.lstm(SIX)),
    "projected": (xprnn.LSTM, {"proj_size": 2}, written.lstm(USUAL)),
    "projected, six": (xprnn.LSTM, {"proj_size": 2, "activations": SIX}, written.lstm(SIX)),
}


@pytest.fixture(autouse=True)
def plain_code() -> Iterator[None]:
    """The reference of all other code, which is compiled for each cell."""
    with xprnn.use_kernels("reference"):
        yield


def as_argument(states: Any) -> Any:
    return states[0] if len(states) == 1 else tuple(states)


def build(case: Case, backend: str = "numpy", **more: Any) -> Any:
    kind, options, _ = LAYERS[case.name]
    if case.directions == 1 and "activations" in options:
        n = 2 if kind is xprnn.GRU else 3
        options = {**options, "activations": options["activations"][:n]}
    layer = kind(
        case.I,
        case.H,
        case.layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.directions == 2,
        dtype="float64",
        seed=5,
        backend=backend,
        **options,
        **more,
    )
    return layer.train()


@pytest.mark.parametrize("name", LAYERS)
def test_equal_autograd(name: str, any_backend: Backend) -> None:
    case = Case(name, layers=2, directions=2)
    for each in (
        case,
        replace(case, lengths=None, bias=False, states=False),
        replace(case, batch_first=True, directions=1),
    ):
        layer = build(each, any_backend.name)
        problem = Problem(each, layer)
        expected = by_torch(each, layer, problem, LAYERS[name][2])
        assert_equal(run(each, layer, problem), expected)


@pytest.mark.parametrize("value", EVERY, ids=str)
def test_every_function(value: Any) -> None:
    case = Case("rnn", layers=2, directions=2)
    activations = (value, "tanh")
    layer = xprnn.RNN(
        case.I, case.H, 2, bidirectional=True, activations=activations, dtype="float64", seed=2
    ).train()
    problem = Problem(case, layer)
    expected = by_torch(case, layer, problem, written.rnn(activations))
    assert_equal(run(case, layer, problem), expected)


@pytest.mark.parametrize("sizes", [{"T": 0}, {"T": 1}, {"N": 0}, {"N": 1}, {"H": 1}], ids=str)
@pytest.mark.parametrize("name", ["gru, four", "projected"])
def test_edge_sizes(name: str, sizes: dict[str, int]) -> None:
    case = Case(name, layers=2, directions=2, lengths=None, **sizes)
    layer = build(case)
    problem = Problem(case, layer)
    results = run(case, layer, problem)
    if case.T and case.N:
        assert_equal(results, by_torch(case, layer, problem, LAYERS[name][2]))
    else:
        assert results["output"].shape == problem.doutput.shape
        assert not any(results[f"d{name}"].any() for name in layer.parameters)


@pytest.mark.parametrize("name", LAYERS)
def test_recompute_stepper_and_diagnostics(name: str) -> None:
    case = Case(name, layers=2, directions=2)
    layer = build(case)
    problem = Problem(case, layer)
    expected = run(case, layer, problem)
    for k in (1, 4, 9):
        assert_equal(run(case, build(case, recompute=k), problem), expected, REORDERED)
    xprnn.gradcheck(
        layer, problem.x, as_argument(problem.states), lengths=case.lengths, directions=1
    )
    flow = xprnn.gradient_flow(layer, problem.x)
    assert flow.norms.shape == (4, case.T)
    again = xprnn.gradient_flow(build(case, recompute=2), problem.x)
    np.testing.assert_allclose(again.norms, flow.norms, rtol=1e-10)

    one = replace(case, directions=1, lengths=None, states=False)
    layer = build(one).eval()
    problem = Problem(one, layer)
    output, final = layer(problem.x)
    stepper = layer.stepper(case.N)
    for x, y in zip(problem.x, output, strict=True):
        np.testing.assert_allclose(stepper.step(x), y, rtol=0, atol=REORDERED)
    for state, end in zip(stepper.state(), final, strict=True):
        np.testing.assert_allclose(state, end, rtol=0, atol=REORDERED)
    np.testing.assert_allclose(layer(problem.x[:1])[0], output[:1], rtol=0, atol=REORDERED)


@pytest.mark.kernels
@pytest.mark.parametrize("name", LAYERS)
def test_verify(name: str) -> None:
    """Every implementation that there is of the layer."""
    layer = build(Case(name, layers=2, directions=2, H=6)).to(dtype="float32")
    report = xprnn.verify(layer, (4, 2, 3))
    assert report.ok, str(report)


@pytest.mark.parametrize("name", ["gru, four", "lstm, six"])
def test_norms_are_measured_in_the_same_backward_pass(name: str) -> None:
    """The step loop that `gradient_flow` runs has the cell of each direction."""
    case = Case(name, layers=2, directions=2)
    layer = build(case)
    problem = Problem(case, layer)
    expected = run(case, layer, problem)
    layer.zero_grad()
    layer(problem.x, as_argument(problem.states), lengths=case.lengths)
    norms = np.zeros((4, case.T))
    upstream = problem.doutput, tuple(problem.dstates)
    dx, _ = layer._run_backward(layer._last_record(), *upstream, True, norms)
    np.testing.assert_allclose(dx, expected["dx"], rtol=0, atol=REORDERED)
    for parameter, gradient in layer.grads.items():
        expected_gradient = expected[f"d{parameter}"]
        np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=REORDERED)
    assert (norms > 0).all()


@pytest.mark.parametrize("name", LAYERS)
def test_files_and_copies(name: str, tmp_path: Path) -> None:
    layer = build(Case(name, layers=2, directions=2))
    path = tmp_path / "file.safetensors"
    layer.save(path)
    for clone in (
        xprnn.load(path),
        type(layer).load(path),
        copy.copy(layer),
        copy.deepcopy(layer),
        pickle.loads(pickle.dumps(layer)),
    ):
        assert type(clone) is type(layer)
        assert clone.options == layer.options
        assert repr(clone) == repr(layer)
        assert clone.activations == layer.activations
        for parameter, value in layer.parameters.items():
            assert np.array_equal(clone.parameters[parameter], value)
        x = np.ones((4, 2, 3))
        assert np.array_equal(clone.eval()(x)[0], copy.copy(layer).eval()(x)[0])


def test_layers_without_them_are_as_they_were() -> None:
    """The same cells, options, files and texts."""
    for kind, activations in ((xprnn.RNN, ("tanh",)), (xprnn.GRU, GRU), (xprnn.LSTM, LSTM)):
        layer = kind(3, 4, seed=0)
        assert layer.options.keys() == {*layer.options} - {"activations", "proj_size"}
        assert layer.activations is None
        assert layer._spec.cell in xprnn.cells.CELLS.values()
        assert layer._spec.reverse_cell is None
        assert "activations" not in repr(layer)
        same = kind(3, 4, seed=0, activations=None)
        assert same.options == layer.options
        changed = kind(3, 4, seed=0, activations=activations)
        assert changed.activations == activations
        for parameter, value in layer.parameters.items():  # drawn alike
            assert np.array_equal(changed.parameters[parameter], value)
    assert xprnn.LSTM(3, 4, proj_size=0, seed=0).options == xprnn.LSTM(3, 4, seed=0).options
    assert xprnn.LSTM(3, 4).proj_size == 0


def test_the_usual_functions_compute_the_built_in_cells(any_backend: Backend) -> None:
    for kind, activations, options in (
        (xprnn.RNN, ("tanh",), {}),
        (xprnn.GRU, ("sigmoid", "tanh"), {}),
        (xprnn.GRU, ("sigmoid", "tanh"), {"reset_after": False}),
        (xprnn.LSTM, USUAL, {}),
    ):
        case = Case("", layers=2, directions=2)
        layer, built_in = (
            kind(3, 4, 2, bidirectional=True, dtype="float64", seed=0, **options, **more).train()
            for more in ({"activations": activations}, {})
        )
        assert layer._spec.reverse_cell is None
        problem = Problem(case, layer)
        assert_equal(run(case, layer, problem), run(case, built_in, problem), REORDERED)


def test_two_directions_may_have_different_functions() -> None:
    text = build(Case("gru, four", directions=2)).explain((10, 2, 3))
    assert "  forward, saved of each step: add, hard_sigmoid, hard_sigmoid, relu" in text
    assert "  reverse, saved of each step: add, sigmoid, sigmoid, leaky_relu" in text
    assert "saved for backward" in text


# -- torch's projection


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize(("layers", "directions"), [*itertools.product((1, 2), (1, 2))])
@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_equals_that_of_torch(
    layers: int, directions: int, bias: bool, batch_first: bool, any_backend: Backend
) -> None:
    case = Case("projected", layers, directions, bias, batch_first)
    layer = build(case, any_backend.name)
    problem = Problem(case, layer)
    for lengths in (None, (4, 1, 6, 2)):  # torch refuses 0
        layer.zero_grad()
        state, expected = by_torch_layer(case, problem, lengths)
        assert [*state] == [*layer.parameters]
        layer.load_state_dict(state)
        assert_equal(run(case, layer, problem, lengths), expected, BOUND)


@on_one_thread
def by_torch_layer(case: Case, problem: Problem, lengths: Any) -> tuple[Any, Any]:
    """The state dict of torch's layer, its results and gradients."""
    import torch

    theirs = torch.nn.LSTM(
        case.I,
        case.H,
        case.layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.directions == 2,
        proj_size=2,
        dtype=torch.float64,
    )
    x = torch.tensor(problem.x, requires_grad=True)
    initial = [torch.tensor(each, requires_grad=True) for each in problem.states]
    given: Any = x
    if lengths:
        given = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(lengths), case.batch_first, enforce_sorted=False
        )
    output, final = theirs(given, tuple(initial))
    if lengths:
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(output, case.batch_first)
    total = (output * torch.tensor(problem.doutput)).sum()
    for end, upstream in zip(final, problem.dstates, strict=True):
        total = total + (end * torch.tensor(upstream)).sum()
    total.backward()
    expected = {"output": output.detach().numpy(), "dx": x.grad.numpy()}
    for k, (end, begin) in enumerate(zip(final, initial, strict=True)):
        expected[f"final {k}"] = end.detach().numpy()
        expected[f"dinitial {k}"] = begin.grad.numpy()
    for parameter, value in theirs.named_parameters():
        expected[f"d{parameter}"] = value.grad.numpy()
    return theirs.state_dict(), expected


# -- shipped definitions


def reference(name: str, threshold: float) -> Any:
    if name == "rnn":
        return written.rnn(("tanh",), threshold)
    if name.startswith("gru"):
        return written.gru(("sigmoid", "tanh"), threshold, name == "gru")
    return written.lstm(USUAL, threshold, "coupled" in name)


def recurrent(definition: Any, case: Case, **options: Any) -> Any:
    if definition.name == "projected_lstm":
        options["proj_size"] = 3
    return xprnn.Recurrent(
        definition,
        case.I,
        case.H,
        case.layers,
        bidirectional=case.directions == 2,
        dtype="float64",
        seed=3,
        **options,
    ).train()


@pytest.mark.parametrize("threshold", [0.0, 0.5])
@pytest.mark.parametrize("definition", DEFINITIONS, ids=repr)
def test_definitions_equal_autograd(definition: Any, threshold: float, fake_cupy: Backend) -> None:
    case = Case(definition.name, layers=2, directions=2)
    layer = recurrent(definition, case, clip_threshold=threshold)
    problem = Problem(case, layer)
    expected = by_torch(case, layer, problem, reference(definition.name, threshold))
    assert_equal(run(case, layer, problem), expected)
    moved = recurrent(definition, case, clip_threshold=threshold, backend=fake_cupy.name)
    assert_equal(run(case, moved, problem), expected)


@pytest.mark.parametrize("definition", DEFINITIONS, ids=repr)
def test_definitions_are_those_of_files_and_pickles(definition: Any, tmp_path: Path) -> None:
    case = Case(definition.name, T=3, N=2)
    layer = recurrent(
        definition,
        case,
        clip_threshold=0.5,
        activations=["tanh"] * len(definition.signature.options["activations"]),
    )
    xprnn.gradcheck(layer, Problem(case, layer).x, lengths=(3, 1), directions=1)
    path = tmp_path / "file.safetensors"
    layer.save(path)
    loaded = xprnn.load(path)  # without `cells`
    assert loaded.definition is definition
    assert loaded.options == layer.options
    assert pickle.loads(pickle.dumps(layer)).definition is definition
    assert getattr(cell_definitions, definition.name) is definition
    sizes = {"proj_size": 3} if definition.name == "projected_lstm" else {}
    cell = xprnn.RecurrentCell(definition, 3, 4, **sizes)
    cell.save(path)
    assert xprnn.load(path).options == cell.options


def test_a_file_with_a_definition_of_the_same_name_is_not_mistaken(tmp_path: Path) -> None:
    @xprnn.cell(gates=("i", "g", "o"), states=("h", "c"))
    def coupled_lstm(f: Any, x: Any, s: Any) -> Any:
        gh = f.recurrent(s.h)
        i = f.hard_sigmoid(x.i + gh.i)
        c = s.c + i * (f.tanh(x.g + gh.g) - s.c)
        return f.sigmoid(x.o + gh.o) * f.tanh(c), c

    path = tmp_path / "file.safetensors"
    xprnn.Recurrent(coupled_lstm, 3, 4).save(path)
    with pytest.raises(ValueError, match="by other equations than those of the 'coupled_lstm'"):
        xprnn.load(path)
    assert xprnn.load(path, cells=[coupled_lstm]).definition is coupled_lstm


def in_onnx_order(definition: Any, blocks: np.ndarray, order: str) -> np.ndarray:
    """The blocks of the gates in ONNX's order; a gate without one gets other numbers, not read."""
    gates = definition.signature.gates
    parts = dict(zip(gates, np.split(blocks, len(gates)), strict=True))
    unread = np.full_like(next(iter(parts.values())), 0.3)
    return np.concatenate([parts.get(gate, unread) for gate in order])[None]


ONNX = {
    "rnn": ("RNN", "h", {}),
    "gru": ("GRU", "zrn", {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", "zrn", {}),
    "lstm": ("LSTM", "iofg", {}),
    "peephole_lstm": ("LSTM", "iofg", {}),
    "coupled_lstm": ("LSTM", "iofg", {"input_forget": 1}),
    "coupled_peephole_lstm": ("LSTM", "iofg", {"input_forget": 1}),
}
FUNCTIONS_OF_ONNX: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {
    1: (
        (("leaky_relu", 0.3),),
        {"activations": ["LeakyRelu"], "activation_alpha": [0.3]},
    ),
    2: (
        (("hard_sigmoid", 0.25, 0.5), "relu"),
        {
            "activations": ["HardSigmoid", "Relu"],
            "activation_alpha": [0.25],
            "activation_beta": [0.5],
        },
    ),
    3: (
        ("hard_sigmoid", "softsign", ("scaled_tanh", 1.5, 0.5)),
        {
            "activations": ["HardSigmoid", "Softsign", "ScaledTanh"],
            "activation_alpha": [0.2, 1.5],
            "activation_beta": [0.5, 0.5],
        },
    ),
}


@pytest.mark.parametrize("threshold", [0.0, 0.4])
@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("name", ONNX)
def test_definitions_equal_onnx_runtime(name: str, changed: bool, threshold: float) -> None:
    pytest.importorskip("onnxruntime")
    from tests.support import onnx_operators

    operator, order, attributes = ONNX[name]
    definition = getattr(cell_definitions, name)
    options, more = {}, dict[str, Any](attributes)
    if changed:
        count = len(definition.signature.options["activations"])
        options["activations"], functions = FUNCTIONS_OF_ONNX[count]
        more |= functions
    if threshold:
        more["clip"] = threshold
    H = 5
    layer = xprnn.Recurrent(definition, 4, H, clip_threshold=threshold, seed=1, **options)
    rng = np.random.default_rng(0)
    for parameter, value in layer.parameters.items():
        layer.parameters[parameter] = rng.standard_normal(value.shape).astype(np.float32)
    own = {n.removesuffix("_l0"): np.asarray(v) for n, v in layer.parameters.items()}
    x = rng.standard_normal((6, 3, 4)).astype(np.float32)
    states = [rng.standard_normal((1, 3, H)).astype(np.float32) for _ in layer._spec.state_sizes]
    biases = [in_onnx_order(definition, own[f"bias_{side}"], order) for side in ("ih", "hh")]
    arrays = {
        "X": x,
        "W": in_onnx_order(definition, own["weight_ih"], order),
        "R": in_onnx_order(definition, own["weight_hh"], order),
        "B": np.concatenate(biases, axis=1),
        **dict(zip(("initial_h", "initial_c"), states, strict=False)),
    }
    if "p_i" in own:
        unread = np.full(H, 0.3, np.float32)
        arrays["P"] = np.concatenate([own["p_i"], own["p_o"], own.get("p_f", unread)])[None]
    y, *final = onnx_operators.run(operator, {"hidden_size": H, **more}, arrays)
    output, ends = layer(x, as_argument(states))
    np.testing.assert_allclose(output, y[:, 0], rtol=0, atol=5e-6)
    for end, theirs in zip(ends if isinstance(ends, tuple) else (ends,), final, strict=True):
        np.testing.assert_allclose(end, theirs, rtol=0, atol=5e-6)


# -- errors


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("relu", "activations: expected a tuple of 2 functions, got 'relu'"),
        (("relu",), r"activations: expected 2 functions, got 1: \('relu',\)"),
        (("Relu", "tanh"), "activations: expected one of sigmoid, .*, got 'Relu'"),
        (("affine", "tanh"), "activations: expected 2 parameters of affine, got 0"),
        ((("elu", 1, 2), "tanh"), "activations: expected 0 or 1 parameters of elu, got 2"),
        ((("elu", "1"), "tanh"), r"expected numbers as parameters of elu, got \('elu', '1'\)"),
        ((3, "tanh"), "expected a name, or a tuple of a name and numbers, got 3"),
    ],
)
def test_other_activations_are_refused(value: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        xprnn.GRU(3, 4, activations=value)


def test_other_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="activations: expected 2 or 4 functions, got 3"):
        xprnn.GRU(3, 4, bidirectional=True, activations=("relu",) * 3)
    with pytest.raises(ValueError, match=r"proj_size: expected at least 1, or 0 .*, got -1"):
        xprnn.LSTM(3, 4, proj_size=-1)
    with pytest.raises(TypeError, match=r"proj_size: expected an integer, got 2\.0"):
        xprnn.LSTM(3, 4, proj_size=2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="clip_threshold: expected a number from 0, got -1"):
        xprnn.Recurrent(cell_definitions.lstm, 3, 4, clip_threshold=-1)
    with pytest.raises(AttributeError, match=r"LSTM\.proj_size cannot be set to 3: it is fixed"):
        xprnn.LSTM(3, 4).proj_size = 3
