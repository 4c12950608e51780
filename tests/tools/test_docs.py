"""The documentation: built without a warning, complete, and read in a browser without network.

Faults are injected into copies of the sources or of the site, and every one must be detected.
"""

import dataclasses
import inspect
import pydoc
import re
import shutil
import zlib

import pytest

import xprnn
from tests.support.browser import browse, lacks_browser
from tests.support.compile_once import lock
from tests.support.docs_site import build, copy_sources, faults
from tests.unit.test_public_names import listed
from xprnn.tools import cli

pytest.importorskip("sphinx", reason="Sphinx is not installed: pip install xprnn[docs]")

WIDTHS = {"wide": 1280, "narrow": 390}
ADDRESSED = ("index", "guide/index", "gallery/index", "reference/index", "performance", "gpu")
GENERATED = ("xprnn.GRU", "xprnn.functional.lstm_forward", "xprnn.optim.Adam", "xprnn.gradcheck")
# The theme lets the whole text scroll sideways, in a box between the page and the article.
OVERFLOW = """() => {
    let excess = 0;
    for (let box = document.querySelector('article'); box; box = box.parentElement)
        excess = Math.max(excess, box.scrollWidth - box.clientWidth);
    return excess;
}"""


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The site, built by one of the processes that test."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if base.name.startswith("pytest-") else base.parent) / "docs"
    report = folder / "report.txt"
    with lock(str(folder)):
        if not report.exists():
            report.write_text(build(copy_sources(folder / "tree"), folder / "site"))
    assert report.read_text() == "", report.read_text()
    return folder / "site"


@pytest.fixture
def damaged(site, tmp_path):
    """A copy of the site, for an injected fault."""
    return shutil.copytree(site, tmp_path / "site")


@pytest.fixture
def browser():
    if reason := lacks_browser():
        pytest.skip(reason)


def documented(site):
    """The names of Python objects that the site's index, objects.inv, has."""
    header, _, packed = (site / "objects.inv").read_bytes().partition(b"zlib.\n")
    assert header.startswith(b"# Sphinx inventory version 2")
    lines = [line.split(" ") for line in zlib.decompress(packed).decode().splitlines()]
    return {name for name, kind, *_ in lines if kind.startswith("py:")}


def public():
    """Every public name and public method, as dotted paths."""
    names = {line.partition("(")[0].partition(":")[0] for line in listed()}
    return {name for name in names if not name.endswith(".__init__")}


def undescribed(name):
    """The parameters of a function, method or class for which its docstring has no `:param`.

    "those of `other`" includes the parameters that the docstring of `other`, beside it, has.
    """
    value = pydoc.locate(name)
    is_class = inspect.isclass(value)
    if not callable(value) or (is_class and not _is_constructed(name, value)):
        return []
    text, beside = inspect.getdoc(value), name.rpartition(".")[0]
    others = [pydoc.locate(f"{beside}.{other}") for other in re.findall(r"those of `(\w+)`", text)]
    text = "\n".join([text, *map(inspect.getdoc, others)])
    described = {*re.findall(r"^:param (\w+):", text, re.MULTILINE)}
    parameters = {*inspect.signature(value.__init__ if is_class else value).parameters} - {"self"}
    return sorted(parameters - described)


def _is_constructed(name, kind):
    """Whether users call a class; errors and the dataclasses of results are not."""
    return name in public() and not (
        issubclass(kind, BaseException) or dataclasses.is_dataclass(kind)
    )


def pages(site):
    """The pages that are read: all that are written by hand, and a few generated ones."""
    found = [path.relative_to(site).with_suffix("") for path in site.rglob("*.html")]
    names = {path.as_posix() for path in found if path.parts[0] != "_static"}
    assert names >= {*ADDRESSED}
    written = {name for name in names if "/generated/" not in name} - {"search"}
    return sorted(written) + [f"reference/generated/{name}" for name in GENERATED]


def read(site, width, names, patience=20):
    """Open pages at a width, and search; raises if anything is wrong."""
    with browse((site / "index.html").as_uri(), width=width, patience=patience) as page:
        for name in names:
            page.goto((site / f"{name}.html").as_uri(), wait_until="load")
            excess = page.evaluate(OVERFLOW)
            assert not excess, f"{name} is {excess} pixels wider than {width}"
        search(page, "stepper", "xprnn.stepper.Stepper")


def search(page, words, expected):
    """Type words into the search, and follow the result with the expected title."""
    page.keyboard.press("Control+K")
    page.keyboard.type(words)
    page.keyboard.press("Enter")
    page.locator("#search-results li a", has_text=expected).first.click()
    page.locator("h1", has_text=expected).wait_for()


def test_it_is_built_without_a_warning(site):
    assert (site / "index.html").is_file()


def test_no_link_is_broken_and_nothing_is_loaded_from_the_network(site):
    assert faults(site) == []


def test_every_public_name_is_documented(site):
    names = public()
    assert {f"xprnn.{name}" for name in xprnn.__all__} <= names
    assert "xprnn.GRU.backward" in names
    assert names - documented(site) == set()


def test_every_parameter_is_described(site):
    names = documented(site)
    assert names >= {"xprnn.GRU", "xprnn.GRU.load", "xprnn.functional.gru", "xprnn.optim.AdamW"}
    faults = {name: missing for name in sorted(names) if (missing := undescribed(name))}
    assert faults == {}


@pytest.mark.parametrize("name", ["xprnn.mse_loss", "xprnn.Linear.backward", "xprnn.optim.AdamW"])
def test_a_parameter_that_is_not_described_is_detected(name, monkeypatch):
    value = pydoc.locate(name)
    first = re.search(r":param (\w+):", value.__doc__)
    assert undescribed(name) == []
    monkeypatch.setattr(value, "__doc__", value.__doc__.replace(first[0], first[1]))
    assert undescribed(name) == [first[1]]


def test_every_option_of_every_command_is_documented(site):
    page = (site / "reference" / "cli.html").read_text()
    parser = cli._parser()
    commands = parser._subparsers._group_actions[0].choices
    assert {"demo", "run", "verify", "bench", "info"} <= set(commands)
    for name, command in commands.items():
        for action in command._actions:
            for option in action.option_strings or [action.metavar]:
                assert f'id="xprnn-{name}-{option}"' in page, f"xprnn {name} {option}"


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
def test_pages_are_read_without_network(site, browser, width):
    read(site, width, pages(site))


def _reword(file, old, new):
    text = file.read_text()
    assert old in text, f"{file.name} has no {old!r}"
    file.write_text(text.replace(old, new, 1))


def test_faults_in_the_sources_fail_the_build(tmp_path):
    docs = copy_sources(tmp_path / "tree")
    _reword(docs / "guide" / "index.md", "# User guide", "# User guide\n\n[x](missing.md)")
    _reword(docs / "theory" / "index.md", "# Theory", "# Theory\n\n$\\unknowncommand{x}$")
    _reword(docs / "reference" / "backends.rst", "   to_numpy\n", "   to_nothing\n")
    _reword(docs / "reference" / "losses.rst", "   mse_loss\n", "")
    report = build(docs, tmp_path / "site", "-Dplot_gallery=0")
    assert "cross-reference target not found: 'missing.md'" in report
    assert "equation: Unknown LaTeX command" in report
    assert re.search("failed to import .*to_nothing", report)
    assert public() - documented(tmp_path / "site") == {"xprnn.mse_loss", "xprnn.to_numpy"}


def test_an_example_that_fails_fails_the_build(tmp_path):
    docs = copy_sources(tmp_path / "tree")
    for example in (docs / "examples").glob("*.py"):
        example.unlink()  # they take time
    example = docs / "examples" / "plot_failing.py"
    example.write_text('"""\nTitle\n=====\n"""\nraise ValueError("injected")\n')
    assert "ValueError: injected" in build(docs, tmp_path / "site")


def _broken_link(site):
    _reword(site / "gpu.html", "installation.html", "instalation.html")


def _broken_place(site):
    _reword(site / "gpu.html", 'href="#', 'href="#x')


def _foreign_style(site):
    link = '<link rel="stylesheet" href="https://cdn.example.org/a.css">'
    _reword(site / "gpu.html", "</head>", f"{link}</head>")


@pytest.mark.parametrize(
    ("inject", "detected"),
    [
        (_broken_link, "instalation.html: there is no such file"),
        (_broken_place, "#x.*: the page has no such place"),
        (_foreign_style, "loads https://cdn.example.org/a.css from the network"),
    ],
)
def test_a_wrong_link_in_a_page_is_detected(damaged, inject, detected):
    inject(damaged)
    assert re.search(f"^gpu.html: .*{detected}$", "\n".join(faults(damaged)), re.MULTILINE)


def _foreign_script(site):
    script = '<script src="https://cdn.example.org/a.js"></script>'
    _reword(site / "gpu.html", "</head>", f"{script}</head>")


def _failing_script(site):
    _reword(site / "gpu.html", "</body>", "<script>undefinedFunction();</script></body>")


def _wide_page(site):
    _reword(site / "gpu.html", "</h1>", '</h1><div style="width: 2000px">wide</div>')


def _lost_search_index(site):
    (site / "searchindex.js").write_text("")


@pytest.mark.parametrize(
    ("inject", "detected"),
    [
        (_foreign_script, "request of https://cdn.example.org/a.js, which is outside the site"),
        (_failing_script, "undefinedFunction is not defined"),
        (_wide_page, "gpu is .* pixels wider than 390"),
        (_lost_search_index, "Timeout"),
    ],
)
def test_a_fault_in_a_page_is_detected(damaged, browser, inject, detected):
    inject(damaged)
    with pytest.raises(Exception, match=detected):
        read(damaged, WIDTHS["narrow"], ["gpu"], patience=10)
