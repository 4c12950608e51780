"""(kind, options, arrays) <-> files in the safetensors format. Files are data: nothing is run.

The arrays are what torch's `state_dict` would hold, so any safetensors reader can use them;
the header's metadata says what they belong to: `format` "xprnn", `version`, `kind` and
`options` (JSON). Format: https://huggingface.co/docs/safetensors/index
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "xprnn"
VERSION = "1"
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number it begins with


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` if the block succeeds.

    Whatever ends the block early, nothing half-written is left behind.
    """
    import tempfile  # slow to import

    target = Path(path).resolve()  # a link stays, what it points to is replaced
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {Path(path).parent}")
    if target.exists() and not target.is_file():
        raise OSError(f"{os.fspath(path)}: is there already, and not a regular file")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write(
    path: str | os.PathLike[str], kind: str, options: Mapping[str, Any], arrays: Mapping[str, Any]
) -> None:
    """Write NumPy arrays and what they belong to, whole or not at all.

    :raises OSError: the file cannot be written.
    :raises ValueError: an array's dtype is none of the format's.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # safetensors 0.8 takes an array's bytes as they stand, whatever their order says
    plain = {
        name: np.asarray(array, array.dtype.newbyteorder("="), order="C")
        for name, array in arrays.items()
    }
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "options": json.dumps(dict(options), sort_keys=True),
    }
    with replacing(path) as part:
        try:
            save_file(plain, part, metadata)
        except SafetensorError as error:
            failure = OSError if "I/O error" in str(error) else ValueError
            raise failure(f"{os.fspath(path)}: cannot be written: {error}") from error


def read(path: str | os.PathLike[str]) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """The kind, options and arrays of a file that `write` wrote.

    :raises FileNotFoundError: there is no such file.
    :raises ValueError: it is not such a file, is damaged, or has another version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    if _is_torchs(path):
        raise ValueError(f"expected a safetensors file, got {described(path)}")
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            _check_metadata(path, metadata)
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, TypeError, AttributeError) as error:  # the last two: no NumPy dtype
        raise ValueError(f"{os.fspath(path)}: not a readable safetensors file: {error}") from error
    try:
        options = json.loads(metadata["options"])
    except (KeyError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{os.fspath(path)}: the options in its header are damaged") from error
    if not isinstance(options, dict):
        raise ValueError(f"{os.fspath(path)}: the options in its header are not a mapping")
    return metadata.get("kind", ""), options, arrays


def described(path: str | os.PathLike[str]) -> str:
    """What a path is that was given instead of what is in it, and how to get that."""
    name = os.fspath(path)
    if _is_torchs(path):
        return (
            f"{name}: a file of torch.save, a pickle, of which nothing is loaded or executed here; "
            "in torch, safetensors.torch.save_file(torch.load(path, weights_only=True), "
            "'weights.safetensors') writes a state dict without pickles, and then "
            "load_state_dict(safetensors.numpy.load_file('weights.safetensors')) takes it"
        )
    return (
        f"the path {name}; safetensors.numpy.load_file(path) gives the names and arrays in a file, "
        "xprnn.load(path) the layer that save() wrote"
    )


def _is_torchs(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one that torch.save wrote, by its first bytes and the names in it."""
    from zipfile import BadZipFile, ZipFile

    try:
        with Path(path).open("rb") as file:
            start = file.read(len(TORCH_LEGACY))
            if not start.startswith(b"PK\x03\x04"):
                return start == TORCH_LEGACY
            with ZipFile(file) as archive:
                return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, BadZipFile, ValueError, NotImplementedError):
        return False


def _check_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise ValueError(
            f"{os.fspath(path)}: a safetensors file, but not one that xprnn wrote "
            f"(format {metadata.get('format')!r}, expected {FORMAT!r}); to use its arrays, build "
            "the layer and pass them to load_state_dict"
        )
    if metadata.get("version") != VERSION:
        raise ValueError(
            f"{os.fspath(path)}: file version {metadata.get('version')!r}; this xprnn reads "
            f"version {VERSION!r}"
        )
