"""Files and directories that appear whole: written beside their place, synced, then renamed.

A process that is killed while it writes leaves the old file or directory. Syncing
comes first, since a file system may otherwise put the rename on the disk before the content.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

if sys.platform != "win32":
    import fcntl


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Within the context other processes, and threads, wait that want to lock this directory.

    The lock of a process that is killed ends with the process. On Windows there is none.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(root, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def temporary_path(root: Path, name: str) -> Path:
    """A path beside the file of that name in a directory, which `leftovers` recognises."""
    return root / f".{name}.{secrets.token_hex(16)}.tmp"


def leftovers(root: Path, names: Collection[str]) -> list[Path]:
    """The temporary files of killed processes for the files of these names in a directory."""
    pattern = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.[0-9a-f]{{32}}\.tmp")
    return [file for file in root.glob(".*.tmp") if pattern.fullmatch(file.name)]


@contextlib.contextmanager
def new_files(root: Path, contents: Mapping[str, bytes]) -> Iterator[dict[str, Path]]:
    """Temporary files with these contents, by name, for the block to rename one by one.

    At the end the directory is synced, and a temporary file that was not renamed is removed.
    """
    temporary = {name: temporary_path(root, name) for name in contents}
    try:
        for name, file in temporary.items():
            _write(file, contents[name])
        yield temporary
        sync(root)
    finally:
        for file in temporary.values():
            file.unlink(missing_ok=True)


def write_files(root: Path, contents: Mapping[str, bytes]) -> None:
    """Write several files of a directory, each whole, in order: the last one makes them valid.

    Example:

    >>> directory = Path(tempfile.mkdtemp())
    >>> write_files(directory, {"a": b"1", "b": b"2"})
    >>> [file.name for file in sorted(directory.iterdir())]
    ['a', 'b']
    """
    with new_files(root, contents) as temporary:
        for name, file in temporary.items():
            file.replace(root / name)


@contextlib.contextmanager
def replaced(target: Path, *, make_parents: bool = True) -> Iterator[Path]:
    """A path for the block to write a file or directory at, which then replaces `target`.

    If the block raises, `target` stays as it was. The path has the name of `target`, since some
    writers demand a certain ending.

    Example:

    >>> target = Path(tempfile.mkdtemp(), "new", "model.onnx")
    >>> with replaced(target) as path:
    ...     _ = path.write_text("a graph")
    >>> target.read_text()
    'a graph'
    """
    target = target.absolute()
    if make_parents:
        target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as workspace:
        written = Path(workspace, "new", target.name)
        written.parent.mkdir()
        yield written
        for path in (written, *written.rglob("*")):
            sync(path)
        _move(written, target, Path(workspace, "old"))
    sync(target.parent)


def sync(path: Path) -> None:
    """Force a file, or the names in a directory, to the disk."""
    windows = os.name == "nt"  # opens no directory, and syncs only files open for writing
    if windows and path.is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(file: Path, data: bytes) -> None:
    with file.open("xb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def _move(written: Path, target: Path, old: Path) -> None:
    """A directory cannot be replaced by a rename, so the old one is moved away first."""
    try:
        if target.is_dir():
            target.rename(old)
        written.replace(target)
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
