"""The documentation, built from a copy of `docs`, and what is wrong in its pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

ROOT = Path(__file__).resolve().parents[2]
GENERATED = shutil.ignore_patterns("_build", "gallery", "generated")
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href"}
EXTERNAL = ("http", "https", "")  # "" with a host: //host/path


def copy_sources(folder: Path) -> Path:
    """Copy `docs` beside everything that its pages may include; returns the copy."""
    folder.mkdir(parents=True)
    for entry in ROOT.iterdir():
        if entry.suffix == ".md":  # links in an included page are relative to where the page is
            shutil.copy(entry, folder)
        elif entry.name not in ("docs", ".git"):
            (folder / entry.name).symlink_to(entry)
    return Path(shutil.copytree(ROOT / "docs", folder / "docs", ignore=GENERATED))


def build(sources: Path, site: Path, *options: str) -> str:
    """Run Sphinx, with warnings as errors; returns what it reports, "" if it succeeds."""
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, *options, str(sources), str(site)],
        capture_output=True,
        text=True,
        timeout=580,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    report = done.stdout + done.stderr
    assert done.returncode == 0 or report, f"Sphinx ended with status {done.returncode}"
    return report if done.returncode else ""


class _Page(HTMLParser):
    """What a page links to, loads, and can be linked to at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        elif LOADS.get(tag, "") in given:
            self.loads.append(given[LOADS[tag]])


def faults(site: Path) -> list[str]:
    """Links inside the site that lead nowhere, and what its pages load from elsewhere."""
    pages = {path: _Page(path) for path in site.rglob("*.html") if "_static" not in path.parts}
    assert pages, f"{site} has no pages"
    return [
        f"{path.relative_to(site)}: {fault}"
        for path, page in pages.items()
        for fault in (*_broken(path, page, pages), *_external(page.loads))
    ]


def _broken(path: Path, page: _Page, pages: dict[Path, _Page]) -> Iterator[str]:
    for link in dict.fromkeys(page.links + page.loads):
        if urlsplit(link).scheme or urlsplit(link).netloc:
            continue
        target, fragment = urldefrag(link)
        file = (path.parent / unquote(target.partition("?")[0])).resolve() if target else path
        if not file.is_file():
            yield f"{link}: there is no such file"
        elif fragment and file in pages and unquote(fragment) not in pages[file].ids:
            yield f"{link}: the page has no such place"


def _external(loads: Iterable[str]) -> Iterator[str]:
    for url in loads:
        parts = urlsplit(url)
        if parts.netloc and parts.scheme in EXTERNAL:
            yield f"loads {url} from the network"
