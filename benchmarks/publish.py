"""Publish the stored results as a site that needs no other server.

    python -m benchmarks.publish [FOLDER]

makes asv's site in FOLDER, by default `.asv/html`, which `asv preview` opens. asv's own pages load
scripts from other servers and say that they cannot where these are out of reach; here npm installs
the same scripts once, below `.asv`, and the site gets copies. A benchmark opens with one cell, data
type and size, and all implementations as curves. The Regressions page says what it can show.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlencode

from .result_store import RESULTS, ROOT

PACKAGES = (
    "jquery@3.3.1",
    "flot@0.8.3",
    "flot-orderbars@1.0.0",
    "stupid-table-plugin@1.1.3",
    "blueimp-md5@2.19.0",
    "bootstrap@3.1.1",
)
SCRIPTS = {  # the files that asv's pages load from other servers, and the same in the packages
    "jquery-3.3.1.min.js": "jquery/dist/jquery.min.js",
    "jquery.flot.min.js": "flot/jquery.flot.js",
    "jquery.flot.time.min.js": "flot/jquery.flot.time.js",
    "jquery.flot.selection.min.js": "flot/jquery.flot.selection.js",
    "jquery.flot.categories.min.js": "flot/jquery.flot.categories.js",
    "jquery.flot.orderBars.js": "flot-orderbars/js/jquery.flot.orderBars.js",
    "stupidtable.min.js": "stupid-table-plugin/stupidtable.min.js",
    "md5.min.js": "blueimp-md5/js/md5.min.js",
    "bootstrap.min.js": "bootstrap/dist/js/bootstrap.min.js",
    "bootstrap.min.css": "bootstrap/dist/css/bootstrap.min.css",
}
REMOTE = re.compile(r'<(script src|link rel="stylesheet" href)="https://[^"]*/([^"/]+)"[^>]*>')
COMPARED = ("implementation", "library")  # parameters of which all values are drawn
SELECTED = ("float32", "N=32 H=128 T=128", "N=1 H=128")  # of the others, else the first value
SELECTION = "selection.js"
SCRIPT = """\
'use strict';
/* A link to a benchmark opens it with this selection, unless it has one of its own. */
const selections = %s;
function select() {
    const selection = selections[decodeURIComponent(location.hash.replace(/^#[/]?/, ''))];
    if (selection) history.replaceState(null, '', '#' + selection);
}
window.addEventListener('hashchange', select);
select();
"""
NOTE = """\
<p class="alert alert-info" style="margin: 10px">asv lists what rose by more than a tenth of its
time and by more than its curve scatters. To know the scatter it needs several commits before and
after, on one machine: with fewer it lists noise and misses what became slower. <code>python
benchmarks/gate.py</code> decides whether a commit is slower than another.</p>
"""


class PublishError(Exception):
    """The site cannot be made; the message gives the reason."""


def publish(site: Path, **settings: object) -> str:
    """Make the site and return asv's output.

    :param settings: Those of asv that differ from the project's.
    :raises PublishError: asv or npm failed.
    """
    scripts = install_scripts()
    conf = json.loads((ROOT / "asv.conf.json").read_text("utf-8"))
    conf |= {"repo": str(ROOT), "results_dir": str(RESULTS), **settings}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "asv.conf.json")
        config.write_text(json.dumps(conf), "utf-8")
        command = [sys.executable, "-m", "asv", "publish", "--config", config]
        output = _run([*command, "-o", site.resolve()])
    _carry_scripts(site, scripts)
    _select(site)
    page = '<div id="regressions-body">'
    _replace(site / "index.html", page, NOTE + page)
    return output


def install_scripts() -> Path:
    """Install the scripts with npm, unless they are there; returns the folder that has them.

    :raises PublishError: npm is not installed, or cannot reach its registry.
    """
    digest = hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:8]
    folder = ROOT / ".asv" / f"npm-{digest}"
    if not folder.exists():
        if shutil.which("npm") is None:
            raise PublishError("npm: not installed; it installs the site's scripts")
        flags = ["--no-save", "--no-audit", "--no-fund", "--loglevel=error"]
        flags += ["--fetch-retries=1", "--fetch-retry-mintimeout=1000", "--fetch-timeout=30000"]
        folder.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as part:
            _run(["npm", "install", *flags, "--prefix", part, *PACKAGES])
            with suppress(OSError):  # another process was faster
                Path(part, "node_modules").rename(folder)
    return folder


def _run(command: list[str | Path]) -> str:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise PublishError(f"{' '.join(map(str, command[:3]))}: {done.stdout.strip()}")
    return done.stdout


def _carry_scripts(site: Path, scripts: Path) -> None:
    """Copy the scripts into the site, and load those."""

    def local(tag: re.Match[str]) -> str:
        if tag[2] not in SCRIPTS:
            raise PublishError(f"{tag[2]}: not known; another version of asv?")
        shutil.copy(scripts / SCRIPTS[tag[2]], vendor / tag[2])
        return f'<{tag[1]}="{vendor.name}/{tag[2]}">'

    vendor, index = site / "vendor", site / "index.html"
    vendor.mkdir()
    index.write_text(REMOTE.sub(local, index.read_text("utf-8")), "utf-8")


def _select(site: Path) -> None:
    """Add the script with what each benchmark is opened with."""
    index = json.loads((site / "index.json").read_text("utf-8"))
    selections = {}
    for name, benchmark in index["benchmarks"].items():
        chosen = [("x-axis-scale", "even")]
        for parameter, values in zip(benchmark["param_names"], benchmark["params"], strict=True):
            typical = [value for value in values if value.strip("'") in SELECTED] or values
            shown = values if parameter in COMPARED else typical[:1]
            chosen += [(f"p-{parameter}", value) for value in shown]
        selections[name] = f"{name}?{urlencode(chosen)}"
    (site / SELECTION).write_text(SCRIPT % json.dumps(selections, indent=1), "utf-8")
    _replace(site / "index.html", "<head>", f'<head>\n    <script src="{SELECTION}"></script>')


def _replace(file: Path, old: str, new: str) -> None:
    text = file.read_text("utf-8")
    if text.count(old) != 1:
        raise PublishError(f"{file.name}: expected {old!r} once; another version of asv?")
    file.write_text(text.replace(old, new), "utf-8")


def main() -> None:
    site = Path(*sys.argv[1:2] or [ROOT / ".asv" / "html"])
    try:
        print(publish(site), end="")
    except PublishError as error:
        sys.exit(f"publish: {error}")
    print(f"published: {site}")


if __name__ == "__main__":
    main()
