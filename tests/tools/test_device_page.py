"""The speed table of docs/gpu.md follows the stored reports, and is empty without them."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import device_report
from benchmarks.device import files

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "gpu.md").read_text("utf-8")
RESULTS = ROOT / "benchmarks" / "results"
TIMES = ("ours_us", "torch_us", "ratio", "floor_us")
QUARTILES = ("ours_quartiles_us", "torch_quartiles_us", "ratio_quartiles")


def row(cell: str, dtype: str, what: str, kernels: str, ratio: float | None) -> dict[str, Any]:
    """A correct row, with a time unless the ratio is None."""
    fields = {"cell": cell, "dtype": dtype, "direction": "forward", "layers": 1, "pass": what}
    fields |= {"kernels": kernels, "wrong": "", "N": 8, "H": 512, "T": 512, "error": 1e-7}
    fields |= {"limit": 1e-5, "of": "output", "floor_of": "steps", "not_timed": None}
    fields |= {**dict.fromkeys(TIMES, 100.0), **{name: [90.0, 110.0] for name in QUARTILES}}
    fields["ratio"] = ratio
    if ratio is None:
        fields |= {**dict.fromkeys((*TIMES, *QUARTILES, "floor_of")), "not_timed": "not reached"}
    return fields


def report(*rows: dict[str, Any], name: str = "A Device") -> dict[str, Any]:
    peaks = {"bandwidth": 4e12, "rates": {"float32": 5e13}, "latency": 6e-7, "look": 2e-7}
    peaks["launch"] = 3e-6
    return {
        "date": "2026-01-02",
        "commit": "0123456789abcdef",
        "sources": "f" * 64,
        "device": {"name": name, "driver": "1.2.3"},
        "versions": {"torch": "2.11.0"},
        "seconds": 1.5,
        "ceilings": peaks,
        "rows": [*rows],
        "absent": [{**row("lstm", "float32", "", "sequence", 1.0), "reason": "none"}],
    }


BOTH = "forward+backward"
SAMPLE = report(
    row("gru", "float32", "forward", "sequence", 5.126),
    row("gru", "float32", "forward", "pointwise", 0.3),
    row("gru", "float32", BOTH, "sequence", 0.2),
    row("gru", "float32", BOTH, "pointwise", 0.4),
    row("gru", "float16", "forward", "pointwise", None),
    {**row("gru", "tf32", "forward", "pointwise", None), "wrong": "output is off by 2"},
    row("gru", "tf32", "forward", "sequence", 9.0),
)


# -- the page of this commit


def test_the_page_follows_the_stored_reports() -> None:
    section = files.docs_section(files.read_all(RESULTS))
    assert files.with_section(PAGE, section) == PAGE


def test_a_table_that_was_edited_by_hand_is_detected() -> None:
    inside = PAGE.split(files.BEGIN)[1].split(files.END)[0]
    edited = PAGE.replace(inside, inside.replace(".", ", and 9 times torch's speed.", 1), 1)
    assert edited != PAGE
    section = files.docs_section(files.read_all(RESULTS))
    assert files.with_section(edited, section) == PAGE != edited


def test_the_commands_of_the_page() -> None:
    commands = re.findall(r"^python -m benchmarks\.device_report.*$", PAGE, re.MULTILINE)
    assert [command.partition("#")[0].strip() for command in commands] == [
        "python -m benchmarks.device_report",
        "python -m benchmarks.device_report --docs",
    ]
    assert re.search(r"^bash benchmarks/gpu_first\.sh FOLDER", PAGE, re.MULTILINE)


# -- the text of a section


def test_without_a_report_nothing_is_claimed() -> None:
    assert files.docs_section([]) == files.NO_RUN
    assert not re.search(r"\d", files.NO_RUN)


def test_the_faster_of_the_kernels_is_shown_and_no_wrong_one_hidden() -> None:
    section = files.docs_section([SAMPLE])
    assert "**A Device**, driver 1.2.3, torch 2.11.0, 2026-01-02, commit 01234567:" in section
    lines = [line for line in section.splitlines() if line.startswith("| gru")]
    assert lines == ["| gru | 8, 512, 512 | 5.13 seq / 0.40 pw | wrong / — | — / — | — / — |"]


def test_the_markdown_has_every_row() -> None:
    text = files.markdown(SAMPLE)
    assert text.count("| gru |") == 7
    assert "| **output is off by 2** |" in text and "| not reached |" in text
    assert "| 5.13 (90.00 to 110.00) | 100.0, steps | 1.00 |" in text
    assert "latency 600 ns, poll 200 ns, launch 3000 ns" in text and "1 of them wrong" in text
    assert "- not available, lstm float32: sequence: none" in text and "Both directions" not in text


def test_both_directions_are_compared_with_one_after_the_other() -> None:
    """Only where both were timed, by the same kernels in the same pass."""
    both = {**row("gru", "float32", "forward", "sequence", 5.0), "direction": "both"}
    other = {**row("lstm", "float32", "forward", "sequence", 5.0), "direction": "both"}
    rows = *SAMPLE["rows"], {**both, "ours_us": 120.0}, other
    text = files.markdown(report(*rows))
    assert text.splitlines()[-1] == "| gru | float32 | 8, 512, 512 | forward | sequence | 1.67 |"
    assert text.count("| 8, 512, 512 | forward | sequence | 1.67 |") == 1
    section = files.docs_section([report(*rows)])
    assert "| gru, both directions | 8, 512, 512 | 5.00 seq / — |" in section


def stack(kernels: str, dtype: str, layers: int, ours: float) -> dict[str, Any]:
    fields = row("gru", dtype, "forward", kernels, 600.0 / ours)
    return {**fields, "layers": layers, "ours_us": ours}


def test_wavefronts_are_compared_with_layer_by_layer() -> None:
    """Where both are timed; layers and stacks of another size are not among them."""
    rows = (
        *(stack("wave", "float32", 2, 120.0), stack("sequence", "float32", 2, 100.0)),
        *(stack("wave", "float32", 3, 120.0), stack("sequence", "float32", 3, 150.0)),
        *(stack("wave", "bfloat16", 3, 120.0), row("gru", "bfloat16", "forward", "sequence", 5.0)),
        {**row("gru", "bfloat16", "forward", "sequence", None), "layers": 3},
    )
    text = files.markdown(report(*rows))
    assert text.splitlines()[-2:] == [
        "| gru | float32 | 8, 512, 512 | 2 | 0.83 |",
        "| gru | float32 | 8, 512, 512 | 3 | 1.25 |",
    ]
    assert "layer-by-layer time / wavefront time; faster in 1 of 2." in text
    assert "| gru, 3 layers | bfloat16 | 8, 512, 512 | forward | wave |" in text
    section = files.docs_section([report(*rows)])
    assert "| gru, 2 layers | 8, 512, 512 | 6.00 seq | — | — | — |" in section
    assert "| gru, 3 layers | 8, 512, 512 | 5.00 wave | — | 5.00 wave | — |" in section
    assert "| gru | 8, 512, 512 | — / — | — / — | 5.00 seq / — | — / — |" in section
    assert "in a wavefront" not in files.markdown(SAMPLE)


def step(kernels: str, ours: float, ratio: float, N: int = 1) -> dict[str, Any]:
    fields = row("lstm", "bfloat16", "step", kernels, ratio)
    return {**fields, "layers": 3, "N": N, "T": 1, "ours_us": ours, "floor_us": 4.0}


def test_steps_are_compared_with_torchs_cells_and_their_bound() -> None:
    """With the fastest kernels; rows of layers and rows without a time do not count."""
    late = row("gru", "float16", "step", "sequence", None) | {"layers": 3, "T": 1}
    rows = (
        *(step("pointwise", 60.0, 1.5), step("sequence", 20.0, 4.5), step("graph", 5.9, 9.04)),
        *(step("sequence", 6.1, 2.0, N=8), late, row("gru", "tf32", "forward", "sequence", 1.0)),
    )
    text = files.markdown(report(*rows))
    assert "\n- steps within 1.5 times their bound: 1 of 2\n" in text
    assert "| lstm, step of 3 layers | bfloat16 | 1, 512, 1 | step | graph |" in text
    assert "| 4.0, steps | 1.48 |" in text
    section = files.docs_section([report(*rows)])
    assert "| lstm, step of 3 layers | 1, 512, 1 | — | — | 9.04 graph | — |" in section
    assert "| lstm, step of 3 layers | 8, 512, 1 | — | — | 2.00 seq | — |" in section
    assert "| gru, step of 3 layers | 8, 512, 1 | — | — | — | — |" in section
    assert "times their bound" not in files.markdown(SAMPLE)


def file(folder: Path, name: str, content: Any) -> None:
    (folder / name).mkdir()
    (folder / name / "report.json").write_text(json.dumps(content))


def test_the_command_writes_the_page(tmp_path: Path) -> None:
    page = tmp_path / "gpu.md"
    page.write_text(f"before\n{files.BEGIN}\nold\n{files.END}\nafter\n")
    device_report.write_docs(page, tmp_path)
    assert page.read_text() == f"before\n{files.BEGIN}\n{files.NO_RUN}\n{files.END}\nafter\n"
    file(tmp_path, "b", {**SAMPLE, "device": {**SAMPLE["device"], "name": "Another"}})
    file(tmp_path, "a", SAMPLE)
    device_report.write_docs(page, tmp_path)
    text = page.read_text()
    assert text.index("**A Device**") < text.index("**Another**") and "old" not in text
    device_report.write_docs(page, tmp_path)
    assert page.read_text() == text


@pytest.mark.parametrize("text", ["", files.BEGIN, files.END + files.BEGIN, 2 * files.BEGIN])
def test_a_page_without_marks(text: str, tmp_path: Path) -> None:
    (tmp_path / "gpu.md").write_text(text)
    with pytest.raises(device_report.RefusedError, match=r"expected the marks .*, once each"):
        device_report.write_docs(tmp_path / "gpu.md", tmp_path)
    assert (tmp_path / "gpu.md").read_text() == text


def test_a_page_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(device_report.RefusedError, match=r"--docs: .*gpu"):
        device_report.write_docs(tmp_path / "gpu.md", tmp_path)


def test_an_invalid_report_is_named(tmp_path: Path) -> None:
    for name, content in (("a", {**SAMPLE, "rows": 3}), ("b", [])):
        file(tmp_path, name, content)
        with pytest.raises(ValueError, match=rf"{name}/report\.json: report: "):
            files.read_all(tmp_path)
        (tmp_path / name / "report.json").unlink()
    file(tmp_path, "c", {})
    (tmp_path / "c" / "report.json").write_text("{")
    with pytest.raises(ValueError, match=r"c/report\.json: "):
        files.read_all(tmp_path)


def test_generating_imports_nothing_heavy() -> None:
    code = (
        "import sys; from benchmarks.device import files\n"
        "print(*{'numpy', 'torch', 'cupy', 'xprnn'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
