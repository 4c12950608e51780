"""The site that `benchmarks.publish` makes from the stored results, opened in a real browser.

    python -m tests.support.published_site OUT.png

writes the README's picture of the GRU's graph.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.publish import publish
from benchmarks.result_store import RESULTS, ROOT
from tests.support.browser import browse, http_server

if TYPE_CHECKING:
    from playwright.sync_api import Page

GRU_GRAPH = "layers.Forward.time_forward"

# Each drawn curve's label, data (null for a gap) and points, and the number of points with a
# curve's colour nearby (not always its own: another curve may cover it).
CURVES = """() => {
    const plot = $('#main-graph').data('plot');
    if (!plot) return [];
    const colors = plot.getData().map(curve => $.color.parse(curve.color));
    const canvas = plot.getCanvas().getContext('2d');
    const inked = point => {
        const at = plot.pointOffset({x: point[0], y: point[1]});
        const pixels = canvas.getImageData(at.left - 5, at.top - 5, 11, 11).data;
        return colors.some(color => {
            for (let i = 0; i < pixels.length; i += 4)
                if (pixels[i + 3] > 128 && Math.abs(pixels[i] - color.r)
                    + Math.abs(pixels[i + 1] - color.g) + Math.abs(pixels[i + 2] - color.b) < 60)
                    return true;
        });
    };
    return plot.getData().map(curve => {
        const points = curve.data.filter(point => point[1] !== null);
        const seen = points.filter(inked).length;
        return {label: curve.label, data: curve.data, points: points, inked: seen};
    });
}"""


def lacks() -> str:
    """The requirement of the tests that this machine lacks, or ""."""
    for module in ("asv", "playwright"):
        if importlib.util.find_spec(module) is None:
            return f"{module} is not installed"
    for program in ("git", "npm", "chromium"):
        if shutil.which(program) is None:
            return f"{program} is not on the path"
    if not (ROOT / ".git").exists():
        return "not a git checkout: asv asks git for the commits of the results"
    shallow = ["git", "rev-parse", "--is-shallow-repository"]
    if subprocess.run(shallow, cwd=ROOT, capture_output=True, text=True).stdout == "true\n":
        return "a shallow clone, which lacks the commits of the results"
    return ""


@contextmanager
def visit(site: Path, **options: Any) -> Iterator[Page]:
    """A browser page with the site open, with the options of `browse`."""
    with http_server(site) as address, browse(address, **options) as page:
        yield page
        assert "error.html" not in page.url, "the site says that it lacks a script"


def choose(page: Page, values: dict[str, list[str]]) -> None:
    """Click buttons until exactly these are pressed in each of the panels.

    The site selects buttons of untouched panels again after each click elsewhere.
    """
    for _ in range(30):
        if not any(_press(page, panel, names) for panel, names in values.items()):
            return
    raise AssertionError(f"the site changes what is pressed: {page.url}")


def _press(page: Page, panel: str, values: list[str]) -> bool:
    """Click the buttons to be changed in a panel; returns whether there were any."""
    heading = page.locator(".panel-heading", has_text=re.compile(rf"^{panel}$"))
    buttons = page.locator("#graph-display .panel", has=heading).locator("a.btn")
    names = buttons.all_inner_texts()
    assert set(values) <= set(names), f"{panel} has no button {set(values) - set(names)}: {names}"
    clicked = False
    # press first: with none pressed nothing is drawn
    for name in sorted(names, key=lambda name: name not in values):
        button = buttons.nth(names.index(name))
        pressed = "active" in (button.get_attribute("class") or "").split()
        if pressed != (name in values):
            element = button.element_handle()
            button.click()
            page.wait_for_function("button => !button.isConnected", arg=element)  # all are replaced
            clicked = True
    return clicked


def whole(curve: dict[str, Any]) -> bool:
    """Whether a curve has no gap from its first point on, and more than one point."""
    values = [value for _, value in curve["data"]]
    while values and values[0] is None:  # commits before there was such an implementation
        values.pop(0)
    return len(values) > 1 and None not in values


def picture(page: Page, file: Path) -> None:
    """The GRU's whole curves with one size, on the machine with the most commits."""
    page.locator(f"a[href='#{GRU_GRAPH}']").first.click()
    machine = max(RESULTS.glob("*/"), key=lambda folder: len(list(folder.glob("*-*.json")))).name
    chosen = {"machine": [machine], "cell": ["gru"], "dtype": ["float32"]}
    chosen |= {"size": ["N=32 H=128 T=128"]}
    choose(page, chosen)
    page.wait_for_timeout(1000)  # until the graphs are loaded
    labels = [curve["label"] for curve in page.evaluate(CURVES) if whole(curve)]
    names = [name for label in labels for name in re.findall("implementation-([^;]+)", label)]
    choose(page, chosen | {"implementation": names})
    page.mouse.move(700, 80)  # no tooltip
    page.locator("#graphdisplay-navigation").evaluate("panel => panel.scrollTop = 0")
    page.wait_for_timeout(1000)
    graph = page.locator("#main-graph").bounding_box()
    assert graph is not None
    width, height = graph["x"] + graph["width"] + 10, graph["y"] + graph["height"] + 10
    page.screenshot(path=file, clip={"x": 0, "y": 0, "width": width, "height": height})


def main(file: str) -> None:
    """Write the picture."""
    if reason := lacks():
        sys.exit(f"no picture: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        publish(Path(folder, "site"))
        with visit(Path(folder, "site"), width=1200, height=760) as page:
            picture(page, Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
