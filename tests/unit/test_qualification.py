"""Qualifications: the format and its checks, which files are read, and what they select."""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.qualifications import corners, make, preferring, row, write
from xprnn.kernels import qualification
from xprnn.kernels.qualification import (
    COLUMNS,
    FAULTS,
    IMPLEMENTATIONS,
    MARGIN,
    MAX_BYTES,
    MAX_TEXT,
    NOTHING,
    OUTCOMES,
    Choice,
    Found,
    Qualification,
    QualificationError,
    Row,
    Shape,
    as_json,
    find,
    parse,
)

HERE = {"device": "a GPU", "driver": "1"}
VALID = make(
    [
        row(),
        row(implementation="sequence", outcome="wrong", error=3.5, detail="dW_hh, T=10: 3 × ε"),
        row(implementation="reference", error=0.0, microseconds=None, bound=None),
        row(kind="step", T=1, dtype="bfloat16", cell="lstm"),
    ],
)


# -- the format


def test_a_file_has_what_was_written() -> None:
    for each in (VALID, make()):
        assert parse(as_json(each).encode()) == each
    assert parse(as_json(VALID).encode()).digest == VALID.digest
    assert VALID.digest != replace(VALID, date="2026-12-04").digest
    assert re.fullmatch(r"[0-9a-f]{8}", VALID.digest)


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_only_what_was_right_and_timed_counts(outcome: str) -> None:
    assert row(outcome=outcome, microseconds=1.0).right == (outcome == "right")
    assert row(outcome=outcome).faulty == (outcome in FAULTS)
    assert not row(outcome=outcome, microseconds=None).right


def changed(**fields: Any) -> bytes:
    return json.dumps({**json.loads(as_json(VALID)), **fields}).encode()


def with_row(**values: Any) -> bytes:
    columns = {name: getattr(row(), name) for name in COLUMNS} | values
    return changed(rows=[list(columns.values())])


def without(name: str) -> bytes:
    content = json.loads(as_json(VALID))
    del content[name]
    return json.dumps(content).encode()


DEEP = b"[" * 10_000 + b"]" * 10_000
INVALID: list[tuple[bytes, str]] = [
    (b"", "not JSON: JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    (b"{", "not JSON: JSONDecodeError"),
    (b"\xff\xfe", "not JSON: UnicodeDecodeError"),
    (DEEP, "not JSON: RecursionError"),
    (b"1" * 5000, "not JSON: ValueError"),
    (changed(seconds=1).replace(b'"seconds": 1', b'"seconds": NaN'), "NaN is not a number of JSON"),
    (b" " * MAX_BYTES + b" ", "expected at most 4,000,000 bytes, got 4,000,001"),
    (b"[]", "expected an object with the fields ['columns', 'date'"),
    (b"{}", "expected an object with the fields ['columns', 'date'"),
    (changed(more=1), "expected an object with the fields ['columns', 'date'"),
    *[(without(name), "expected an object with the fields") for name in json.loads(changed())],
    (changed(format="xprnn qualification 2"), "format: expected 'xprnn qualification 1', got 'xpr"),
    (changed(format=["xprnn qualification 1"]), "format: expected 'xprnn qualification 1', got ["),
    (changed(columns=[*COLUMNS][::-1]), "columns: expected ['cell', 'dtype', 'kind', "),
    (changed(identity=[]), "identity: expected an object of at most 100 texts"),
    (changed(identity={str(n): "" for n in range(101)}), "identity: expected an object of at most"),
    (changed(identity={"cupy": "14.2.0"}), "identity: expected a field 'device'"),
    (changed(identity={"device": 1}), "identity: 'device': expected a printable text, got 1"),
    (changed(identity={"device": "a\nb"}), "identity: 'device': expected a printable text, got 'a"),
    (changed(identity={"device": "\ud800"}), "identity: 'device': expected a printable text"),
    (
        changed(identity={"device": "x" * (MAX_TEXT + 1)}),
        "identity: 'device': expected a printable",
    ),
    (changed(identity={"device": "", "\0": ""}), r"identity: '\x00': expected a printable text"),
    (changed(facts=None), "facts: expected an object of at most 100 texts"),
    (changed(facts={"a": None}), "facts: 'a': expected a printable text, got None"),
    *[
        (changed(date=value), f"date: expected YYYY-MM-DD, got {value!r}")
        for value in ("2026-13-03", "20261203", "2026-W49-4", "", "٢٠٢٦-12-03", None, 20261203)
    ],
    *[
        (changed(seconds=value), f"seconds: expected a number of at least 0, got {value!r}")
        for value in (-1, True, "1", None, 1e300)
    ],
    (
        changed(seconds=1).replace(b'"seconds": 1', b'"seconds": 1e999'),
        "seconds: expected a number",
    ),
    (changed(rows={}), "rows: expected a list"),
    (changed(rows=[{}]), "rows[0]: expected 14 values"),
    (changed(rows=[[*range(13)]]), "rows[0]: expected 14 values"),
    (changed(rows=json.loads(changed())["rows"][:1] * 2), "rows: two have the same call and impl"),
    (with_row(cell=3), "rows[0]: cell: expected a printable text, got 3"),
    (with_row(dtype="int8"), "rows[0]: dtype: expected one of float64, float32, tf32, float16, bf"),
    (with_row(dtype=["float32"]), "rows[0]: dtype: expected one of"),
    (with_row(kind="backward"), "rows[0]: kind: expected one of forward, training, step; got 'ba"),
    (with_row(implementation="auto"), "rows[0]: implementation: expected one of reference, point"),
    (with_row(outcome="Right"), "rows[0]: outcome: expected one of right, wrong, timed out, ended"),
    (with_row(default=1), "rows[0]: default: expected true or false, got 1"),
    *[
        (with_row(**{name: value}), f"rows[0]: {name}: expected an integer > 0, got")
        for name in ("N", "I", "H", "T")
        for value in (0, -1, 1.0, True, "1", None, 1 << 40)
    ],
    *[
        (with_row(**{name: value}), f"rows[0]: {name}: expected a number of at least 0, got")
        for name in ("error", "microseconds", "bound")
        for value in (-1, True, "1", [], 10**400)
    ],
    (with_row(microseconds=0), "rows[0]: microseconds: expected more than 0"),
    (with_row(error=None), "rows[0]: right, with the error None"),
    (with_row(error=1.5), "rows[0]: right, with the error 1.5"),
    (with_row(detail="\x1b[31m"), "rows[0]: detail: expected a printable text"),
]


@pytest.mark.parametrize(("data", "message"), INVALID, ids=[f"{n}" for n in range(len(INVALID))])
def test_another_form_is_refused_with_what_is_wrong(data: bytes, message: str) -> None:
    with pytest.raises(QualificationError, match=re.escape(message)):
        parse(data)


def test_every_field_has_a_refused_value() -> None:
    names = {name for _, message in INVALID for name in re.findall(r"\w+", message)}
    assert {field.name for field in [*fields(Row), *fields(Qualification)]} <= names


# -- what is selected


def chosen(rows: list[Row], *shape: int, default: str = "pointwise") -> Choice | None:
    return make(rows).choice("gru", "float32", "forward", Shape(*shape), default)


def name_of(rows: list[Row], *shape: int, default: str = "pointwise") -> str | None:
    choice = chosen(rows, *shape, default=default)
    return choice and choice.implementation


@pytest.mark.parametrize("best", IMPLEMENTATIONS)
@pytest.mark.parametrize("default", IMPLEMENTATIONS)
def test_the_fastest_replaces_the_default(best: str, default: str) -> None:
    rows, expected = preferring(best), None if best == default else best
    assert name_of(rows, 1, 1, 1, default=default) == expected  # at a shape of the grid
    assert name_of(rows, 64, 512, 512, default=default) == expected
    assert name_of(rows, 33, 100, 7, default=default) == expected  # between them
    assert name_of(rows, 33, 100, 9999, default=default) == expected  # more steps
    for outside in ((0, 1, 1), (65, 1, 1), (1, 513, 1), (1, 1, 0)):
        assert name_of(rows, *outside, default=default) is None


def test_another_call_is_not_decided() -> None:
    qualified, shape = make(preferring("sequence")), Shape(8, 8, 8)
    assert qualified.choice("gru", "float32", "training", shape, "pointwise")
    for call in (
        ("lstm", "float32", "training"),
        ("gru", "float16", "training"),
        ("gru_reset_before", "float32", "training"),
    ):
        assert qualified.choice(*call, shape, "pointwise") is None


def replaced(rows: list[Row], where: dict[str, Any], **changes: Any) -> list[Row]:
    """The rows, one of which is another; without changes, it is missing."""
    matching = [r for r in rows if all(getattr(r, k) == v for k, v in where.items())]
    assert len(matching) == 1
    others = [r for r in rows if r is not matching[0]]
    return [*others, replace(matching[0], **changes)] if changes else others


CORNER = {"kind": "forward", "N": 1, "H": 512, "T": 1}


@pytest.mark.parametrize("outcome", [None, "untimed", *OUTCOMES[1:]])
def test_one_corner_where_it_was_not_right_suffices(outcome: str | None) -> None:
    changes: dict[str, Any] = {"outcome": outcome, "microseconds": None}
    if outcome == "untimed":
        changes["outcome"] = "right"
    where = {**CORNER, "implementation": "sequence"}
    rows = replaced(preferring("sequence"), where, **(changes if outcome else {}))
    assert name_of(rows, 8, 8, 8) is None
    assert name_of(rows, 1, 512, 1) is None
    assert name_of(rows, 64, 512, 8) == "sequence"  # where that corner is not one of the call's


@pytest.mark.parametrize("outcome", FAULTS)
def test_a_default_with_a_fault_is_replaced(outcome: str) -> None:
    """By the fastest that was right, even if it is slower."""
    where = {**CORNER, "implementation": "pointwise"}
    rows = replaced(preferring("pointwise"), where, outcome=outcome, microseconds=None)
    choice = chosen(rows, 8, 8, 8)
    assert choice and choice.implementation in ("reference", "sequence")
    assert choice.reason.endswith("; pointwise was not right there")
    assert chosen(rows, 64, 512, 8) is None


@pytest.mark.parametrize("outcome", [None, "untimed", "unsupported"])
def test_a_default_that_was_not_compared_stays(outcome: str | None) -> None:
    where = {**CORNER, "implementation": "pointwise"}
    changes: dict[str, Any] = {"outcome": outcome, "microseconds": None}
    if outcome == "untimed":
        changes["outcome"] = "right"
    rows = replaced(preferring("sequence"), where, **(changes if outcome else {}))
    assert chosen(rows, 8, 8, 8) is None
    assert name_of(rows, 64, 512, 8) == "sequence"


def test_nothing_was_right() -> None:
    rows = [r for name in IMPLEMENTATIONS for r in corners(implementation=name, outcome="wrong")]
    for default in IMPLEMENTATIONS:
        assert chosen(rows, 8, 8, 8, default=default) is None


def test_a_shape_of_the_grid_is_missing() -> None:
    rows = [r for r in preferring("sequence") if (r.N, r.H, r.T) != (1, 512, 1)]
    assert chosen(rows, 8, 8, 8) is None
    assert name_of(rows, 64, 512, 8) == "sequence"


@pytest.mark.parametrize(("factor", "expected"), [(1.001, "sequence"), (0.999, None)])
def test_the_margin_counts_at_every_corner(factor: float, expected: str | None) -> None:
    where = {**CORNER, "implementation": "pointwise"}
    rows = replaced(preferring("sequence"), where, microseconds=10 * MARGIN * factor)
    assert name_of(rows, 8, 8, 8) == expected


def test_the_best_without_the_margin_leaves_the_second() -> None:
    """The reference is fastest on the average but not at every corner."""
    grid = {"N": (1, 9), "H": (4,), "T": (5,)}
    times = {"reference": (1.0, 100.0), "pointwise": (100.0, 100.0), "sequence": (50.0, 50.0)}
    rows = [
        replace(each, microseconds=time)
        for name, both in times.items()
        for each, time in zip(corners(grid, implementation=name), both, strict=True)
    ]
    choice = chosen(rows, 5, 4, 5)
    assert choice and choice.implementation == "sequence"
    assert choice.reason.endswith(", 2.0 times as fast as pointwise")


def test_the_reason_names_the_file_the_error_and_the_factor() -> None:
    rows = preferring("sequence")
    rows = replaced(rows, {**CORNER, "implementation": "sequence"}, error=0.41)
    choice = chosen(rows, 8, 8, 8)
    assert choice and choice.reason == (
        f"qualified 2026-12-03 on a GPU (file {make(rows).digest}), worst error 0.41 of the limit, "
        "2.0 times as fast as pointwise"
    )


# -- the files of this machine

Set = Callable[[object], None]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Set:
    return lambda value: monkeypatch.setenv("XPRNN_QUALIFIED", str(value))


def found() -> Found:
    return find("cuda", lambda: HERE)


def refused() -> str:
    result = found()
    assert result.qualification is result.path is None
    return result.why_not


def test_the_latest_of_this_machine_counts(tmp_path: Path, environment: Set) -> None:
    environment(tmp_path)
    dates = ("2025-01-01", "2026-12-03", "2026-11-30")
    for number, date in enumerate(dates):
        write(tmp_path / f"cuda-{number}.json", make(date=date))
    write(tmp_path / "cuda-3.json", make(date="2030-01-01", identity={**HERE, "driver": "2"}))
    write(tmp_path / "numba-4.json", make(date="2030-01-01"))  # of other kernels
    (tmp_path / "cuda-5.json").write_text("{")
    (tmp_path / "cuda-6.json").mkdir()
    result = found()
    assert result == (make(date="2026-12-03"), tmp_path / "cuda-1.json", "")


def test_another_identity_is_named_and_logged(
    tmp_path: Path, environment: Set, caplog: pytest.LogCaptureFixture
) -> None:
    environment(tmp_path)
    stale = {"device": "a GPU", "driver": "0", "cupy": "13"}
    path = write(tmp_path / "cuda-1.json", make(identity=stale))
    expected = f"{path}: driver: 0 in the file, 1 here; cupy: 13 in the file, nothing here"
    assert refused() == expected
    assert caplog.messages == [f"qualification not used: {expected}"]
    (tmp_path / "cuda-0.json").write_text("{}")
    assert refused() == f"{expected}; nor 1 other files"
    assert "cuda-0.json: expected an object" in caplog.messages[1]


def fifo(path: Path) -> None:
    os.mkfifo(path)


def loop(path: Path) -> None:
    path.symlink_to(path)


CONTENTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "damaged": (lambda path: path.write_text(as_json(make())[:-9]), "not JSON: JSONDecodeError"),
    "foreign JSON": (lambda path: path.write_text('{"a": 1}'), "expected an object with the fie"),
    "empty": (lambda path: path.touch(), "not JSON: JSONDecodeError"),
    "not UTF-8": (lambda path: path.write_text(as_json(make()), "utf-16"), "not JSON: Unicode"),
    "huge": (lambda path: os.truncate(path.touch() or path, 1 << 40), "expected at most 4,000,000"),
    "a pipe": (fifo, "not a regular file"),
    "a folder": (lambda path: path.mkdir(), "not a regular file"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "a loop": (loop, "Too many levels of symbolic links"),
    "a link to nothing": (lambda path: path.symlink_to("nothing"), "No such file or directory"),
}


@pytest.mark.parametrize("kind", CONTENTS)
@pytest.mark.parametrize("named", [True, False], ids=["named", "in a folder"])
def test_what_is_no_qualification_is_not_used(
    kind: str, named: bool, tmp_path: Path, environment: Set
) -> None:
    path = tmp_path / "cuda-1.json"
    create, message = CONTENTS[kind]
    create(path)
    environment(path if named else tmp_path)
    if named and kind == "a folder":
        message = "no file cuda-*.json"
    assert refused().startswith(f"{path}: {message}")


@pytest.mark.parametrize("method", ["iterdir", "is_dir", "stat"])
def test_errors_of_the_system_are_named(
    method: str, tmp_path: Path, environment: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, **_: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    write(tmp_path / "cuda-1.json", make())
    environment(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        why_not = refused()
    assert re.fullmatch(rf"{re.escape(str(tmp_path))}(/cuda-1.json)?: Permission denied", why_not)


def test_a_file_that_is_requested(
    tmp_path: Path, environment: Set, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = tmp_path / "missing.json"
    environment(missing)
    assert refused() == f"{missing}: No such file or directory"
    environment(tmp_path)
    assert refused() == f"{tmp_path}: no file cuda-*.json"
    path = write(tmp_path / "any name", make())
    link, folder = tmp_path / "link", tmp_path / "folder link"
    link.symlink_to(path)
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "cuda-1.json", make())
    folder.symlink_to("folder")
    for value in (path, link, folder):
        environment(value)
        assert found().qualification == make()
    monkeypatch.chdir(tmp_path)
    environment("any name")
    assert found() == (make(), Path("any name"), "")
    environment("off")
    assert found() == NOTHING


def test_a_path_of_any_bytes_is_printable(tmp_path: Path, environment: Set) -> None:
    environment(os.fsdecode(bytes(tmp_path) + b"/\xff.json"))
    assert refused().encode() == bytes(tmp_path) + rb"/\xff.json: No such file or directory"


def test_the_folder_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XPRNN_QUALIFIED", "")
    monkeypatch.setattr(qualification, "folder", lambda: tmp_path / "missing")
    assert found() == NOTHING
    monkeypatch.setattr(qualification, "folder", lambda: tmp_path)
    assert found() == NOTHING
    path = write(tmp_path / "cuda-1.json", make())
    assert found() == (make(), path, "")


def test_no_identity_is_determined_without_a_file(tmp_path: Path, environment: Set) -> None:
    def fail() -> dict[str, str]:
        pytest.fail("the identity was determined")

    for value in (tmp_path, "off"):
        environment(value)
        assert find("cuda", fail).qualification is None


@pytest.mark.skipif(os.name != "posix", reason="the folder does not depend on HOME")
def test_without_a_home_there_is_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    pwd = pytest.importorskip("pwd", reason="there are no accounts")

    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    folder = qualification.folder()
    assert folder and folder.parts[-2:] == ("xprnn", "qualified")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert qualification.folder() is None
    monkeypatch.delenv("XPRNN_QUALIFIED")
    assert found() == NOTHING


def test_reading_is_quiet_where_a_file_is_used(
    tmp_path: Path, environment: Set, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    environment(write(tmp_path / "cuda-1.json", make()))
    assert found().qualification and not caplog.messages


@pytest.mark.parametrize(
    ("at_2", "at_32", "takes"),
    [
        ((8.0, 4.0), (80.0, 40.0), "pointwise"),
        ((40.0, 10.0), (70.0, 40.0), None),  # only a part that does not depend on T is faster
        ((40.0, 10.0), (72.9, 40.0), None),  # by less than a tenth a step
        ((40.0, 10.0), (73.1, 40.0), "pointwise"),
        ((4.0, 8.0), (40.0, 40.0), None),  # faster steps, but not in a call of 32
        ((90.0, 45.0), (80.0, 40.0), None),  # times that decrease say nothing
        ((None, 4.0), (80.0, 40.0), None),
        ((8.0, None), (80.0, 40.0), None),
    ],
)
def test_more_steps_than_were_measured(
    at_2: tuple[float | None, float | None], at_32: tuple[float, float], takes: str | None
) -> None:
    """It must be faster in the largest number, and in the steps that it has more than the next."""
    rows = [
        row(implementation=name, microseconds=time, T=T)
        for T, times in ((2, at_2), (32, at_32))
        for name, time in zip(("sequence", "pointwise"), times, strict=True)
    ]
    assert name_of(rows, 8, 16, 33, default="sequence") == takes
    faulty = [
        replace(r, outcome="wrong", microseconds=None) if r.implementation == "sequence" else r
        for r in rows
        if r.microseconds is not None
    ]
    assert name_of(faulty, 8, 16, 33, default="sequence") == "pointwise"


def test_one_number_of_steps_says_nothing_about_more() -> None:
    rows = preferring("sequence", {"N": (8,), "H": (16,), "T": (32,)})
    assert name_of(rows, 8, 16, 32) == "sequence"
    assert name_of(rows, 8, 16, 33) is None


def test_the_digest_of_sources_depends_on_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "some_kernels"
    package.mkdir()
    for name in ("__init__.py", "a.cu", "b.h"):
        (package / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    digests = [qualification.sources_digest("some_kernels")]
    for name in ("a.cu", "b.h", "c.py"):
        (package / name).write_text("other")
        digests.append(qualification.sources_digest("some_kernels"))
    (package / "a.pyc").write_text("other")
    assert len({*digests}) == 4
    assert qualification.sources_digest("some_kernels") == digests[-1]
