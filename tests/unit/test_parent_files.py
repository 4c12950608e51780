"""Pickles and files that commit 8003e28 wrote load, and hold what they held.

How they were written: `tests/support/write_parent_files.py`.
"""

from __future__ import annotations

import json
import pickle
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support import parent_objects as objects
from tests.support.tolerances import error_of, tolerance

DATA = Path(__file__).parents[1] / "data"

FOLDER = DATA / "parent"
FACTS: dict[str, Any] = json.loads((FOLDER / "facts.json").read_text("utf-8"))
PROTOCOLS = sorted(int(path.stem.partition("_")[2]) for path in FOLDER.glob("protocol_*.pickle"))


@cache
def expected() -> dict[str, dict[str, np.ndarray]]:
    """The arrays by what they are of, "parameter/gru", and name."""
    found: dict[str, dict[str, np.ndarray]] = {}
    with np.load(FOLDER / "values.npz") as file:
        for path, array in file.items():
            what, _, name = path.rpartition("/")
            found.setdefault(what, {})[name] = array
    return found


def things(protocol: int) -> dict[str, dict[str, Any]]:
    """What the parent pickled, loaded anew."""
    loaded: dict[str, dict[str, Any]] = pickle.loads(
        (FOLDER / f"protocol_{protocol}.pickle").read_bytes()
    )
    return loaded


def check(found: dict[str, np.ndarray], what: str, numbers: str | None = None) -> None:
    """Values that were computed agree within what rounding explains; there may be other kernels."""
    wanted = expected()[what]
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        bound = tolerance(numbers or array.dtype, steps=objects.T, width=8, layers=2)
        assert error_of(found[name], array) <= bound, (what, name)


def check_module(name: str, module: Any) -> None:
    """Its arguments, its parameters to the last bit, and the results of a call."""
    facts = FACTS[name]
    assert type(module) is getattr(xprnn, facts["kind"])
    assert module.options == facts["options"]
    assert sorted(module.frozen) == facts["frozen"]
    for parameter, array in expected()[f"parameter/{name}"].items():
        np.testing.assert_array_equal(module.parameters[parameter], array)
    types = getattr(module, "arithmetic", None)
    check(objects.call(module), f"modules/{name}", types and str(types.compute_dtype))


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", objects.MODULES)
def test_pickled_modules(name: str, protocol: int) -> None:
    module = things(protocol)["modules"][name]
    assert module.training and module.note == name
    assert repr(module) == FACTS[name]["repr"]
    for parameter, array in expected()[f"gradient/{name}"].items():
        np.testing.assert_array_equal(module.grads[parameter], array)
    check_module(name, module)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", objects.OPTIMIZERS)
def test_pickled_optimizers_and_schedules(name: str, protocol: int) -> None:
    loaded = things(protocol)
    optimizer, schedule = loaded["optimizers"][name], loaded["schedules"][name]
    assert type(optimizer) is getattr(xprnn.optim, objects.OPTIMIZERS[name][0])
    assert optimizer.note == name and optimizer.steps == 2
    assert schedule.optimizer is optimizer
    check(objects.next_step(optimizer), f"optimizers/{name}")
    schedule.step()
    assert optimizer.lr == pytest.approx(FACTS[f"lr after the next step of {name}"], rel=1e-14)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", objects.STEPPERS)
def test_pickled_steppers(name: str, protocol: int) -> None:
    check(objects.steps_on(things(protocol)["steppers"][name]), f"steppers/{name}")


@pytest.mark.parametrize("name", objects.MODULES)
def test_files_of_modules(name: str) -> None:
    kind, place = objects.MODULES[name]
    how = {key: place[key] for key in ("compute_dtype", "precision") if key in place}
    module = xprnn.load(FOLDER / f"{name}.safetensors")
    same_kind = getattr(xprnn, kind).load(FOLDER / f"{name}.safetensors")
    assert not module.training and same_kind.options == module.options
    check_module(name, module.to(**how) if how else module)


@pytest.mark.parametrize("name", objects.OPTIMIZERS)
def test_files_of_optimizers(name: str) -> None:
    kind, options = objects.OPTIMIZERS[name]
    modules = [things(PROTOCOLS[-1])["modules"][part] for part in ("gru", "linear_float64")]
    modules[1].unfreeze()
    twin = things(PROTOCOLS[-1])["optimizers"][name]
    for module, other in zip(modules, twin.modules, strict=True):
        module.load_state_dict(other.state_dict())
    optimizer = getattr(xprnn.optim, kind)(modules, **{**options, "lr": 1.0})
    optimizer.load(FOLDER / f"{name}.safetensors")
    check(objects.next_step(optimizer), f"optimizers/{name}")


def test_the_file_of_a_schedule() -> None:
    schedule = xprnn.optim.CosineDecay(xprnn.optim.SGD([xprnn.Linear(1, 1)], 1.0), steps=5)
    schedule.load(FOLDER / "schedule.safetensors")
    schedule.step()
    expected_lr = FACTS["lr after the next step of adam"]
    assert schedule.optimizer.lr == pytest.approx(expected_lr, rel=1e-14)


def test_nothing_was_left_out() -> None:
    classes = {kind for kind, _ in objects.MODULES.values()}
    later = {"Recurrent", "RecurrentCell"}
    named = {name for name in xprnn.__all__ if hasattr(getattr(xprnn, name), "save")}
    assert classes == named - later < named
    optimizers = {kind for kind, _ in objects.OPTIMIZERS.values()}
    wanted = {name for name in xprnn.optim.__all__ if name[0].isupper()}
    assert optimizers == wanted - {"Optimizer", "CosineDecay"}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_new_pickles_name_public_modules_only(protocol: int) -> None:
    """So that the files that hold the classes may move."""
    kept = objects.pickled()
    kept.pop("steppers")
    named = _Named(pickle.dumps(kept, protocol)).names
    assert {module for module in named if module.startswith("xprnn")} == {"xprnn", "xprnn.optim"}


class _Named(pickle.Unpickler):
    """The modules that a pickle names."""

    def __init__(self, data: bytes) -> None:
        import io

        super().__init__(io.BytesIO(data))
        self.names: set[str] = set()
        self.load()

    def find_class(self, module: str, name: str) -> Any:
        self.names.add(module)
        return super().find_class(module, name)
