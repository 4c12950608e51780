"""What a call shares with others: scratch by stream and thread, and arrays that stand apart."""

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


def test_threads_do_not_share_the_scratch_of_their_own_default_streams(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CUDA has one address for the default streams of all threads."""
    found = []

    def ask() -> None:
        with fake_cupy.xp.cuda.Stream() as stream:
            stream.ptr = 2
            found.append(fake_cupy.stream())

    threads = [threading.Thread(target=ask) for _ in range(2)]
    barrier = threading.Barrier(2)
    genuine = threading.get_ident
    monkeypatch.setattr("xprnn.backend.cupy.get_ident", lambda: (barrier.wait(), genuine())[1])
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2
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

    monkeypatch.setattr(fake_cupy.xp.cuda.Stream, "is_capturing", refuse)
    expected = "is being captured" if "Capture" in cause else "no device"
    with pytest.raises(RuntimeError, match=expected):
        layer(x)
    monkeypatch.undo()
    layer(x)


@needs_compiler
@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("kind", ["rnn", "gru", "lstm"])
def test_functions_take_weights_whose_elements_stand_apart(
    kind: str, recorded: bool, fake_cupy: Backend, select_kernels: SelectKernels
) -> None:
    """A kernel reads contiguous rows, whatever the caller has."""
    module = make({"rnn": "rnn_tanh"}.get(kind, kind))
    given = arguments(module)
    expected = arrays(forward(module, given))
    weights = []
    for weight in module.parameters.values():
        doubled = np.full((*weight.shape[:-1], 2 * weight.shape[-1]), np.nan)
        doubled[..., ::2] = weight
        weights.append(fake_cupy.from_host(doubled)[..., ::2])
    select_kernels("pointwise")
    names = ["h0", "c0"] if kind == "lstm" else ["h0"]
    states = tuple(fake_cupy.from_host(given[name]) for name in names)
    call = getattr(functional, f"{kind}_forward" if recorded else kind)
    results = call(
        fake_cupy.from_host(given["x"]), states if kind == "lstm" else states[0], *weights
    )
    for found, wanted in zip(arrays(results[:2]), expected, strict=True):
        np.testing.assert_allclose(fake_cupy.to_host(found), wanted, rtol=1e-12, atol=1e-13)
