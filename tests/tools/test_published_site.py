"""The published site in a browser: clicks, and curves compared with the stored results.

Faults are injected into copies of the site, and every one must be detected.
"""

import json
import math
import re
import shutil
import subprocess
import time
from collections import defaultdict
from itertools import product

import pytest

from benchmarks.publish import SCRIPTS, PublishError, install_scripts, publish
from benchmarks.result_store import RESULTS, ROOT
from tests.support.published_site import (
    CURVES,
    GRU_GRAPH,
    choose,
    lacks,
    picture,
    visit,
    whole,
)

CHOSEN = {"cell": "gru", "dtype": "float32", "size": "N=8 H=64 T=128"}
OURS, PEER = "xprnn-numpy-reference", "torch-cpu"


@pytest.fixture(scope="module")
def scripts():
    """Skips the tests where the site cannot be made or opened."""
    if reason := lacks():
        pytest.skip(reason)
    try:
        install_scripts()
    except PublishError as error:
        pytest.skip(f"npm cannot install the site's scripts: {str(error).splitlines()[0]}")


@pytest.fixture(scope="module")
def site(scripts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "site"
    output = publish(folder)
    assert "Couldn't find" not in output, (
        f"results of commits that are not on the branch:\n{output}"
    )
    assert "Skipping" not in output, output
    return folder


def measured(value):
    """asv has null for what failed, and NaN for what was skipped."""
    return value is not None and not math.isnan(value)


def stored(implementation):
    """The stored times of the chosen GRU: sorted curves, each with (commit, seconds) in order."""
    names = json.loads((RESULTS / "benchmarks.json").read_text())[GRU_GRAPH]["param_names"]
    wanted = {name: repr(value) for name, value in CHOSEN.items()}
    wanted["implementation"] = repr(implementation)
    curves = defaultdict(dict)
    for path in RESULTS.glob("*/*-*.json"):
        file = json.loads(path.read_text())
        row = file["results"].get(GRU_GRAPH)
        result = dict(zip(file["result_columns"], row or (), strict=False))
        for values, seconds in zip(
            product(*result.get("params", ())), result.get("result") or (), strict=False
        ):
            if measured(seconds) and dict(zip(names, values, strict=True)) == wanted:
                curves[str(sorted(file["params"].items()))][file["commit_hash"]] = seconds
    assert curves, f"no results are stored for {implementation}"
    return sorted((implementation, *sorted(curve.items())) for curve in curves.values())


def drawn(page):
    """What the page draws, in the form of `stored`; each point is visible."""
    hashes = page.evaluate("$.asv.main_json.revision_to_hash")
    curves = []
    for curve in page.evaluate(CURVES):
        label, points = curve["label"], curve["points"]
        implementation = re.search("implementation-([^;]+)", label)
        assert implementation, f"a curve without an implementation: {label}"
        assert curve["inked"] == len(points), f"{label}: {curve['inked']} of {points} are visible"
        if points:
            seconds = {hashes[str(revision)]: value for revision, value in points}
            curves.append((implementation[1], *sorted(seconds.items())))
    return sorted(curves)


def assert_draws(page, *implementations):
    """The page draws the stored curves of these, once its graphs are loaded."""
    expected = sorted(curve for name in implementations for curve in stored(name))
    deadline = time.monotonic() + 5
    while (detected := drawn(page)) != expected and time.monotonic() < deadline:
        page.wait_for_timeout(50)
    assert detected == expected, "curves drawn are not those stored"


def follow_to_the_graph(site, **options):
    """From the grid to the GRU's graph, then from one implementation to another and to both."""
    with visit(site, **options) as page:
        assert page.locator("#summarygrid-display canvas").count() > 0, "the grid has no curves"
        page.locator(f"#summarygrid-display a[href='#{GRU_GRAPH}']").click()
        chosen = {name: [value] for name, value in CHOSEN.items()}
        for implementations in ([OURS], [PEER], [OURS, PEER]):
            choose(page, {**chosen, "implementation": implementations})
            assert_draws(page, *implementations)


def test_from_the_grid_to_the_curves_of_each_implementation(site):
    follow_to_the_graph(site)


def test_every_page_opens(site):
    benchmarks = json.loads((site / "index.json").read_text())["benchmarks"]
    with visit(site) as page:
        page.get_by_role("link", name="Benchmark list").click()
        page.locator("#summarylist-body td", has_text=GRU_GRAPH).first.wait_for()
        page.get_by_role("link", name="Regressions").click()
        page.locator("#regressions-body table").first.wait_for()
        for name in benchmarks:
            page.get_by_role("link", name="Benchmark grid").click()
            with page.expect_response(re.compile(rf"/machine-.*/{re.escape(name)}\.json")):
                page.locator(f"#summarygrid-display a[href='#{name}']").click()


def test_a_benchmark_opens_with_every_implementation_of_one_combination(site):
    with visit(site) as page:
        page.locator(f"#summarygrid-display a[href='#{GRU_GRAPH}']").click()
        page.wait_for_function(f"({CURVES})().length > 1")
        names = page.evaluate("$.asv.main_json.benchmarks")[GRU_GRAPH]["params"][1]
        labels = [curve["label"] for curve in page.evaluate(CURVES)]
        drawn_names = [re.search("implementation-([^;]+)", label)[1] for label in labels]
        assert sorted(map(repr, drawn_names)) == sorted(names)
        assert all("cell-gru;" in label and "N=32 H=128 T=128" in label for label in labels)
        pressed = page.locator("#graph-display a.btn.active").all_inner_texts()
        assert "even commit spacing" in pressed
        choose(page, {"cell": ["lstm"]})  # the reader's own selection stays
        assert "cell='lstm'" in page.url and "cell='gru'" not in page.url
        page.reload(wait_until="networkidle")
        assert "cell='lstm'" in page.url


def test_the_site_carries_its_scripts(site):
    assert {path.name for path in (site / "vendor").iterdir()} == SCRIPTS.keys()
    tags = re.findall("<(?:script|link|img)[^>]*>", (site / "index.html").read_text())
    assert len(tags) > len(SCRIPTS) and not [tag for tag in tags if "//" in tag]


def test_an_unknown_script_is_an_error(scripts, site, tmp_path, monkeypatch):
    monkeypatch.delitem(SCRIPTS, "md5.min.js")
    with pytest.raises(PublishError, match=r"md5.min.js: not known; another version of asv\?"):
        publish(tmp_path / "site")


def test_the_picture_has_whole_curves_only(site, tmp_path):
    with visit(site, width=1200, height=760) as page:
        picture(page, tmp_path / "picture.png")
        curves = page.evaluate(CURVES)
    assert curves and all(whole(curve) for curve in curves)
    assert (tmp_path / "picture.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1.0, 2.0], True),
        ([None, None, 1.0, 2.0], True),
        ([1.0, None, 2.0], False),
        ([1.0, 2.0, None], False),
        ([None, 1.0], False),
        ([], False),
    ],
)
def test_a_whole_curve(values, expected):
    assert whole({"data": [*enumerate(values)]}) == expected


def _with_regressions(folder):
    """A folder of results of two combinations of each benchmark, at twelve commits.

    The numbers are stored ones, of xprnn and of a peer, tripled at the last six commits.
    """
    source = next(RESULTS.glob("*/1d7390e0-*.json"))
    machine = folder / "results" / source.parent.name
    machine.mkdir(parents=True)
    shutil.copy(source.parent / "machine.json", machine)
    file = json.loads(source.read_text())
    columns = [file["result_columns"].index(name) for name in ("result", "params", "version")]
    rows = {name: [row[column] for column in columns] for name, row in file["results"].items()}
    file["result_columns"] = ["result", "params", "version"]
    known = json.loads((RESULTS / "benchmarks.json").read_text())
    known = {name: facts for name, facts in known.items() if name in rows or name == "version"}
    (machine.parent / "benchmarks.json").write_text(json.dumps(known))
    log = ["git", "log", "--format=%H", "--first-parent", "-12"]
    commits = subprocess.run(log, cwd=ROOT, capture_output=True, text=True).stdout.split()
    for commit in commits:
        factor = 3 if commit in commits[:6] else 1
        file["commit_hash"] = commit
        file["results"] = {
            name: [_two_only(values, params, factor), params, version]
            for name, (values, params, version) in rows.items()
        }
        (machine / f"{commit[:8]}-injected.json").write_text(json.dumps(file))
    return str(machine.parent)


def _two_only(values, params, factor):
    """The first number of xprnn and of torch, times the factor, and null for the others."""
    combinations = [str(combination) for combination in product(*params)]
    chosen = {
        next(index for index, each in enumerate(combinations) if library in each)
        for library in ("'xprnn", "'torch")
    }
    return [factor * value if index in chosen else None for index, value in enumerate(values)]


def regressions(page):
    """The benchmarks that the page of regressions lists."""
    page.get_by_role("link", name="Regressions").click()
    page.locator("#regressions-body td").first.wait_for()
    return page.locator("#regressions-body td:first-child").all_inner_texts()


def test_a_rise_of_xprnns_time_is_a_regression_and_nothing_else_is(scripts, tmp_path):
    publish(tmp_path / "site", results_dir=_with_regressions(tmp_path))
    with visit(tmp_path / "site") as page:
        listed = regressions(page)
        known = page.evaluate("Object.keys($.asv.main_json.benchmarks)")
        note = page.locator("#regressions-display").inner_text()
    assert any("time_forward" in name for name in listed)
    assert any("throughput" in name for name in known)
    assert all("xprnn" in name for name in listed)
    assert not [name for name in listed if "throughput" in name]
    assert "several commits" in note and "benchmarks/gate.py decides" in " ".join(note.split())


def test_peers_and_rates_would_be_regressions(scripts, tmp_path):
    results = _with_regressions(tmp_path)
    publish(tmp_path / "site", results_dir=results, regressions_first_commits={})
    with visit(tmp_path / "site") as page:
        listed = regressions(page)
    assert any("torch" in name for name in listed)
    assert any("throughput" in name for name in listed)


def _lose_a_graph(site):
    next(site.rglob(f"branch-*/**/{GRU_GRAPH}.json")).unlink()


def _break_a_script(site):
    with (site / "graphdisplay.js").open("a") as script:
        script.write("\nundefinedFunction();\n")


def _empty_a_graph(site):
    next(site.rglob(f"branch-*/**/{GRU_GRAPH}.json")).write_text("[]")


def _lose_a_parameter(site):
    """Remove all measurements of the peer."""
    params = json.loads((site / "index.json").read_text())["benchmarks"][GRU_GRAPH]["params"]
    peers = [repr(PEER) in values for values in product(*params)]
    for file in site.rglob(f"branch-*/**/{GRU_GRAPH}.json"):
        graph = json.loads(file.read_text())
        for _, times in graph:
            times[:] = [
                None if peer else seconds for peer, seconds in zip(peers, times, strict=True)
            ]
        file.write_text(json.dumps(graph))


def _draw_nothing(site):
    script = site / "graphdisplay.js"
    script.write_text(script.read_text().replace("show: true", "show: false"))


def _ask_outside(site):
    with (site / "asv.js").open("a") as script:
        script.write("\nfetch('https://example.org/').catch(() => 0);\n")


@pytest.mark.parametrize(
    ("inject", "detected"),
    [
        (_lose_a_graph, "404 .*time_forward.json"),
        (_break_a_script, "script error: undefinedFunction is not defined"),
        (_empty_a_graph, "not those stored"),
        (_lose_a_parameter, "not those stored"),
        (_draw_nothing, "0 of .* are visible"),
        (_ask_outside, "outside the site"),
    ],
)
def test_an_injected_fault_is_detected(site, tmp_path, inject, detected):
    shutil.copytree(site, tmp_path / "site")
    inject(tmp_path / "site")
    with pytest.raises(AssertionError, match=detected):
        follow_to_the_graph(tmp_path / "site", patience=15)
