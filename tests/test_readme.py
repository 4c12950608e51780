"""What the README says is tried here: its commands, its code, its files, its figures."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import xprnn

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_two_commands_come_first():
    commands = re.findall(r"^pip install.*$", README, re.MULTILINE)
    assert commands[:2] == [
        "pip install -e . && xprnn demo",
        'pip install -e ".[test]" && python -m pytest',
    ]


def test_the_code_blocks_run_in_order_and_print_what_they_say(tmp_path):
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


def test_every_file_it_points_to_exists():
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    local = [target for target in targets if not target.startswith("http")]
    assert local
    for target in local:
        assert (ROOT / target).is_file(), target


def test_weights_go_to_torch_and_back():
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
