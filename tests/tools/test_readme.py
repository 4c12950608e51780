"""The README's commands, code and links are correct, and figures in docs/theory."""

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest

import xprnn

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
THEORY = (ROOT / "docs" / "theory" / "exploding.md").read_text(encoding="utf-8")
REPOSITORY = re.compile(  # files of this repository: README.md is rendered in other places too
    r"https://(?:github\.com/xprnn/xprnn/(?:blob|tree)|raw\.githubusercontent\.com/xprnn/xprnn)"
    r"/main/(.+)"
)


def test_the_two_commands_come_first():
    commands = re.findall(r"^pip install.*$", README, re.MULTILINE)
    assert commands == [
        "pip install -e . && xprnn demo",
        'pip install -e ".[test]" && python -m pytest -n auto',
    ]


def test_it_is_short():
    assert len(README.splitlines()) <= 150


def links(text):
    """The targets of all links and pictures, in both forms of Markdown."""
    return [
        *re.findall(r"\]\(([^)]+)\)", text),
        *re.findall(r"^\[[^]]+\]: (\S+)$", text, re.MULTILINE),
    ]


def wrong_links(text):
    """Links that are not absolute, or name no file of the repository."""
    matches = {target: REPOSITORY.fullmatch(target) for target in links(text)}
    return [target for target, path in matches.items() if not path or not (ROOT / path[1]).exists()]


def test_links_are_absolute_and_their_files_exist():
    assert len(links(README)) >= 10
    assert wrong_links(README) == []


@pytest.mark.parametrize(
    "target", ["docs/gpu.md", "#train", "https://github.com/xprnn/xprnn/blob/main/docs/gone.md"]
)
def test_another_link_is_detected(target):
    assert wrong_links(f"[a]({target})") == [target]
    assert wrong_links(f"[a]: {target}") == [target]


def test_every_reference_has_a_target():
    names = re.findall(r"\[([^]]+)\]\[\]", README) + re.findall(r"\]\[([^]]+)\]", README)
    assert names
    for name in names:
        assert f"\n[{name}]: " in README, name


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
        assert f"| {name} | {s.relative_flow(layer, size)[-1]:.2g} |" in THEORY


def test_clipping_lets_the_network_learn_what_it_could_not(flow_script):
    s = flow_script
    last = {
        max_norm: np.median([s.train(0.03, max_norm, seed)[0][-20:].mean() for seed in range(3)])
        for max_norm in (1.0, np.inf)
    }
    assert last[1.0] < 0.1 * s.GUESS
    assert last[np.inf] > 0.5 * s.GUESS
