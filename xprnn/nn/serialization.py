"""Reading and writing (kind, options, arrays) in the safetensors format.

The arrays have the names and shapes of torch's `state_dict`, so any safetensors reader can use
them. The header's metadata describes their module: `format` "xprnn", `version`, `kind` and
`options` (JSON). Files are data: no content of a file is executed. Format: https://huggingface.co/docs/safetensors/index
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

FORMAT = "xprnn"
VERSION = "1"
PREFIX = 16  # characters of a file's name that the name of its temporary file begins with
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number at its start

Location = str | os.PathLike[str]


@contextmanager
def replacing(path: Location) -> Iterator[Path]:
    """A temporary path in the same folder, which replaces `path` if the block succeeds.

    If the block fails, the temporary file is removed. If `path` is a symbolic link, its target is
    replaced; other hard links keep the old content. A replaced file keeps its mode and, where the
    system allows it, its owner and group, but no ACL or other attributes; a new file has the
    default mode. The block must close the file: Windows cannot replace open files.

    :raises FileNotFoundError: the folder does not exist.
    :raises PermissionError: the file exists and is read-only, or its folder is not writable.
    :raises OSError: `path` exists and is not a regular file, or is not a valid file name.
    """
    target = Path(os.path.realpath(path))
    shown = target if Path(path).is_symlink() else Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {shown.parent}")
    existing = _replaceable(target, shown)
    part = target.with_name(f".{target.name[:PREFIX]}.{os.urandom(4).hex()}.part")
    # a file that replaces a private file is private from the start; the system applies the umask
    mode = 0o666 if existing is None else 0o600
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    except OSError as error:
        folder = f"{shown}: cannot be written in its folder: {error.strerror}"
        raise OSError(error.errno, folder) from error
    try:
        attributes = existing or part.stat()
        yield part
        _copy_attributes(part, attributes)  # safetensors, for example, replaces the file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _replaceable(target: Path, shown: Path) -> os.stat_result | None:
    """The `stat` of the file to be replaced; None if there is none."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(status.st_mode):
        raise OSError(f"{shown}: exists and is not a regular file")
    if not status.st_mode & 0o222:  # renaming does not check this, unlike opening
        raise PermissionError(f"{shown}: exists and is read-only")
    return status


def _copy_attributes(part: Path, source: os.stat_result) -> None:
    """Set a file's mode and, where the system allows it, its owner and group."""
    mode, current = stat.S_IMODE(source.st_mode), part.stat()
    if (current.st_uid, current.st_gid) != (source.st_uid, source.st_gid):
        try:
            os.chown(part, source.st_uid, source.st_gid)
        except OSError:  # only root may change a file's owner
            with suppress(OSError):
                os.chown(part, -1, source.st_gid)
            mode &= 0o777  # no setuid or setgid for another owner
    part.chmod(mode)


def check_outputs(outputs: Iterable[Location], inputs: Iterable[Location] = ()) -> None:
    """Check that output files differ from input files and from each other.

    Hard and symbolic links and different spellings of a path are recognised as the same file.

    :raises ValueError: two of them are the same file; the message names both.
    """
    earlier = [(path, "it is read") for path in inputs]
    for path in outputs:
        for other, why in earlier:
            if _same_file(path, other):
                raise ValueError(
                    f"{os.fspath(path)}: expected another file to write to than "
                    f"{os.fspath(other)}: {why}"
                )
        earlier.append((path, "it is written too"))


def _same_file(a: Location, b: Location) -> bool:
    try:
        return Path(a).samefile(b)
    except FileNotFoundError:  # one does not exist yet; the path may contain links
        return os.path.normcase(os.path.realpath(a)) == os.path.normcase(os.path.realpath(b))


def write(path: Location, kind: str, options: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
    """Write NumPy arrays and their kind and options to a file, atomically.

    :raises OSError: the file cannot be written.
    :raises ValueError: the format does not support an array's dtype.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    # safetensors 0.8 ignores byte order and memory layout
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


def read(path: Location) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
    """The kind, options and arrays of a file that `write` wrote.

    :raises FileNotFoundError: there is no such file.
    :raises ValueError: the file was not written by `write`, is damaged, or has another version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    if _is_torch_file(path):
        raise ValueError(f"expected a safetensors file, got {describe_path(path)}")
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


def describe_path(path: Location) -> str:
    """A description of a path that was passed instead of arrays, and how to load them."""
    name = os.fspath(path)
    if _is_torch_file(path):
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


def _is_torch_file(path: Location) -> bool:
    """Whether torch.save wrote a file, by its first bytes or the names in its archive."""
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


def _check_metadata(path: Location, metadata: Mapping[str, str]) -> None:
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
