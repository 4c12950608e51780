"""Without CuPy or a GPU, simulated by a fake CuPy: the error texts, and what "auto" does."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import xprnn
from tests.support.targets import arguments, forward, make
from xprnn.backend import optional
from xprnn.backend import registry as backend_module
from xprnn.tools import info


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Clear the cached choices before and after each test."""
    monkeypatch.delenv("XPRNN_BACKEND", raising=False)
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    forget()
    yield
    forget()


def forget() -> None:
    backend_module._opened.clear()
    for chosen in (backend_module._auto, backend_module.auto_choice):
        chosen.cache_clear()
    optional._failures.clear()


@pytest.fixture
def no_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without CuPy, whatever this one has."""
    monkeypatch.setitem(sys.modules, "cupy", None)


def layer_backend(**options: Any) -> str:
    """The backend of a new layer."""
    return str(xprnn.GRU(3, 5, seed=0, **options).backend.name)


def test_without_cupy_the_error_names_the_extras(
    no_cupy: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    for name in ("cupy", "cupy:0", "cupy:1"):
        with pytest.raises(xprnn.BackendUnavailableError) as caught:
            xprnn.GRU(3, 5, backend=name)
        for part in ("CuPy is not installed", "xprnn[cuda12]", "xprnn[cuda13]"):
            assert part in str(caught.value)
        assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_on_macos_the_error_names_no_extra(no_cupy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(
        xprnn.BackendUnavailableError, match="CuPy has no build for macOS"
    ) as caught:
        xprnn.get_backend("cupy")
    assert "pip install" not in str(caught.value)
    assert layer_backend(backend="auto") == "numpy"


def test_a_cupy_that_fails_to_import(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise ImportError('libcudart.so.12: not found')", "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    for _ in range(2):  # Python imports it only once; the failure is cached
        with pytest.raises(
            xprnn.BackendUnavailableError, match=r"fails to import: libcudart.so.12"
        ):
            xprnn.get_backend("cupy")
        (tmp_path / "cupy.py").write_text(
            "raise AttributeError('partially initialized module')", "utf-8"
        )


def fake_cupy(
    count: int | Exception,
    built: int = 12090,
    driver: int = 0,
    version: str = "14.2.0",
    is_hip: bool = False,
) -> Any:
    """The part of CuPy that is read before it is layer_backend: devices, versions, libraries."""

    def devices() -> int:
        if isinstance(count, Exception):
            raise count
        return count

    runtime = SimpleNamespace(
        is_hip=is_hip,
        getDeviceCount=devices,
        runtimeGetVersion=lambda: built,
        driverGetVersion=lambda: driver,
        getDeviceProperties=lambda device: {
            "name": b"Tesla T4",
            "major": 7,
            "minor": 5,
            "totalGlobalMem": 16 * 2**30,
        },
    )
    nvrtc = SimpleNamespace(getVersion=lambda: (12, 9))
    cuda = SimpleNamespace(runtime=runtime, nvrtc=nvrtc, cublas=None)
    return SimpleNamespace(__version__=version, cuda=cuda)


NO_DEVICE = "cudaErrorNoDevice: no CUDA-capable device is detected"
OLD_DRIVER = "cudaErrorInsufficientDriver: CUDA driver version is insufficient"
UNSUITED = "cudaErrorSystemDriverMismatch: unsupported display driver / cuda driver combination"
CAUSES = {  # CUDA's error, the versions of CuPy's CUDA and of the driver, our message
    "no driver": (OLD_DRIVER, 12090, 0, "CuPy 14.2.0 finds no NVIDIA driver"),
    "old driver": (
        *(OLD_DRIVER, 13000, 12020),
        "CuPy 14.2.0 is built for CUDA 13.0, the driver for CUDA 12.2; update the driver or "
        "install CuPy for CUDA 12",
    ),
    "no device": (NO_DEVICE, 12090, 13010, "find no GPU; CUDA_VISIBLE_DEVICES is '7'"),
    "another": (UNSUITED, 12090, 12040, "for CUDA 12.9 with a driver for 12.4 finds no GPU: .*/ c"),
}


@pytest.mark.parametrize(
    ("reported", "built", "driver", "text"), CAUSES.values(), ids=CAUSES.keys()
)
def test_a_cupy_without_a_gpu(
    reported: str, built: int, driver: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = RuntimeError(reported)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(error, built, driver))
    with pytest.raises(xprnn.BackendUnavailableError, match=text) as caught:
        xprnn.get_backend("cupy")
    assert reported.partition(":")[0] in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(("name", "count"), [("cupy:2", 2), ("cupy", 0), ("cupy:99", 1)])
def test_a_device_that_does_not_exist(
    name: str, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(count))
    with pytest.raises(xprnn.BackendUnavailableError, match="no such device; this machine has"):
        xprnn.get_backend(name)


def test_auto_falls_back_and_logs_it_once(
    no_cupy: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with caplog.at_level(logging.DEBUG, "xprnn"):
        assert layer_backend(backend="auto") == "numpy"
        assert layer_backend(backend="auto") == "numpy"
        with xprnn.use_backend("auto") as backend:
            assert backend.name == "numpy"
        monkeypatch.setenv("XPRNN_BACKEND", "auto")
        assert layer_backend() == "numpy"
    assert len(caplog.records) == 1
    assert (caplog.records[0].name, caplog.records[0].levelname) == ("xprnn", "WARNING")
    assert "'auto' chose numpy" in caplog.text
    assert "CuPy is not installed" in caplog.text


def test_auto_logs_that_it_selects_the_gpu(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(2))
    assert "auto" in info.backends()  # which logs nothing
    with caplog.at_level(logging.DEBUG, "xprnn"):
        assert xprnn.get_backend("auto") is xprnn.get_backend("auto") is xprnn.get_backend("cupy")
    assert [record.levelname for record in caplog.records] == ["INFO"]
    reported = "cupy:0: Tesla T4, compute capability 7.5, 16 GiB"
    assert f"'auto' chose {reported}" in caplog.text
    rows = info.backends()
    assert rows["auto"] == reported
    assert rows["cupy:1"] == "usable: Tesla T4, compute capability 7.5, 16 GiB"


def test_info_reports_the_fallback_of_auto(no_cupy: None) -> None:
    rows = info.backends()
    assert rows["auto"] == f"numpy: {rows['cupy'].removeprefix('not usable: ')}"
    assert "CuPy is not installed" in rows["auto"]


def test_one_object_per_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(2))
    first = xprnn.get_backend("cupy")
    assert first.name == "cupy:0"
    assert first is xprnn.get_backend("cupy:0") is xprnn.get_backend("cupy:00")
    assert xprnn.get_backend("cupy:1") is not first


def test_libraries_that_are_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(SimpleNamespace):
        def __getattr__(self, name: str) -> Any:  # as `cupy.cuda` does
            raise ImportError('Failure finding "libcublas.so": searched in vain')

    cupy = fake_cupy(1)
    cupy.cuda = Lazy(runtime=cupy.cuda.runtime, nvrtc=cupy.cuda.nvrtc)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(xprnn.BackendUnavailableError, match=r"libraries of CUDA 12.9.*libcublas"):
        xprnn.get_backend("cupy")


def test_only_auto_falls_back(no_cupy: None, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make("gru")
    monkeypatch.setenv("XPRNN_BACKEND", "cupy")
    for use in (
        lambda: xprnn.GRU(3, 5),
        lambda: xprnn.use_backend("cupy").__enter__(),
        lambda: layer.to("cupy"),
        lambda: xprnn.asarray([1.0]),
    ):
        with pytest.raises(xprnn.BackendUnavailableError):
            use()
    assert layer.backend.name == "numpy"
    forward(layer, arguments(layer))


OLD = ("14.0", "14.0.1", "14.1.1", "13.6.0", "9.6.0", "14.1.0rc1", "unknown")


@pytest.mark.parametrize("version", OLD)
def test_a_cupy_that_compiles_anew_in_every_process(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(1, version=version))
    with pytest.raises(
        xprnn.BackendUnavailableError,
        match=rf"CuPy {version} is installed, expected 14\.2 or later",
    ):
        xprnn.get_backend("cupy")
    assert layer_backend(backend="auto") == "numpy"
    assert f"CuPy {version} is installed" in info.backends()["auto"]


@pytest.mark.parametrize("version", ["14.2.0", "14.2.0rc1", "14.10.0", "15.0.0a1"])
def test_a_cupy_that_is_new_enough(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(1, version=version))
    assert xprnn.get_backend("cupy").name == "cupy:0"


def test_a_cupy_for_rocm_is_refused_by_name(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reports devices, but the kernels are PTX."""
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(1, is_hip=True))
    with pytest.raises(
        xprnn.BackendUnavailableError,
        match=r"CuPy 14\.2\.0 is built for ROCm, and the kernels are PTX",
    ):
        xprnn.GRU(3, 5, backend="cupy")
    with caplog.at_level(logging.WARNING, "xprnn"):
        assert layer_backend(backend="auto") == "numpy"
    assert "built for ROCm" in caplog.text and "built for ROCm" in info.backends()["cupy"]
