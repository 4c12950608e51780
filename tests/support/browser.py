"""A site opened in headless Chromium, where every error fails, and every request outside it."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Page, Route


def lacks_browser() -> str:
    """What this machine lacks to open pages, or ""."""
    if importlib.util.find_spec("playwright") is None:
        return "playwright is not installed"
    return "" if shutil.which("chromium") else "chromium is not on the path"


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Print nothing: errors are reported by the browser."""


@contextmanager
def http_server(site: Path) -> Iterator[str]:
    """Run an HTTP server for the site inside the block; the value is its address."""
    handler = partial(_Quiet, directory=str(site))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()


@contextmanager
def browse(
    address: str,
    width: int = 1280,
    height: int = 900,
    patience: float = 60,
) -> Iterator[Page]:
    """A browser page with the site at `address` open; raises if any error occurred on it.

    :param patience: the timeout of actions in seconds.
    """
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with (
        sync_playwright() as playwright,
        playwright.chromium.launch(executable_path=shutil.which("chromium"), args=flags) as browser,
    ):
        page = browser.new_page(viewport={"width": width, "height": height})
        page.set_default_timeout(1000 * patience)
        faults = _watch(page, address)
        try:
            page.goto(address, wait_until="networkidle")
            yield page
            page.wait_for_timeout(100)  # for errors of the last requests
        finally:
            assert not faults, "on the site:\n" + "\n".join(faults)


def _watch(page: Page, address: str) -> list[str]:
    """The list to which all errors of the page are added; a request of another site is one."""
    faults: list[str] = []
    site = address.rpartition("/")[0] + "/"

    def refuse(route: Route) -> None:
        faults.append(f"request of {route.request.url}, which is outside the site")
        route.abort()

    page.route(lambda url: not url.startswith((site, "data:")), refuse)
    page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
    page.on(
        "console",
        lambda message: (
            faults.append(f"console: {message.text}") if message.type == "error" else None
        ),
    )
    page.on(
        "response",
        lambda response: (
            faults.append(f"{response.status} {response.url}") if response.status >= 400 else None
        ),
    )
    page.on(
        "requestfailed", lambda request: faults.append(f"failed: {request.url} {request.failure}")
    )
    return faults
