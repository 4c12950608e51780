"""The README's commands, code, files and figures are correct."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xprnn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_come_first():
    commands = re.findall(r"^pip install.*$", README, re.MULTILINE)
    assert commands == [
        "pip install -e . && xprnn demo",
        'pip install -e ".[test]" && python -m pytest -n auto',
    ]


def test_the_code_blocks_run_in_order_and_print_what_they_state(tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 5
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*?\)  # (.*)$", "\n".join(blocks), re.MULTILINE)
    assert promised
    for line in promised:
        assert line in done.stdout


def test_every_file_it_links_to_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert local
    for target in local:
        assert (ROOT / target).is_file(), target


def test_weights_are_loaded_by_torch_and_loaded_back():
    torch = pytest.importorskip("torch")
    gru = xprnn.GRU(3, 4, num_layers=2, bidirectional=True, seed=0)
    theirs = torch.nn.GRU(3, 4, 2, bidirectional=True)
    theirs.load_state_dict({k: torch.from_numpy(v) for k, v in gru.state_dict().items()})
    again = xprnn.GRU(3, 4, num_layers=2, bidirectional=True, seed=1)
    again.load_state_dict(theirs.state_dict())
    np.testing.assert_array_equal(again.parameters.flat, gru.parameters.flat)


def test_torch_refuses_rows_of_length_zero():
    torch = pytest.importorskip("torch")
    pack = torch.nn.utils.rnn.pack_padded_sequence
    with pytest.raises(RuntimeError, match="greater than 0"):
        pack(torch.zeros(2, 2, 3), torch.tensor([2, 0]))


@pytest.fixture(scope="module")
def flow_script():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location(
        "gradient_flow_plot", ROOT / "benchmarks" / "gradient_flow_plot.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_gradients_flow(flow_script):
    s = flow_script
    networks = {
        "Elman, radius 0.8": (s.elman(0.8), 0.0),
        "Elman, radius 1.0": (s.elman(1.0), 0.0),
        "Elman, radius 1.3": (s.elman(1.3), 0.0),
        "Elman, radius 1.3, inputs of size 1": (s.elman(1.3), 1.0),
        "GRU, radius 1.3, update gate half open (bias 0)": (s.gru(1.3, 0.0), 0.0),
        "GRU, radius 1.3, update gate open (bias 4)": (s.gru(1.3, 4.0), 0.0),
    }
    for name, (layer, size) in networks.items():
        assert f"| {name} | {s.relative_flow(layer, size)[-1]:.2g} |" in README


def test_clipping_lets_the_network_learn_what_it_could_not(flow_script):
    s = flow_script
    last = {
        max_norm: np.median([s.train(0.03, max_norm, seed)[0][-20:].mean() for seed in range(3)])
        for max_norm in (1.0, np.inf)
    }
    assert last[1.0] < 0.1 * s.GUESS
    assert last[np.inf] > 0.5 * s.GUESS
