"""The table of qualified devices, and asv's results from stored qualifications."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from benchmarks import qualified, reports, result_store
from benchmarks.qualified import (
    HEAD,
    MARKS,
    NAME,
    NOTHING,
    PAGE,
    PICTURE,
    PICTURE_MARKS,
    RESULTS,
    picture,
    picture_section,
    pictured,
    section,
)
from tests.support.qualifications import Rows, make, preferring
from tests.support.qualifications import write as write_file
from xprnn.kernels.qualification import Qualification, sources_digest

ROOT = Path(__file__).parents[2]
GRID = {"N": (1, 8), "H": (16,), "T": (4,)}


def defaults(rows: Rows, name: str = "pointwise") -> Rows:
    """The same rows, where "auto" takes `name` without the file."""
    return [replace(each, default=each.implementation == name) for each in rows]


def stored(rows: Rows, **changes: Any) -> Qualification:
    identity = {"device": "Fake H200", "cupy": "14.2.0", "sources": "0" * 16}
    facts = {"backend": "cupy", "kernels": "cuda", "python": "3.11.9", "xprnn": "0.2.0"}
    facts |= {"system": "Linux", "machine": "x86_64", "threads": "16"}
    return make(rows, **{"identity": identity, "facts": facts, **changes})


FASTER = stored(defaults(preferring("sequence", GRID)))


def file(folder: Path, content: Qualification) -> Path:
    folder.mkdir(parents=True)
    return write_file(folder / NAME, content)


# -- the picture


def words_of(svg: str) -> list[list[str]]:
    """The words of each line of a picture."""
    lines: dict[float, list[str]] = {}
    for each in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text"):
        if each.get("clip-path"):  # not the title of the window
            lines.setdefault(float(each.get("y", "")), []).append(each.text or "")
    return [" ".join(parts).split() for _, parts in sorted(lines.items())]


def assert_shows(svg: str, of: Qualification) -> None:
    """It has the rows of the file, and nothing that a browser would load."""
    addresses = re.findall(r"""(?:https?:)?//[^\s"')]+""", svg)
    assert addresses == ["http://www.w3.org/2000/svg"]  # the name of its XML
    for loaded in ("@import", "@font-face", "href", "<script", "<image", "<foreignObject"):
        assert loaded not in svg
    assert {*re.findall(r"url\((.)", svg)} == {"#"}
    lines = [line for line in words_of(svg) if line]
    assert lines[0] == f"{of.device} ({of.facts['backend']}), {of.date}".split()
    assert lines[1][:8] == ["cell", "type", "pass", "N", "H", "T", "auto", "takes"]
    expected = pictured(of)
    assert len(lines) == 2 + len(expected)
    for shown, line in zip(lines[2:], expected, strict=True):
        case, own = line.case, line.rows[line.selected]
        assert shown[:7] == [*case[:3], *map(str, case.shape), line.selected]
        assert float(shown[7].replace(",", "")) == pytest.approx(own.microseconds, rel=0.01)


def test_the_picture_of_a_file() -> None:
    svg = picture(FASTER)
    assert_shows(svg, FASTER)
    assert picture(FASTER) == svg
    assert "sequence" in svg and "reference 2.00 x the time; pointwise 2.00 x the time" in (
        svg.replace("&#160;", " ")
    )


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<style>", "<style>@font-face { src: url(https://cdn.example.org/a.woff2) }"),
        ("</style>", "</style><image href='a.png' />"),
        (">sequence", ">reference"),
        ("Fake&#160;H200", "Fake&#160;A100"),
    ],
)
def test_a_picture_of_something_else_is_noticed(old: str, new: str) -> None:
    svg = picture(FASTER)
    assert old in svg
    with pytest.raises(AssertionError):
        assert_shows(svg.replace(old, new, 1), FASTER)


def test_the_page_has_the_picture_of_the_first_stored_one() -> None:
    stored, page = qualified.read_all(RESULTS), PAGE.read_text("utf-8")
    assert reports.with_section(page, PICTURE_MARKS, picture_section(stored)) == page
    assert PICTURE.exists() == bool(stored)
    for first in stored[:1]:
        assert_shows(PICTURE.read_text("utf-8"), first)
        assert f"({os.path.relpath(PICTURE, PAGE.parent)})" in page
    assert f"(../_static/{PICTURE.name})\n\nThe rows of gru float32 with H=16 of Fake H200" in (
        picture_section([FASTER])
    )


# -- the table


def test_the_page_follows_the_stored_ones() -> None:
    page = PAGE.read_text("utf-8")
    text = section(qualified.read_all(RESULTS))
    assert reports.with_section(page, MARKS, text) == page
    inside = page.split(MARKS[0])[1].split(MARKS[1])[0]
    edited = page.replace(inside, f"{inside}Qualified everywhere.\n")
    assert edited != page and reports.with_section(edited, MARKS, text) == page


def test_without_files_nothing_is_claimed() -> None:
    assert section([]) == NOTHING == "Nothing yet."


def test_what_auto_takes_is_listed_with_ratios_and_errors() -> None:
    text = section([FASTER])
    assert text.startswith(
        "**Fake H200**, cupy 14.2.0, sources 0000000000000000, xprnn 0.2.0, system Linux, "
        f"2026-12-03, file {FASTER.digest}:\n\n{HEAD[0]}\n"
    )
    for kind in ("forward", "training", "step"):
        row = f"| gru | float32 | {kind} | sequence | pointwise | 2 of 2 | 2.00 to 2.00 | 0.25 |"
        assert text.count(row) == 1
    assert "\n\n0 of 6 calls: as without the file." in text and "**sequence" not in text


def test_calls_that_stay_are_not_listed() -> None:
    text = section([stored(defaults(preferring("pointwise", GRID)))])
    assert HEAD[0] not in text and text.endswith("\n\n6 of 6 calls: as without the file.")
    one = [
        replace(each, microseconds=20.0) if each.N == 8 else each
        for each in defaults(preferring("sequence", GRID))
    ]
    assert "| gru | float32 | forward | sequence | pointwise | 1 of 2 |" in section([stored(one)])


def test_the_worst_error_and_all_ratios_count() -> None:
    rows = [
        replace(each, error=0.5, microseconds=5.0)
        if (each.implementation, each.N) == ("sequence", 8)
        else each
        for each in FASTER.rows
    ]
    assert "| pointwise | 2 of 2 | 2.00 to 4.00 | 0.5 |" in section([stored(rows)])


def test_a_call_without_a_known_default_is_no_change() -> None:
    assert section([stored(preferring("sequence", GRID))]).endswith(
        "\n\n0 of 0 calls: as without the file."
    )


def test_failures_are_named() -> None:
    rows = [
        replace(each, outcome="timed out", error=None, microseconds=None)
        if (each.implementation, each.kind) == ("sequence", "training")
        else each
        for each in FASTER.rows
    ]
    text = section([stored(rows)])
    assert "**sequence timed out**: gru float32 training, 2 calls." in text
    assert "training | sequence" not in text


def test_a_default_that_failed_has_no_ratio() -> None:
    rows = [
        replace(each, outcome="wrong", error=3.0, microseconds=None) if each.default else each
        for each in FASTER.rows
    ]
    text = section([stored(rows)])
    assert "| forward | sequence | pointwise | 2 of 2 | — | 0.25 |" in text
    assert "**pointwise wrong**: gru float32 forward, 2 calls." in text


def test_the_text_of_a_file_is_not_markup() -> None:
    identity = {"device": "A <script>|[x](y)`", "cupy": "1*2*"}
    text = section([stored(list(FASTER.rows), identity=identity)])
    assert text.startswith(r"**A \<script\>\|\[x\](y)\`**, cupy 1\*2\*, ")


def test_the_command_writes_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "qualify.md"
    page.write_text("\n".join(["before", *PICTURE_MARKS, "between", *MARKS, "after\n"]))
    monkeypatch.setattr(qualified, "PAGE", page)
    monkeypatch.setattr(qualified, "PICTURE", tmp_path / PICTURE.name)
    monkeypatch.setattr(qualified, "RESULTS", tmp_path)
    path = file(tmp_path / "fake-h200", FASTER)
    assert qualified.main(["--docs"]) == 0
    first = ["before", PICTURE_MARKS[0], picture_section([FASTER]), PICTURE_MARKS[1], "between"]
    assert page.read_text() == "\n".join([*first, MARKS[0], section([FASTER]), MARKS[1], "after\n"])
    assert_shows((tmp_path / PICTURE.name).read_text("utf-8"), FASTER)
    path.write_text(path.read_text().replace('"right"', '"fast"', 1))
    assert qualified.main(["--docs"]) == 2
    assert f"qualified: {path}: rows[0]: outcome: expected one of" in capsys.readouterr().err


# -- asv


@pytest.fixture
def head() -> result_store.Commit:
    """The checkout's commit."""
    try:
        return qualified.resolved("HEAD")
    except (OSError, ValueError) as error:
        pytest.skip(f"git has no commit here: {error}")


def of_this_commit(head: result_store.Commit, rows: Rows) -> Qualification:
    """Stored for the kernels of HEAD."""
    digest = qualified.kernels_digest(head.hash, "cuda")
    return stored(rows, identity={**FASTER.identity, "sources": digest})


def test_the_digest_of_a_commit_is_that_of_its_package(head: result_store.Commit) -> None:
    command = ["git", "status", "--porcelain", "xprnn/kernels"]
    if subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout:
        pytest.skip("the kernels of the checkout are not those of a commit")
    for package in qualified.KERNELS:
        digest = qualified.kernels_digest(head.hash, package)
        sources = import_module(f"xprnn.kernels.{package}.package").SOURCES
        assert digest == sources_digest(*sources)


def test_times_become_results(head: result_store.Commit, tmp_path: Path) -> None:
    rows = [
        replace(each, outcome="wrong", error=2.0, microseconds=None)
        if (each.implementation, each.kind, each.N) == ("sequence", "forward", 8)
        else each
        for each in FASTER.rows
    ]
    path = qualified.write_asv(of_this_commit(head, rows), "fake-h200", head, tmp_path)
    assert path.parent == tmp_path / "fake-h200"
    assert path.name == f"{head.hash[:8]}-fake-h200-qualified-py3.11.json"
    content = result_store.read(path)
    assert content["commit_hash"] == head.hash and content["date"] == int(head.date) * 1000
    assert content["requirements"] == {"cupy": "14.2.0"}
    assert content["results"]["qualified.Forward.time_call"] == [
        [8e-5, 8e-5, 8e-5, 8e-5, 4e-5, None],
        [
            ["'gru'"],
            ["'xprnn-cupy-reference'", "'xprnn-cupy-pointwise'", "'xprnn-cupy-sequence'"],
            ["'float32'"],
            ["'N=1 H=16 T=4'", "'N=8 H=16 T=4'"],
        ],
        "1",
    ]
    assert content["results"]["qualified.Step.time_call"][1][-1] == ["'N=1 H=16'", "'N=8 H=16'"]
    assert {*result_store.read(tmp_path / "benchmarks.json")} == {"version", *content["results"]}
    assert result_store.read(path.with_name("machine.json"))["cpu"] == "Fake H200"


def test_a_known_machine_keeps_its_description(head: result_store.Commit, tmp_path: Path) -> None:
    known = {"machine": "fake-h200", "cpu": "A Processor", "version": 1}
    result_store._write(tmp_path / "fake-h200" / "machine.json", known)
    path = qualified.write_asv(of_this_commit(head, [*FASTER.rows]), "fake-h200", head, tmp_path)
    assert result_store.read(path)["params"] == {
        "machine": "fake-h200", "cpu": "A Processor", "python": "3.11"
    }  # fmt: skip
    assert result_store.read(path.with_name("machine.json")) == known


def test_results_of_other_kernels_are_refused(
    head: result_store.Commit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(qualified, "RESULTS", tmp_path)
    monkeypatch.setattr(result_store, "RESULTS", tmp_path / "asv")
    file(tmp_path / "fake-h200", FASTER)
    assert qualified.main(["--asv", "fake-h200", "HEAD"]) == 2
    assert "its kernels are not those that were qualified" in capsys.readouterr().err
    assert qualified.main(["--asv", "fake-h200", "no-such-commit"]) == 2
    assert "no-such-commit: not a commit" in capsys.readouterr().err
    assert qualified.main(["--asv", "another", "HEAD"]) == 2
    for package in ("../numba", ""):
        with pytest.raises(ValueError, match="kernels: expected one of cuda, numba"):
            qualified.kernels_digest(head.hash, package)
    assert not (tmp_path / "asv").exists()


@pytest.mark.skipif(find_spec("asv") is None, reason="asv is not installed: pip install xprnn[dev]")
def test_asv_publishes_the_results(
    head: result_store.Commit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(qualified, "RESULTS", tmp_path)
    monkeypatch.setattr(result_store, "RESULTS", tmp_path / "asv")
    file(tmp_path / "fake-h200", of_this_commit(head, [*FASTER.rows]))
    assert qualified.main(["--asv", "fake-h200", "HEAD"]) == 0
    assert capsys.readouterr().out.startswith("written: ")
    conf = json.loads((ROOT / "asv.conf.json").read_text("utf-8"))
    conf |= {"repo": str(ROOT), "results_dir": str(tmp_path / "asv"), "env_dir": str(tmp_path)}
    config = tmp_path / "asv.conf.json"
    config.write_text(json.dumps(conf), "utf-8")
    command = [sys.executable, "-m", "asv", "publish", "--config", str(config)]
    command += ["-o", str(tmp_path / "site")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Couldn't find" not in done.stdout and "Skipping" not in done.stdout, done.stdout
    index = json.loads((tmp_path / "site" / "index.json").read_text("utf-8"))
    assert {*index["benchmarks"]} == {
        f"qualified.{kind}.time_call" for kind in ("Forward", "Training", "Step")
    }
    graphs = {*(tmp_path / "site" / "graphs").rglob("qualified.Step.time_call.json")}
    (graph,) = [path for path in graphs if "summary" not in path.parts]
    ((_, values),) = json.loads(graph.read_text("utf-8"))
    assert sorted(values) == [1e-5, 1e-5, 2e-5, 2e-5, 2e-5, 2e-5]


# -- the issue template


def template() -> str:
    return (ROOT / ".github" / "ISSUE_TEMPLATE" / "qualification.yml").read_text("utf-8")


def test_the_page_names_the_template() -> None:
    page = PAGE.read_text("utf-8")
    assert "issues/new?template=qualification.yml" in page


def test_the_template_asks_for_the_file_and_nothing_personal() -> None:
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    form = yaml.safe_load(template())
    fields = {each["id"]: each for each in form["body"] if each["type"] != "markdown"}
    assert fields["file"]["validations"]["required"] and {*fields} == {"file", "remarks"}
    assert form["name"] and form["description"]
    assert "xprnn qualify --backend cupy --share DIR" in form["body"][0]["attributes"]["value"]
    assert "email" not in template() and "contact" not in template()
