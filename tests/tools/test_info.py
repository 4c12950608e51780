"""info: the imported copy of xprnn, the number of compiled kernels, and of threads."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import xprnn
from xprnn.kernels.numba import package as numba_kernels
from xprnn.tools import info

PACKAGE = Path(xprnn.__file__).parent


def install(site: Path, origin: object | None) -> None:
    """Write pip's metadata of a package and of its origin."""
    folder = site / f"xprnn-{xprnn.__version__}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Name: xprnn\nVersion: {xprnn.__version__}\n")
    if origin is not None:
        (folder / "direct_url.json").write_text(json.dumps(origin))


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        ({"dir_info": {"editable": True}, "url": PACKAGE.parent.as_uri()}, "editable install"),
        (
            {"dir_info": {"editable": True}, "url": "file:///a%20clone"},
            r"another copy, editable install, is in .*a clone.xprnn",
        ),
        ({"dir_info": {}, "url": PACKAGE.parent.as_uri()}, "another copy, installed, is in {site}"),
        (None, "another copy, installed, is in {site}"),
    ],
)
def test_the_copy_that_is_imported_is_named(
    origin: object, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(tmp_path, origin)
    monkeypatch.syspath_prepend(str(tmp_path))
    described = info.installation()["xprnn"]
    assert described.startswith(f"{xprnn.__version__} in {PACKAGE}")
    assert re.search(expected.format(site=re.escape(str(tmp_path))) + "(.xprnn)?$", described), (
        described
    )


def test_a_copy_may_be_installed_or_not(tmp_path: Path) -> None:
    """A copy in a folder of packages, in a process that searches only this folder."""
    code = "from xprnn.tools import info; print(info._copy())"
    for origin in (None, "installed"):
        site = tmp_path / str(origin)
        site.mkdir()
        (site / "xprnn").symlink_to(PACKAGE)
        if origin:
            install(site, None)
        script = (
            "import sys, importlib.metadata as m; original = m.Distribution.discover\n"
            f"sys.path.insert(0, {str(site)!r})\n"
            "m.Distribution.discover = classmethod("
            f"lambda cls, **k: original(**{{**k, 'path': [{str(site)!r}]}}))\n{code}"
        )
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        wanted = "installed" if origin else "not installed"
        assert done.stdout.strip() == f"{xprnn.__version__} in {site / 'xprnn'}, {wanted}"


@pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="Numba is not installed")
def test_kernels_are_counted_in_numbas_cache(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from xprnn.tools import info\n"
        "from xprnn.kernels.numba.package import compilations\n"
        "print(info.installation()['kernels'])\n"
        "compilations()[-1]()\n"
        "print(info.installation()['kernels'])\n"
        "for path in Path('.').rglob('*.nbi'): path.write_bytes(b'another version')\n"
        "print(info.installation()['kernels'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    total = len(numba_kernels.compilations())
    lines = done.stdout.splitlines()
    assert [line.partition(" compiled, in ")[0] for line in lines] == [
        f"0 of {total}",
        f"1 of {total}",
        f"0 of {total}",
    ]
    assert all(Path(line.partition(", in ")[2]).is_relative_to(tmp_path) for line in lines)


@pytest.mark.usefixtures("without_numba")
def test_without_numba_the_reason_is_given() -> None:
    assert info.installation()["kernels"].startswith("none: fused kernels for the CPU need Numba")


def test_threads_are_those_that_a_call_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert info.installation()["threads"] == "1 per call at most"
