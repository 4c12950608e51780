"""The command line as a user types it, in processes of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import xprnn
from xprnn.tools.data.japanese_vowels import japanese_vowels


def xprnn_command(*arguments, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-m", "xprnn", *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def assert_one_line_error(done, text, status=1):
    assert done.returncode == status
    assert done.stderr.startswith("xprnn: error: ")
    assert done.stderr.count("\n") == 1
    assert re.search(text, done.stderr), done.stderr


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return xprnn_command("demo", "--epochs", "3", "--out", "out", cwd=folder), folder


def test_demo_trains_saves_and_ends_with_the_accuracy(demo):
    done, folder = demo
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    accuracy = re.fullmatch(r"test accuracy (\d+\.\d) %", lines[-1])
    assert accuracy
    assert 30.0 < float(accuracy[1]) <= 100.0  # after three epochs; chance is 11
    assert re.search(r"\d+\.\d s, \d+ utterances per second", done.stdout)
    assert "loss" in done.stdout
    names = {path.name for path in (folder / "out").iterdir()}
    arrays = {"test_x.npy", "test_lengths.npy", "test_y.npy"}
    assert names == {"model.safetensors", "readout.safetensors", *arrays}

    layer = xprnn.load(folder / "out" / "model.safetensors")
    readout = xprnn.load(folder / "out" / "readout.safetensors")
    test = japanese_vowels()[1]
    _, h_n = layer(test.x, lengths=test.lengths)
    predicted = readout(np.concatenate(h_n, axis=1)).argmax(axis=1)
    assert f"{100 * (predicted == test.speakers).mean():.1f}" == accuracy[1]


def test_the_documented_command_prints_the_demos_accuracy(demo):
    done, folder = demo
    page = Path(__file__).parents[2] / "docs" / "guide" / "command_line.md"
    (command,) = re.findall(r"^xprnn (run .*)$", page.read_text("utf-8"), re.MULTILINE)
    ran = xprnn_command(*command.replace("xprnn-demo/", "out/").split(), cwd=folder)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-2:] == [
        "wrote out/y.npy: 370 x 9",
        done.stdout.splitlines()[-1].removeprefix("test "),
    ]
    (folder / "out" / "y.npy").unlink()


@pytest.mark.parametrize("batch", [1000, 64])
def test_run_writes_the_output_of_the_layer(demo, batch, tmp_path, reference):
    folder = demo[1] / "out"
    done = xprnn_command(
        "run",
        folder / "model.safetensors",
        folder / "test_x.npy",
        "-o",
        "y.npy",
        "--lengths",
        folder / "test_lengths.npy",
        "--batch",
        batch,
        cwd=tmp_path,
        XPRNN_KERNELS="reference",
    )
    assert done.returncode == 0, done.stderr
    assert "wrote y.npy: 370 x 29 x 128" in done.stdout
    layer = xprnn.load(folder / "model.safetensors")
    x, lengths = np.load(folder / "test_x.npy"), np.load(folder / "test_lengths.npy")
    wanted = np.concatenate(
        [layer(x[k : k + batch], lengths=lengths[k : k + batch])[0] for k in range(0, 370, batch)]
    )
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["y.npy"]


@pytest.mark.parametrize("shape", [(7, 5, 3), (7, 3), (7, 0, 3), (0, 4, 3)])
def test_run_time_major_unbatched_and_empty(shape, tmp_path):
    layer = xprnn.LSTM(3, 4, num_layers=2, dtype="float64", seed=0)
    layer.save(tmp_path / "m.safetensors")
    x = np.random.default_rng(0).standard_normal(shape)
    np.save(tmp_path / "x.npy", x)
    done = xprnn_command(
        "run", "m.safetensors", "x.npy", "-o", "y.npy", "--batch", "2", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), layer(x)[0], rtol=1e-13, atol=1e-15)


def write_inputs(folder):
    xprnn.GRU(3, 4, seed=0).save(folder / "m.safetensors")
    xprnn.GRUCell(3, 4, seed=0).save(folder / "cell.safetensors")
    x = np.ones((6, 5, 3), np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "wide.npy", np.ones((6, 5, 9), np.float32))
    np.save(folder / "double.npy", x.astype(np.float64))
    np.save(folder / "lengths.npy", np.array([1, 2, 3, 4, 99]))
    np.save(folder / "objects.npy", np.array([{}, None]), allow_pickle=True)
    np.savez(folder / "many.npz", x=x)
    (folder / "zip.npy").write_bytes(b"PK\x03\x04 and no archive")
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (100000000000000000000, 2, 3), }"
    huge = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()
    (folder / "huge.npy").write_bytes(huge)
    (folder / "text.npy").write_text("no array")
    (folder / "y.npy").write_text("old content")


@pytest.mark.parametrize(
    ("arguments", "text", "status"),
    [
        (["run", "gone", "x.npy", "-o", "y.npy"], "no such file: gone", 1),
        (["run", "m.safetensors", "gone.npy", "-o", "y.npy"], "no such file: gone.npy", 1),
        (["run", "m.safetensors", "text.npy", "-o", "y.npy"], "text.npy: not a readable .npy", 1),
        (["run", "m.safetensors", "objects.npy", "-o", "y.npy"], "objects.npy: not a readable", 1),
        (["run", "m.safetensors", "many.npz", "-o", "y.npy"], "many.npz: an archive", 1),
        (["run", "m.safetensors", "zip.npy", "-o", "y.npy"], "zip.npy: not a readable", 1),
        (["run", "m.safetensors", "huge.npy", "-o", "y.npy"], "huge.npy: not a readable", 1),
        (["run", "m.safetensors", "x.npy", "-o", "x.npy"], "x.npy: expected another file", 1),
        (["run", "m.safetensors", "x.npy", "-o", "m.safetensors"], "expected another file", 1),
        (["run", "m.safetensors", "x.npy", "-o", "."], "not a regular file", 1),
        (["run", "x.npy", "x.npy", "-o", "y.npy"], "x.npy: not a readable safetensors", 1),
        (["run", "cell.safetensors", "x.npy", "-o", "y.npy"], "holds a GRUCell", 1),
        (
            ["run", "m.safetensors", "wide.npy", "-o", "y.npy"],
            r"wide.npy: expected .* the last of 3, got",
            1,
        ),
        (
            ["run", "m.safetensors", "lengths.npy", "-o", "y.npy"],
            "lengths.npy: expected a float32 array of 2 or 3",
            1,
        ),
        (
            ["run", "m.safetensors", "double.npy", "-o", "y.npy"],
            "double.npy: expected a float32 array",
            1,
        ),
        (
            ["run", "m.safetensors", "x.npy", "-o", "y.npy", "--lengths", "lengths.npy"],
            "lengths: expected 0 to 6",
            1,
        ),
        (["run", "m.safetensors", "x.npy", "-o", "no/y.npy"], "no such folder: no", 1),
        (["run", "m.safetensors", "x.npy", "-o", "y.npy", "--backend", "tpu"], "backend", 1),
        (["run", "m.safetensors", "x.npy"], "required: -o", 2),
        (
            ["run", "m.safetensors", "x.npy", "-o", "y.npy", "--batch", "0"],
            "an integer from 1",
            2,
        ),
        (["demo", "--epochs", "none"], "--epochs", 2),
        (["demo", "--seed", "-1"], "seed: expected 0 to", 1),
        (["demo", "--cell", "transformer"], "invalid choice", 2),
        (["nonsense"], "invalid choice", 2),
        ([], "required", 2),
    ],
)
def test_errors_are_one_line_and_leave_no_files(arguments, text, status, tmp_path):
    write_inputs(tmp_path)
    before = {path.name for path in tmp_path.iterdir()}
    assert_one_line_error(xprnn_command(*arguments, cwd=tmp_path), text, status)
    after = {path.name for path in tmp_path.iterdir()} - {"xprnn-demo"}
    assert after == before
    assert (tmp_path / "y.npy").read_text() == "old content"


def test_a_backend_without_a_gpu_is_an_error_with_a_reason(tmp_path):
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError:
        done = xprnn_command("demo", "--backend", "cupy", cwd=tmp_path)
        assert_one_line_error(done, "backend 'cupy': CuPy")
        done = xprnn_command("demo", cwd=tmp_path, XPRNN_BACKEND="cupy")
        assert_one_line_error(done, "backend 'cupy': CuPy")
    else:
        pytest.skip("this machine has a GPU")


def test_the_output_goes_through_a_link_and_never_replaces_a_pipe(tmp_path):
    write_inputs(tmp_path)
    (tmp_path / "link.npy").symlink_to("y.npy")
    os.mkfifo(tmp_path / "pipe.npy")
    command = ["run", "m.safetensors", "x.npy", "-o"]
    assert xprnn_command(*command, "link.npy", cwd=tmp_path).returncode == 0
    assert (tmp_path / "link.npy").is_symlink()
    assert np.load(tmp_path / "y.npy").shape == (6, 5, 4)
    assert_one_line_error(xprnn_command(*command, "pipe.npy", cwd=tmp_path), "not a regular file")
    assert (tmp_path / "pipe.npy").is_fifo()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_run_leaves_no_output(number, tmp_path):
    xprnn.GRU(8, 64, num_layers=3, seed=0).save(tmp_path / "m.safetensors")
    np.save(tmp_path / "x.npy", np.ones((400, 3000, 8), np.float32))
    command = [sys.executable, "-m", "xprnn", "run", "m.safetensors", "x.npy", "-o", "y.npy"]
    running = subprocess.Popen(
        [*command, "--batch", "1"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".y.npy.*.part")):  # until it has begun to write
        assert running.poll() is None, running.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    running.send_signal(number)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == (130 if number == signal.SIGINT else 128 + number)
    assert b"Traceback" not in stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "x.npy"]


def test_nohup_still_ignores_a_hangup(tmp_path):
    write_inputs(tmp_path)
    script = (
        "import os, signal, sys; from xprnn.tools import apply, cli\n"
        "signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # what nohup does
        "original = apply.apply\n"
        "def hung_up(*a, **k):\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    return original(*a, **k)\n"
        "apply.apply = hung_up\n"
        "sys.exit(cli.main(['run', 'm.safetensors', 'x.npy', '-o', 'new.npy']))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, timeout=60)
    assert done.returncode == 0
    assert np.load(tmp_path / "new.npy").shape == (6, 5, 4)


def test_info_lists_versions_and_backends(tmp_path):
    done = xprnn_command("info", cwd=tmp_path, COLUMNS="200")
    assert done.returncode == 0, done.stderr
    assert f"numpy         {np.__version__}" in done.stdout
    assert re.search(r"numpy +usable", done.stdout)
    assert re.search(r"^ this copy +value", done.stdout, re.MULTILINE)
    for name in ("xprnn +.* in ", "kernels +", r"threads +\d+ per call"):
        assert re.search(rf"^ {name}", done.stdout, re.MULTILINE)
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        assert f"not usable: {error}" in " ".join(done.stdout.split())


def test_version(tmp_path):
    assert xprnn_command("--version", cwd=tmp_path).stdout == f"xprnn {xprnn.__version__}\n"
