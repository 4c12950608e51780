"""The asv suite, run, stored and published as a user would, in a copy of the project."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("asv", reason="asv is not installed: pip install 'xprnn[test]'")

from benchmarks import common, implementations, layers, programs, result_store
from benchmarks.record import QUICK

ROOT = Path(__file__).parents[2]
SIZE = "N=1 H=32 T=128"
FORWARD, LOAD = "layers.Forward.time_forward", "programs.Load.time_load"
ADDED = "xprnn-numpy-pointwise"
WRONG = ("xprnn-nonsense-reference", "nopeer-cpu", "torch-nodevice", "xprnn-numpy-nokernels")
ON_NUMBA = (ADDED, "xprnn-numpy-sequence", "xprnn-numpy-auto")
MACHINE = "a-machine"


def copy(folder: Path) -> Path:
    """The project in a folder of its own, without results."""
    for part in ("xprnn", "benchmarks"):
        unwanted = shutil.ignore_patterns("results", "__pycache__")
        shutil.copytree(ROOT / part, folder / part, ignore=unwanted)
    shutil.copy(ROOT / "asv.conf.json", folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    identity = ["-c", "user.name=a", "-c", "user.email=a@localhost"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=clean)
    return done.stdout.strip()


def commit(folder: Path) -> str:
    git(folder, "init", "-q", "-b", "main")
    git(folder, "add", ".")
    git(folder, "commit", "-q", "-m", "all")
    return git(folder, "rev-parse", "HEAD")


def record(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.record", "--machine", MACHINE, *arguments]
    environment = os.environ | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def asv(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "asv", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), "utf-8")


def values(results: dict[str, Any], benchmark: str) -> dict[tuple[str, ...], Any]:
    """The result of each combination of parameters."""
    row = dict(zip(results["result_columns"], results["results"][benchmark], strict=False))
    combinations = product(*result_store.axes(row["params"]))
    return dict(zip(combinations, row["result"], strict=True))


class Recorded:
    """A copy with one more cell and five more implementations, measured in part and stored."""

    def __init__(self, folder: Path) -> None:
        self.folder = copy(folder)
        suite = self.folder / "benchmarks" / "common.py"
        edit(suite, 'CELLS = ("gru",', 'CELLS = ("gru", "gru_reset_before",')
        names = ", ".join(map(repr, (ADDED, *WRONG)))
        edit(suite, '    "torch-cpu",\n', f'    "torch-cpu",\n    {names},\n')
        self.commit = commit(self.folder)
        git(self.folder, "checkout", "-q", "--detach")  # as on some build machines
        self.target = self.folder / "benchmarks" / "results" / "asv"
        select = rf"^{re.escape(FORWARD)}\('gru\w*', .*'float32', '{SIZE}'\)"
        wanted = [f"--bench={select}", rf"--bench=^{re.escape(LOAD)}\('gru', "]
        self.done = record(self.folder, *wanted, "--quick", "--out", str(self.target))
        self.name = f"{self.commit[:8]}-{MACHINE}-py{sys.version_info[0]}.{sys.version_info[1]}"

    def stored(self, name: str) -> Any:
        return json.loads((self.target / MACHINE / name).read_text("utf-8"))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    return Recorded(tmp_path_factory.mktemp("project"))


def test_one_name_adds_a_cell_or_an_implementation(recorded: Recorded) -> None:
    assert recorded.done.returncode == 0, recorded.done.stdout + recorded.done.stderr
    measured = values(recorded.stored(f"{recorded.name}.json"), FORWARD)
    for cell in ("gru", "gru_reset_before"):
        assert measured[cell, "xprnn-numpy-reference", "float32", SIZE] > 0
    assert measured["gru", "torch-cpu", "float32", SIZE] > 0  # the tests require torch
    assert measured["gru_reset_before", "onnxruntime-cpu", "float32", SIZE] > 0
    config = recorded.folder / "asv.conf.json"
    settings = json.loads(config.read_text()) | {"results_dir": str(recorded.target)}
    (recorded.folder / "publish.json").write_text(json.dumps(settings))
    done = asv(recorded.folder, "publish", "--config", "publish.json")
    assert done.returncode == 0, done.stdout + done.stderr
    site = recorded.folder / ".asv" / "html"
    parameters = json.loads((site / "index.json").read_text())["benchmarks"][FORWARD]["params"]
    assert "'gru_reset_before'" in parameters[0] and f"'{ADDED}'" in parameters[1]
    assert not {repr(name) for name in WRONG} & {*parameters[1]}  # nothing to show
    for name in json.loads((site / "index.json").read_text())["benchmarks"]:
        assert len(list(site.rglob(f"{name}.json"))) == 2, name  # the graph and its summary
    (graph,) = [p for p in site.rglob(f"{FORWARD}.json") if "summary" not in p.parts]
    ((_, drawn),) = json.loads(graph.read_text())
    assert [v for v in drawn if v is not None] == [v for v in measured.values() if v is not None]


def test_results_not_measured_again_are_kept(recorded: Recorded, tmp_path: Path) -> None:
    shutil.copytree(recorded.target, tmp_path / "out")
    select = rf"^{re.escape(FORWARD)}\('gru_reset_before', .*'float32', 'N=8 H=64 T=128'\)"
    done = record(recorded.folder, f"--bench={select}", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr
    again = json.loads((tmp_path / "out" / MACHINE / f"{recorded.name}.json").read_text())
    earlier = recorded.stored(f"{recorded.name}.json")
    assert values(again, LOAD) == values(earlier, LOAD)
    before, after = values(earlier, FORWARD), values(again, FORWARD)
    new = {key for key in after if after[key] != before.get(key)}
    assert new and {key[0] for key in new} == {"gru_reset_before"}
    assert {key[3] for key in new} == {"N=8 H=64 T=128"}
    skips = json.loads((tmp_path / "out" / MACHINE / "skips.json").read_text())[recorded.name]
    for name, reasons in recorded.stored("skips.json")[recorded.name].items():
        for reason, texts in reasons.items():
            assert set(texts) <= set(skips[name][reason])
    both = skips["layers.Forward"]["nopeer: expected xprnn, torch, onnxruntime"]
    assert "gru_reset_before, nopeer-cpu, float32, N=8 H=64 T=128" in both


def test_what_cannot_be_measured_is_null_with_its_reason(recorded: Recorded) -> None:
    measured = values(recorded.stored(f"{recorded.name}.json"), FORWARD)
    skips = recorded.stored("skips.json")[recorded.name]["layers.Forward"]
    names = (*common.CPU.implementations, ADDED, *WRONG)
    cells = ("gru", "gru_reset_before")
    wanted = {(cell, name, "float32", SIZE) for cell in cells for name in names}
    listed = [text.split(", ") for texts in skips.values() for text in texts]
    skipped = {key for key in wanted if any(result_store._fits(key, each) for each in listed)}
    assert skipped == {key for key in wanted if measured.get(key) is None}
    reasons = {text.split(", ")[1]: reason for reason, texts in skips.items() for text in texts}
    assert "expected 'numpy', 'cupy'" in reasons["xprnn-nonsense-reference"]
    assert reasons["nopeer-cpu"] == "nopeer: expected xprnn, torch, onnxruntime"
    assert "one of the devices cpu, cuda" in reasons["torch-nodevice"]
    assert "expected one of the kernels" in reasons["xprnn-numpy-nokernels"]
    compiled = [measured.get(("gru", name, "float32", SIZE)) for name in ON_NUMBA]
    if importlib.util.find_spec("numba") is None:
        assert compiled == [None, None, None]
        assert all("Numba" in reasons[name] for name in ON_NUMBA)
    else:
        assert None not in compiled


def test_neither_paths_nor_host_names_are_stored(recorded: Recorded) -> None:
    files = [path for path in recorded.target.rglob("*") if path.is_file()]
    assert {path.name for path in files} == {
        "benchmarks.json", "machine.json", "skips.json", f"{recorded.name}.json"
    }  # fmt: skip
    for path in files:
        text = path.read_text("utf-8")
        for unwanted in (sys.prefix, str(recorded.folder), "xprnn-asv-", "existing"):
            assert unwanted not in text, path
        assert f'"{platform.node()}"' not in text and "NaN" not in text
    results = recorded.stored(f"{recorded.name}.json")
    assert results["commit_hash"] == recorded.commit
    assert results["env_name"] == recorded.name.partition("-")[2]
    seconds = int(git(recorded.folder, "log", "-1", "--format=%ct"))
    assert results["date"] == 1000 * seconds
    assert results["requirements"]["numpy"] and results["env_vars"] == {"OMP_NUM_THREADS": "1"}


def test_the_commit_is_measured_and_not_the_checkout(tmp_path: Path) -> None:
    folder = copy(tmp_path / "project")
    marked = """
def track_mark():
    import numpy, xprnn
    from .common import usable_backend
    usable_backend("numpy")
    return xprnn.mark

def timeraw_mark():
    return "import xprnn; assert hasattr(xprnn, 'mark')"
"""
    (folder / "benchmarks" / "marked.py").write_text(marked)
    package = folder / "xprnn" / "__init__.py"
    for mark in (7, 8):
        with package.open("a") as file:
            file.write(f"\nmark = {mark}\n")
        commit(folder)
    package.write_text("raise RuntimeError('the checkout')\n")
    for name, mark in (("HEAD", 8), ("HEAD^", 7)):
        out = tmp_path / f"out {mark}"
        # the user's settings have no effect
        done = record(folder, name, "--bench=marked", "--out", str(out), XPRNN_BACKEND="none")
        assert done.returncode == 0, done.stdout + done.stderr
        (file,) = (out / MACHINE).glob("*-py*.json")
        results = json.loads(file.read_text())
        column = results["result_columns"].index("result")
        assert results["results"]["marked.track_mark"][column] == [mark]
        assert results["commit_hash"] == git(folder, "rev-parse", name)


def test_a_failed_benchmark_is_not_a_skip(tmp_path: Path) -> None:
    folder = copy(tmp_path / "project")
    broken = "def time_broken():\n    raise RuntimeError('injected')\n"
    (folder / "benchmarks" / "broken.py").write_text(broken)
    done = record(folder, "0" * 40, "--date", "2026-01-02T03:04:05+00:00",
                  "--bench=broken", "--out", str(tmp_path / "out"))  # fmt: skip
    assert done.returncode == 1 and "injected" in done.stdout
    (file,) = (tmp_path / "out" / MACHINE).glob("00000000-*.json")  # without a git history
    results = json.loads(file.read_text())
    assert results["commit_hash"] == "0" * 40 and results["date"] == 1767323045000
    row = dict(
        zip(results["result_columns"], results["results"]["broken.time_broken"], strict=False)
    )
    assert row["result"] is None
    assert json.loads((file.parent / "skips.json").read_text()) == {file.stem: {}}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("0123abcd",), "commit 0123abcd: .*without git history pass the 40 digits and --date"),
        (
            ("main", "--date", "2026-01-01"),
            "commit: with --date expected 40 hex digits, got 'main'",
        ),
    ],
)
def test_an_unknown_commit_is_refused(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    folder = copy(tmp_path / "project")
    done = record(folder, *arguments, "--quick")
    assert done.returncode == 1 and re.search(message, done.stderr, re.DOTALL), done.stderr
    assert "Traceback" not in done.stderr
    assert not (folder / "benchmarks" / "results").exists()


def test_asv_check_passes() -> None:
    done = asv(ROOT, "check", "-E", "existing:same")
    assert done.returncode == 0 and "No problems found" in done.stdout, done.stdout + done.stderr


def test_asv_check_detects_a_fault_in_the_suite(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    suite = folder / "benchmarks" / "layers.py"
    edit(suite, "def time_100_steps(self, cell: str,", "def time_100_steps(self,")
    commit(folder)
    done = asv(folder, "check", "-E", "existing:same")
    assert done.returncode != 0 and "wrong number of arguments" in done.stdout


def test_importing_the_suite_imports_no_library() -> None:
    names = sorted(path.stem for path in (ROOT / "benchmarks").glob("*.py"))
    code = "import sys, importlib\n"
    code += f"for name in {names}: importlib.import_module('benchmarks.' + name)\n"
    code += "heavy = {'numpy', 'xprnn', 'torch', 'cupy', 'onnxruntime', 'matplotlib', 'asv'}\n"
    code += "print(sorted(heavy & sys.modules.keys()))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def discovered(path: Path, *, gpu: bool) -> dict[str, list[list[str]]]:
    """The parameters of each benchmark that asv finds, on a machine with a GPU or without one.

    :param path: An empty folder, from then on the only one with programs.
    """
    if gpu:
        driver = path / "nvidia-smi"
        driver.write_text("#!/bin/sh\necho NVIDIA H100\n")
        driver.chmod(0o755)
    code = "from asv_runner import discovery\nimport sys\n"
    code += "discovery.list_benchmarks(sys.argv[1], sys.stdout)"
    command = [sys.executable, "-c", code, str(ROOT / "benchmarks")]
    environment = os.environ | {"PATH": str(path)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {each["name"]: each["params"] for each in json.loads(done.stdout)}


def test_a_cpu_has_its_own_grid(tmp_path: Path) -> None:
    found = discovered(tmp_path, gpu=False)
    assert {name.partition(".")[0] for name in found} == {"layers", "programs"}
    for name, params in found.items():
        assert len([*product(*params)]) <= 60, name
        assert not re.search("cupy|cuda|tf32|float16", str(params)), name


def test_a_gpu_has_its_own_complete_grid(tmp_path: Path) -> None:
    (tmp_path / "without").mkdir()
    (tmp_path / "with").mkdir()
    on_cpu = discovered(tmp_path / "without", gpu=False)
    found = discovered(tmp_path / "with", gpu=True)
    assert on_cpu.items() <= found.items()
    added = {name: result_store.axes(found[name]) for name in found.keys() - on_cpu.keys()}
    assert {name.partition(".")[0] for name in added} == {"gpu"}
    dtypes = {"float32", "float64", "tf32", "float16", "bfloat16"}
    for name in ("Forward.time_forward", "Training.time_training"):
        cells, names, kinds, sizes = added[f"gpu.{name}"]
        assert ({*cells}, {*kinds}, len(sizes)) == ({*common.CELLS}, dtypes, 7)
        assert {f"xprnn-cupy-{each}" for each in ("reference", "pointwise", "sequence")} < {*names}
        defined = added[f"gpu.Definition{name}"]
        assert ({*defined[0]}, defined[2:]) == ({*common.DEFINED}, [[*kinds], [*sizes]])
        assert {*defined[1]} == {each for each in names if each.startswith("xprnn-")}
        assert "torch-cuda" in names and ("onnxruntime-cuda" in names) == (name[0] == "F")
    for name in on_cpu.keys() - {"layers.TrainingMemory.peakmem_training"}:
        rest = name.partition(".")[2]
        assert f"gpu.{rest}" in added or rest == "Import.timeraw_import", name


@pytest.mark.parametrize(
    "kind",
    [
        *(layers.Forward, layers.Training, layers.DefinitionForward, layers.DefinitionTraining),
        *(layers.Step, layers.Stepper),
    ],
)
def test_a_cpus_grid_is_filled(kind: type[layers.LayerBenchmark]) -> None:
    """With Numba, each implementation has each cell, and nothing in the grid is skipped."""
    importlib.import_module("numba")
    cells, names, (dtype,), sizes = kind.params
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XPRNN_KERNELS", "auto")  # restored at the end
        for cell, name in product(cells, names):
            implementations.prepare(kind.task, cell, name, dtype, sizes[0])


def test_peers_are_measured_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    assert common.installed(("torch-cpu", "onnxruntime-cpu")) == ("torch-cpu", "onnxruntime-cpu")
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "torch" else find(name)
    )
    forward, training = (common.CPU.params(task)[1] for task in ("forward", "training"))
    assert not [name for name in (*forward, *training) if name.startswith("torch")]
    assert "onnxruntime-cpu" in forward and "onnxruntime-cpu" not in training
    assert common.installed(programs.LIBRARIES) == ("numpy", "xprnn", "onnxruntime")


def test_the_environment_has_numba_and_no_peer() -> None:
    matrix = json.loads((ROOT / "asv.conf.json").read_text("utf-8"))["matrix"]
    assert [*matrix["req"]] == ["numba"]


def test_the_quick_profile_has_some_of_every_benchmark(tmp_path: Path) -> None:
    """A renamed benchmark would drop out of it silently."""
    combinations = {
        f"{name}({', '.join(chosen)})": name.rpartition(".")[0]
        for name, params in discovered(tmp_path, gpu=True).items()
        for chosen in product(*params)
    }
    taken = {text for text in combinations if any(re.search(part, text) for part in QUICK)}
    assert {combinations[text] for text in taken} == {*combinations.values()}
    for part in QUICK:
        assert any(re.search(part, text) for text in combinations), part


def test_the_page_describes_every_benchmark(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "asv.md").read_text("utf-8")
    described = set(re.findall(r"`((?:layers|programs|gpu)\.[A-Z]\w+)`", page))
    known = discovered(tmp_path, gpu=True)
    names = [f"{name}{chosen}" for name, params in known.items() for chosen in product(*params)]
    for pattern in re.findall('--bench "(.*)"', page):
        assert any(re.search(pattern, name) for name in names), pattern
    assert described == {name.rpartition(".")[0] for name in known}
