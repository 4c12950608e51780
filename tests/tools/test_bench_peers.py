"""The peers of a benchmark: the same inputs for all of them, and a fair clock."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.backend.cupy import CupyBackend
from xprnn.diagnostics.tolerances import error_of, tolerance
from xprnn.diagnostics.verification.suite import LAYERS
from xprnn.tools.bench import clock, onnx, peers, steps
from xprnn.tools.bench import run as bench
from xprnn.tools.bench.task import PeerUnavailableError, Setting, make_task

SMALL = Setting("gru", hidden=5, input=3, batch=4, steps=6)

# -- the inputs of all peers


@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("kind", ["float64", "float32", "tf32", "float16"])
def test_a_task_follows_its_setting_and_is_reproducible(cell: str, kind: str) -> None:
    setting = replace(SMALL, cell=cell, kind=kind)
    task, again = make_task(setting), make_task(setting)
    assert task.x.shape == (6, 4, 3) and task.doutput.shape == (6, 4, 5)
    assert (task.layer._spec.cell.name, task.layer.training) == (cell, False)
    assert task.x.dtype == ("float64" if kind == "float64" else "float32")
    assert str(task.layer.arithmetic.compute_dtype) == setting.operand_dtype
    assert np.array_equal(task.x.astype(setting.operand_dtype), task.x)
    assert np.array_equal(task.x, again.x) and np.array_equal(task.doutput, again.doutput)
    assert all(np.array_equal(w, again.weights[n]) for n, w in task.weights.items())


@pytest.mark.parametrize("kind", ["float64", "float32", "float16"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "gru", "lstm"])
def test_torch_gets_the_same_inputs_and_agrees(cell: str, kind: str) -> None:
    torch = pytest.importorskip("torch")
    task = make_task(replace(SMALL, cell=cell, kind=kind))
    seen: list[Any] = []
    family = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[cell[:4].rstrip("_")]
    with pytest.MonkeyPatch.context() as patch:
        original = family.forward

        def watched(self: Any, x: Any) -> Any:
            seen.append((self, x, torch.is_grad_enabled()))
            return original(self, x)

        patch.setattr(family, "forward", watched)
        theirs = peers.torch_peer(task)
        del seen[:]
        theirs.forward()
        assert theirs.both is not None
        theirs.both()
    assert [recorded for *_, recorded in seen] == [False, True]
    for layer, x, _ in seen:
        assert x.dtype == getattr(torch, task.setting.operand_dtype)
        assert np.array_equal(x.detach().numpy(), task.x)
        for name, weight in layer.named_parameters():
            expected = task.weights[name].astype(task.setting.operand_dtype)
            assert np.array_equal(weight.detach().numpy(), expected)
    ours = peers.xprnn_peer(task)
    assert theirs.results.keys() == ours.results.keys()
    assert (
        f"torch.{task.setting.operand_dtype} on cpu" in theirs.note
        and torch.__version__ in theirs.note
    )
    assert "torch's results: at most" in bench.agreement(task.setting, ours, theirs)


@pytest.mark.parametrize("kind", ["float32", "float16"])
@pytest.mark.parametrize("cell", LAYERS)
def test_onnx_runtime_gets_the_same_inputs_and_agrees(cell: str, kind: str) -> None:
    pytest.importorskip("onnxruntime")
    task = make_task(replace(SMALL, cell=cell, kind=kind))
    theirs = peers.onnxruntime_peer(task)
    assert theirs.both is None and list(theirs.results) == ["output"]
    assert theirs.results["output"].dtype == kind
    (again,) = theirs.forward()
    assert np.array_equal(again[:, 0], theirs.results["output"])
    assert "at most" in bench.agreement(task.setting, peers.xprnn_peer(task), theirs)


def test_xprnn_runs_in_eval_mode_and_trains_a_copy() -> None:
    task = make_task(SMALL)
    ours = peers.xprnn_peer(task)
    assert ours.both is not None
    ours.forward()
    ours.both()
    assert not task.layer.training and not task.layer._records and not task.layer.grads.flat.any()
    train = xprnn.GRU(3, 5, seed=0).train()
    output, _ = train(task.x)
    dx, _ = train.backward(task.doutput)
    expected = {"output": output, "dx": dx, **{f"d{n}": g for n, g in train.grads.items()}}
    assert ours.results.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(ours.results[name], array)


@pytest.mark.parametrize("kind", ["float64", "float32", "float16"])
@pytest.mark.parametrize("cell", LAYERS)
@pytest.mark.parametrize("peer", steps.STEPS)
def test_a_peers_step_is_the_cells(peer: str, cell: str, kind: str) -> None:
    pytest.importorskip(peer)
    task = make_task(replace(SMALL, cell=cell, kind=kind))
    no_such_cell = peer == "torch" and cell == "gru_reset_before"
    if no_such_cell or (peer == "onnxruntime" and kind == "float64"):
        with pytest.raises(PeerUnavailableError, match=r"has no GRU|take no float64"):
            steps.STEPS[peer](task)
        return
    run_step, result = steps.STEPS[peer](task)
    run_step()
    # one layer call of one step, from the same states
    states = tuple([state[None] for state in task.states])
    output, _ = task.layer(task.x[:1], states if len(states) > 1 else states[0])
    bound = 2 * tolerance(kind, steps=1, width=8, layers=1)
    assert error_of(result(), output[0]) <= bound
    assert error_of(task.layer(task.x[:1])[0][0], output[0]) > bound  # the states matter


# -- the model's bytes


def fields(data: bytes) -> dict[int, list[Any]]:
    """The fields of a protobuf message: integers, and the rest as bytes."""
    message: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        value: Any = varint()
        if key & 7:
            assert key & 7 == 2
            value, at = data[at : at + value], at + value
        message.setdefault(key >> 3, []).append(value)
    assert at == len(data)
    return message


@pytest.mark.parametrize("cell", LAYERS)
def test_the_model_is_the_operator_with_its_weights(cell: str) -> None:
    task = make_task(replace(SMALL, cell=cell, hidden=200))
    model = fields(onnx.model(cell, task.weights, task.x.shape))
    graph, (opset,) = fields(model[7][0]), model[8]
    node = fields(graph[1][0])
    operator = {"rnn": b"RNN", "gru": b"GRU", "lst": b"LSTM"}[cell[:3]]
    assert node[4] == [operator] and node[1] == [b"x", b"W", b"R", b"B"] and node[2] == [b"y"]
    attributes = {a[1][0]: a for a in map(fields, node[5])}
    assert attributes[b"hidden_size"][3] == [200] and fields(opset) == {2: [14]}
    if cell.startswith("gru"):
        assert attributes[b"linear_before_reset"][3] == [int(cell == "gru")]
    if cell.startswith("rnn"):
        assert attributes[b"activations"][9] == [cell.removeprefix("rnn_").capitalize().encode()]
    tensors = {t[8][0]: t for t in map(fields, graph[5])}
    gates = {"rnn": [0], "gru": [1, 0, 2], "lst": [0, 3, 1, 2]}[cell[:3]]  # z r h and i o f c
    for name, parameter in ((b"W", "weight_ih_l0"), (b"R", "weight_hh_l0")):
        blocks = np.split(task.weights[parameter], len(gates))
        expected = np.concatenate([blocks[gate] for gate in gates])
        assert tensors[name][1] == [1, *expected.shape] and tensors[name][2] == [1]
        assert tensors[name][9] == [expected.tobytes()]
    (y,) = graph[12]
    dimensions = fields(fields(fields(fields(y)[2][0])[1][0])[2][0])[1]
    assert [fields(length)[1] for length in dimensions] == [[6], [1], [4], [200]]


def test_a_gpu_layer_is_not_compared_with_one_on_the_cpu() -> None:
    backend = CupyBackend("cupy:0", SimpleNamespace(), 0)
    task = SimpleNamespace(setting=SMALL, layer=SimpleNamespace(backend=backend))
    for name, make in bench.PEERS.items():
        module = pytest.importorskip(name)
        if name == "torch" and module.cuda.is_available():
            continue
        with pytest.raises(PeerUnavailableError, match=r"no (usable CUDA|CUDAEx)"):
            make(task)  # type: ignore[arg-type]


@pytest.mark.parametrize("allowed", [True, False])
def test_torchs_tf32_follows_the_layer(allowed: bool) -> None:
    new = SimpleNamespace(
        cudnn=SimpleNamespace(rnn=SimpleNamespace()), cuda=SimpleNamespace(matmul=SimpleNamespace())
    )
    peers._set_tf32(SimpleNamespace(backends=new), allowed)
    wanted = "tf32" if allowed else "ieee"
    assert new.cudnn.rnn.fp32_precision == new.cuda.matmul.fp32_precision == wanted
    old = SimpleNamespace(cudnn=SimpleNamespace(), cuda=SimpleNamespace(matmul=SimpleNamespace()))
    peers._set_tf32(SimpleNamespace(backends=old), allowed)
    assert old.cudnn.allow_tf32 is old.cuda.matmul.allow_tf32 is allowed


# -- the clock


def test_calls_are_warmed_up_and_sampled_in_interleaved_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, calls = [0.0], []

    def function(name: str, seconds: float) -> Any:
        def call() -> None:
            now[0] += seconds
            calls.append(name)

        return call

    def seconds(call: Any, repeats: int) -> float:
        start = now[0]
        for _ in range(repeats):
            call()
        calls.append(f"|{repeats}")
        return now[0] - start

    monkeypatch.setattr(clock.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(clock, "BUDGET", 1.0)
    samples = clock.measure([function("a", 0.01), function("b", 5e-4)], seconds)
    assert " ".join(calls[:10]) == "a a |2 b b |2 a |1 b |1"
    rounds = " ".join(calls[10:])
    one = "a |1 a |1 b |1 b b b b |4"
    assert rounds == " ".join([one] * len(samples[0]))
    assert len(samples[0]) == len(samples[1]) == 45  # of 22.5 ms, the last begun at 0.99 s
    np.testing.assert_allclose(samples[0], 0.01)
    np.testing.assert_allclose(samples[1], 5e-4)
    monkeypatch.setattr(clock, "BUDGET", 0.0)
    assert len(clock.measure([function("a", 1.0)], seconds)[0]) == clock.ROUNDS[0]
    monkeypatch.setattr(clock, "BUDGET", 1e9)
    assert len(clock.measure([function("a", 1.0)], seconds)[0]) == clock.ROUNDS[1]


def test_the_time_on_a_gpu_is_that_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self) -> None:
            self.name = f"event {sum('new' in line for line in log)}"
            log.append(f"new {self.name}")

        def record(self) -> None:
            log.append(f"record {self.name}")

        def synchronize(self) -> None:
            log.append(f"wait for {self.name}")

    class Device:
        def __init__(self, number: int) -> None:
            self.number = number

        def __enter__(self) -> None:
            log.append(f"device {self.number}")

        def __exit__(self, *error: Any) -> None:
            log.append("end")

        def synchronize(self) -> None:
            log.append("wait")

    cuda = SimpleNamespace(
        Event=Event,
        Device=Device,
        get_elapsed_time=lambda start, stop: 2.5 if stop.name > start.name else -1.0,
        get_current_stream=lambda: SimpleNamespace(is_capturing=lambda: False, ptr=0),
    )
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
    timer = clock.timer(CupyBackend("cupy:3", SimpleNamespace(cuda=cuda), 3))
    assert timer(lambda: log.append("call"), 2) == 0.0025
    order = [line for line in log if not line.startswith(("new", "device", "end"))]
    assert order == ["wait", "record event 0", "call", "call", "record event 1", "wait for event 1"]
    assert "device 3" in log
