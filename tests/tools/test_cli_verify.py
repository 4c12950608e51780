"""`xprnn verify` and `xprnn bench` as a user types them, in processes of their own."""

import importlib.util
import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

import xprnn
from tests.tools.test_cli import assert_one_line_error, xprnn_command

COMPILED = importlib.util.find_spec("numba") is not None
IMPLEMENTATIONS = ("reference", "pointwise", "sequence") if COMPILED else ("reference",)


def run_with(code, *arguments, cwd):
    """The command in a process where `code` ran first."""
    script = f"import sys; from xprnn.tools import cli\n{code}\nsys.exit(cli.main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "120"},
    )


def test_verify_checks_the_selected_cells_and_types(tmp_path):
    done = xprnn_command(
        "verify", "--cell", "gru", "lstm", "--dtype", "float32", "float16", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines() if line.rstrip().endswith(" ok")]
    float32, float16 = [(name, "float32") for name in IMPLEMENTATIONS], [("reference", "float16")]
    gradchecks = [(name, "gradcheck") for name in IMPLEMENTATIONS]
    checked = [[tuple(row[1:3]) for row in rows if row[0] == cell] for cell in ("gru", "lstm")]
    assert checked == [[*float32, *float16, *gradchecks]] * 2
    assert "FAILED" not in done.stdout


@pytest.mark.parametrize("factor", ["1.05", "0", "float('nan')"])
def test_verify_exits_with_1_and_names_the_wrong_cell(factor, tmp_path):
    fault = (
        "from xprnn.cells.gru import GRU\n"
        "original = GRU.backward_gates\n"
        "def broken(self, xp, step):\n"
        "    original(self, xp, step)\n"
        "    gates = step.gates\n"
        f"    gates *= gates.dtype.type({factor})\n"
        "GRU.backward_gates = broken"
    )
    done = run_with(fault, "verify", "--cell", "gru", "lstm", "--dtype", "float32", cwd=tmp_path)
    if "nan" in factor:  # then nothing can be compared
        assert_one_line_error(done, "layer: gru's float64 dx is not finite")
        return
    # compiled kernels have gradients of their own; in float32 they are compared with these
    failing = [f"gru ({name}, float32)" for name in IMPLEMENTATIONS[1:]] + [
        "gru (reference, gradcheck)"
    ]
    message = f"{len(failing)} of {4 * len(IMPLEMENTATIONS)} checks failed: {', '.join(failing)}"
    assert_one_line_error(done, re.escape(message))
    wrong = [line.split()[:3] for line in done.stdout.splitlines() if "FAILED" in line]
    assert [f"{cell} ({name}, {check})" for cell, name, check in wrong] == failing


def test_verify_and_bench_without_a_gpu_report_the_reason(tmp_path):
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError:
        for command in ("verify", "bench"):
            done = xprnn_command(command, "--backend", "cupy", cwd=tmp_path)
            assert_one_line_error(done, "backend 'cupy': CuPy")
            assert done.stdout == ""
    else:
        pytest.skip("this machine has a GPU")


def test_bench_measures_the_layer_and_its_peers(tmp_path):
    pytest.importorskip("torch")
    quick = "from xprnn.tools.bench import clock; clock.BUDGET = 0.0"
    sizes = ["--hidden", "16", "--input", "3", "--batch", "2", "--steps", "5", "--cell", "lstm"]
    done = run_with(quick, "bench", *sizes, "--against", "torch", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "LSTM(3, 16), lstm, T=5 N=2, float32" in done.stdout
    number = r"[\d,.]+"
    for what in ("forward", "with backward"):
        assert re.search(rf"^ {what} +xprnn +{number} +{number} *$", done.stdout, re.MULTILINE)
        ratio = rf"{number} \({number} to {number}\)"
        assert re.search(
            rf"^ {what} +torch +{number} +{number} +{ratio}", done.stdout, re.MULTILINE
        )
    assert "torch's results: at most" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text", "status"),
    [
        (["verify", "--cell", "gru", "mamba"], "invalid choice: 'mamba'", 2),
        (["verify", "--dtype", "int8"], "invalid choice: 'int8'", 2),
        (["verify", "--backend", "tpu"], "backend: expected", 1),
        (["bench", "--against", "torch,jax"], "expected torch or onnxruntime, got 'jax'", 2),
        (["bench", "--hidden", "0"], "expected an integer from 1, got '0'", 2),
        pytest.param(
            *(["bench", "--cell", "gru_reset_before", "--against", "torch"], "torch: ", 1),
            marks=pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed"),
        ),
    ],
)
def test_arguments_that_verify_and_bench_refuse(arguments, text, status, tmp_path):
    assert_one_line_error(xprnn_command(*arguments, cwd=tmp_path), text, status)


def test_bench_measures_installed_peers_and_says_how_to_install_the_others(tmp_path):
    gone = (
        "sys.modules['onnxruntime'] = None; from xprnn.tools.bench import clock; clock.BUDGET = 0.0"
    )
    sizes = ["--hidden", "4", "--batch", "2", "--steps", "5"]
    done = run_with(gone, "bench", *sizes, "--against", "onnxruntime", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "not measured: onnxruntime: not installed; pip install onnxruntime" in done.stdout
    assert re.search(r"^ forward +xprnn ", done.stdout, re.MULTILINE)
