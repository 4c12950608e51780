"""The site that `asv publish` makes from the stored results, opened in a real browser.

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

from tests.support.browser import browse, http_server

if TYPE_CHECKING:
    from playwright.sync_api import Page

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "asv"
GRU_GRAPH = "layers.Forward.time_forward"

# The site loads scripts from CDNs, which a test cannot rely on; npm has the same files.
PACKAGES = (
    "jquery@3.3.1",
    "flot@0.8.3",
    "flot-orderbars@1.0.0",
    "blueimp-md5@2.19.0",
    "bootstrap@3.1.1",
    "stupid-table-plugin@1.1.3",
)
SAME_BYTES = {
    "https://code.jquery.com/jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    "https://cdn.jsdelivr.net/npm/flot-orderbars@1.0.0/js/jquery.flot.orderBars.js": (
        "flot-orderbars/js/jquery.flot.orderBars.js"
    ),
    "https://cdnjs.cloudflare.com/ajax/libs/blueimp-md5/2.19.0/js/md5.min.js": (
        "blueimp-md5/js/md5.min.js"
    ),
    "https://cdn.jsdelivr.net/npm/bootstrap@3.1.1/dist/js/bootstrap.min.js": (
        "bootstrap/dist/js/bootstrap.min.js"
    ),
    "https://cdn.jsdelivr.net/npm/bootstrap@3.1.1/dist/css/bootstrap.min.css": (
        "bootstrap/dist/css/bootstrap.min.css"
    ),
}
CDNJS = "https://cdnjs.cloudflare.com/ajax/libs"
OTHER_BYTES = {  # npm has flot unminified, and a later release of the plugin
    f"{CDNJS}/flot/0.8.3/jquery.flot.min.js": "flot/jquery.flot.js",
    f"{CDNJS}/flot/0.8.3/jquery.flot.time.min.js": "flot/jquery.flot.time.js",
    f"{CDNJS}/flot/0.8.3/jquery.flot.selection.min.js": "flot/jquery.flot.selection.js",
    f"{CDNJS}/flot/0.8.3/jquery.flot.categories.min.js": "flot/jquery.flot.categories.js",
    f"{CDNJS}/stupidtable/1.0.1/stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
}
LIBRARIES = SAME_BYTES | OTHER_BYTES

# Each drawn curve's label and points, and the number of points with a curve's colour nearby (not
# always its own: another curve may cover it).
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
        return {label: curve.label, points: points, inked: points.filter(inked).length};
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


def install_libraries(folder: Path) -> str:
    """Install the site's scripts in a folder; returns the error of npm, or ""."""
    flags = ["--no-save", "--no-audit", "--no-fund", "--loglevel=error"]
    flags += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=30000"]
    done = subprocess.run(
        ["npm", "install", *flags, "--prefix", str(folder), *PACKAGES],
        capture_output=True,
        text=True,
        timeout=240,
    )
    if done.returncode:
        return f"npm cannot install the site's scripts: {' '.join(done.stderr.splitlines()[:1])}"
    return ""


def publish(site: Path, config: Path = ROOT / "asv.conf.json") -> str:
    """Make the site and return asv's output; integrity hashes that npm's files lack are removed."""
    done = subprocess.run(
        [sys.executable, "-m", "asv", "publish", "--config", str(config), "-o", str(site)],
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    index = site / "index.html"
    html = index.read_text()
    for url in OTHER_BYTES:
        html = re.sub(rf'("{re.escape(url)}") integrity="[^"]*"', r"\1", html)
    index.write_text(html)
    return done.stdout + done.stderr


@contextmanager
def visit(site: Path, libraries: Path, **options: Any) -> Iterator[Page]:
    """A browser page with the site open, with the options of `browse`."""
    local_files = {url: libraries / "node_modules" / file for url, file in LIBRARIES.items()}
    with http_server(site) as address, browse(address, local_files=local_files, **options) as page:
        yield page
        assert "error.html" not in page.url, "the site says that it lacks a script"


def choose(page: Page, values: dict[str, list[str]]) -> None:
    """Click buttons until exactly these are pressed in each of the panels.

    The site selects buttons of untouched panels again after each click elsewhere.
    """
    while any(_press(page, panel, names) for panel, names in values.items()):
        pass


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


def picture(page: Page, file: Path) -> None:
    """All measurements of the GRU with one size, on the machine with the most commits."""
    page.locator(f"a[href='#{GRU_GRAPH}']").first.click()
    page.locator("#even-spacing").click()
    machine = max(RESULTS.glob("*/"), key=lambda folder: len(list(folder.glob("*-*.json")))).name
    chosen = {"machine": [machine], "cell": ["gru"], "dtype": ["float32"]}
    chosen |= {"size": ["N=32 H=128 T=128"]}
    choose(page, chosen)
    page.wait_for_timeout(1000)  # until the graphs are loaded
    drawn = [curve["label"] for curve in page.evaluate(CURVES) if curve["points"]]
    names = [name for label in drawn for name in re.findall("implementation-([^;]+)", label)]
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
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if reason := lacks() or install_libraries(folder):
            sys.exit(f"no picture: {reason}")
        publish(folder / "site")
        with visit(folder / "site", folder, width=1200, height=760) as page:
            picture(page, Path(file))


if __name__ == "__main__":
    main(*sys.argv[1:])
