"""(kind, options, arrays) <-> files in the safetensors format. Files are data: nothing is run.

The arrays are what torch's `state_dict` would hold, so any safetensors reader can use them;
the header's metadata says what they belong to: `format` "xprnn", `version`, `kind` and
`options` (JSON). Format: https://huggingface.co/docs/safetensors/index
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
PREFIX = 16  # characters of a file's name in that of its temporary file, to be recognised by
TORCH_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # the pickled number it begins with

Location = str | os.PathLike[str]


@contextmanager
def replacing(path: Location) -> Iterator[Path]:
    """A path beside `path` to write to; it takes the place of `path` if the block succeeds.

    Whatever ends the block early, nothing half-written is left behind. A symbolic link stays and
    the file that it points to is replaced; another hard link keeps the old content. A file that is
    replaced keeps its mode and, where the system allows it, its owner and group, but no ACL and no
    other attribute; a new one gets the mode of any new file. The block closes what it opened:
    Windows replaces no open file.

    :raises FileNotFoundError: the folder does not exist.
    :raises PermissionError: the file is there and read-only, or its folder takes no new files.
    :raises OSError: something else than a regular file is there, or the name cannot be one.
    """
    target = Path(os.path.realpath(path))
    shown = target if Path(path).is_symlink() else Path(path)
    if not target.parent.is_dir():
        raise FileNotFoundError(f"no such folder: {shown.parent}")
    before = _replaceable(target, shown)
    part = target.with_name(f".{target.name[:PREFIX]}.{os.urandom(4).hex()}.part")
    # what replaces a private file is private from the start; the system applies the umask
    mode = 0o666 if before is None else 0o600
    try:
        os.close(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode))
    except OSError as error:
        folder = f"{shown}: cannot be written in its folder: {error.strerror}"
        raise OSError(error.errno, folder) from error
    try:
        wanted = before or part.stat()
        yield part
        _give(part, wanted)  # safetensors, for one, has replaced the file by its own
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def _replaceable(target: Path, shown: Path) -> os.stat_result | None:
    """What the system says of the file that is to be replaced; None where there is none."""
    try:
        found = target.stat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{shown}: is there already, and not a regular file")
    if not found.st_mode & 0o222:  # renaming would go past it, unlike opening
        raise PermissionError(f"{shown}: is there already, and read-only")
    return found


def _give(part: Path, wanted: os.stat_result) -> None:
    """Give a file this owner and group, where the system allows it, and this mode."""
    mode, now = stat.S_IMODE(wanted.st_mode), part.stat()
    if (now.st_uid, now.st_gid) != (wanted.st_uid, wanted.st_gid):
        try:
            os.chown(part, wanted.st_uid, wanted.st_gid)
        except OSError:  # only root may give a file away
            with suppress(OSError):
                os.chown(part, -1, wanted.st_gid)
            mode &= 0o777  # no program runs as another user for that
    part.chmod(mode)


def check_outputs(outputs: Iterable[Location], inputs: Iterable[Location] = ()) -> None:
    """Check that files to be written are neither files to be read nor each other.

    Links, hard and symbolic, and different spellings of a path name the same file.

    :raises ValueError: two of them are the same file; it names both.
    """
    taken = [(path, "it is read") for path in inputs]
    for path in outputs:
        for other, why in taken:
            if _same_file(path, other):
                raise ValueError(
                    f"{os.fspath(path)}: expected another file to write to than "
                    f"{os.fspath(other)}: {why}"
                )
        taken.append((path, "it is written too"))


def _same_file(a: Location, b: Location) -> bool:
    try:
        return Path(a).samefile(b)
    except FileNotFoundError:  # one is yet to be written, maybe through a link
        return os.path.normcase(os.path.realpath(a)) == os.path.normcase(os.path.realpath(b))


def write(path: Location, kind: str, options: Mapping[str, Any], arrays: Mapping[str, Any]) -> None:
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


def read(path: Location) -> tuple[str, dict[str, Any], dict[str, np.ndarray]]:
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


def described(path: Location) -> str:
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


def _is_torchs(path: Location) -> bool:
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
