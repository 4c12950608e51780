"""The code of README, docs and gallery runs unchanged on NumPy and on the fake CuPy."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = {"_build", "gallery", "generated", "renames"}
BACKENDS = ("numpy", "fake_cupy")


def _pages():
    """README and the pages of the documentation that are not generated."""
    pages = sorted((ROOT / "docs").rglob("*.md"))
    written = [page for page in pages if not GENERATED & {*page.relative_to(ROOT).parts}]
    return [ROOT / "README.md", *written]


def code(path):
    """The code of a script, or of a page's blocks in order, at the lines where it is."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return text
    lines = [""] * text.count("\n")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        first = text.count("\n", 0, block.start(1))
        given = block[1].splitlines()
        lines[first : first + len(given)] = given
    return "\n".join(lines) if any(lines) else ""


def promises(source):
    """What comments after calls of print say that these print."""
    return re.findall(r"print\(.*\)  # (.*)$", source, re.MULTILINE)


def run(source, path):
    """Run the code, and check that it prints what it promises, in order."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(source, path, "exec"), {"__name__": "__main__"})
    lines = iter(printed.getvalue().splitlines())
    for promise in promises(source):
        assert promise in lines, f"not printed, or not here: {promise}\n{printed.getvalue()}"


PAGES = [page for page in _pages() if code(page)]
SCRIPTS = sorted((ROOT / "docs" / "examples").rglob("*.py"))


def _name(path):
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(params=BACKENDS)
def place(request, tmp_path, monkeypatch):
    """An empty current folder, and a default backend."""
    monkeypatch.setenv("XPRNN_BACKEND", request.param)
    monkeypatch.chdir(tmp_path)
    if request.param == "numpy":
        yield
        return
    request.getfixturevalue("fake_cupy")
    monkeypatch.setenv("XPRNN_KERNELS", "reference")  # in threads that a page starts, too
    # the fake's products are NumPy's, and a BLAS's threads wait for each other on a busy machine
    with pytest.importorskip("threadpoolctl").threadpool_limits(1):
        yield


@pytest.mark.parametrize("page", PAGES, ids=_name)
@pytest.mark.usefixtures("place")
def test_the_blocks_of_a_page_run(page):
    run(code(page), page)


@pytest.mark.parametrize("script", SCRIPTS, ids=_name)
@pytest.mark.usefixtures("place")
def test_a_script_of_the_gallery_runs(script, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="matplotlib: pip install xprnn[plot]")
    pyplot.switch_backend("agg")
    monkeypatch.setattr(pyplot, "show", lambda: None)  # agg would warn that it cannot
    run(code(script), script)
    pyplot.close("all")


def test_code_in_pages_has_no_other_name_than_python():
    """Blocks with another name of the language would not be run."""
    for page in _pages():
        fences = re.findall(r"^ *```+ *(\S.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        wrong = [name for name in fences if "py" in name and name != "python"]
        assert not wrong, f"{page.name}: {wrong}"


@pytest.mark.parametrize(
    ("source", "detected"),
    [
        ("print(1 + 1)  # 3", "not printed, or not here: 3"),
        ("print(1)  # 1\nprint(2)  # 1", "not printed, or not here: 1"),
        ("raise ValueError('injected')", "injected"),
        ("import xprnn, numpy as np\nxprnn.GRU(3, 4)(np.zeros((2, 1, 3), 'f4'))", "fake_cupy"),
    ],
)
def test_an_injected_fault_is_detected(source, detected, fake_cupy, monkeypatch):
    monkeypatch.setenv("XPRNN_BACKEND", fake_cupy.name)
    with pytest.raises(Exception, match=detected):
        run(source, "page.md")


def test_lines_of_code_have_the_numbers_that_they_have_in_the_page(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# Title\n\n```python\na = 1\n```\n\nText.\n\n```python\nb = a\n```\n")
    assert code(page).splitlines() == ["", "", "", "a = 1", "", "", "", "", "", "b = a"]
