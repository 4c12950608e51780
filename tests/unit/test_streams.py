"""Workspaces by stream and thread, and weights that are not contiguous."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tests.support.emulator.elementwise import needs_compiler
from tests.support.implementations import SelectKernels
from tests.support.targets import arguments, arrays, forward, make
from xprnn import functional
from xprnn.backend import Backend


def test_threads_do_not_share_the_workspace_of_their_own_default_streams(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA has one handle for the default streams of all threads."""
    streams = []

    def open_stream() -> None:
        with fake_cupy.xp.cuda.Stream() as stream:
            stream.ptr = 2
            streams.append(fake_cupy.stream())

    threads = [threading.Thread(target=open_stream) for _ in range(2)]
    barrier = threading.Barrier(2)
    original = threading.get_ident
    monkeypatch.setattr("xprnn.backend.cupy.get_ident", lambda: (barrier.wait(), original())[1])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(streams)) == 2
    with fake_cupy.xp.cuda.Stream() as one, fake_cupy.xp.cuda.Stream() as other:
        assert fake_cupy.stream() == other.ptr != one.ptr


@pytest.mark.parametrize("cause", ["cudaErrorStreamCaptureImplicit: not permitted", "no device"])
def test_a_stream_that_cannot_say_whether_it_is_captured(
    cause: str, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA does not answer for the default stream while another one is captured."""
    layer = make("gru", backend="fake_cupy")
    x = fake_cupy.from_host(arguments(layer)["x"])

    def refuse(stream: Any) -> bool:
        raise RuntimeError(cause)

    expected = "is being captured" if "Capture" in cause else "no device"
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=expected):
        patch.setattr(fake_cupy.xp.cuda.Stream, "is_capturing", refuse)
        layer(x)
    layer(x)


@needs_compiler
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_functions_accept_weights_that_are_not_contiguous(
    kind: str, recorded: bool, fake_cupy: Backend, select_kernels: SelectKernels
) -> None:
    """A kernel reads contiguous rows; other weights are copied."""
    module = make({"rnn": "rnn_tanh"}.get(kind, kind))
    inputs = arguments(module)
    expected = arrays(forward(module, inputs))
    weights = []
    for weight in module.parameters.values():
        doubled = np.full((*weight.shape[:-1], 2 * weight.shape[-1]), np.nan)
        doubled[..., ::2] = weight
        weights.append(fake_cupy.from_host(doubled)[..., ::2])
    select_kernels("pointwise")
    names = ["h0", "c0"] if kind == "lstm" else ["h0"]
    states = tuple(fake_cupy.from_host(inputs[name]) for name in names)
    call = getattr(functional, f"{kind}_forward" if recorded else kind)
    results = call(
        fake_cupy.from_host(inputs["x"]), states if kind == "lstm" else states[0], *weights
    )
    for actual, wanted in zip(arrays(results[:2]), expected, strict=True):
        np.testing.assert_allclose(fake_cupy.to_host(actual), wanted, rtol=1e-12, atol=1e-13)
