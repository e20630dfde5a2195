"""Writing without half-written files: one file (`atomic_path`), one folder of results (`StagedOutput`)."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from common.errors import OutputError

__all__ = ["StagedOutput", "atomic_path", "check_output_dir", "file_extension"]

_LITTLE_SPACE = 1 << 20  # bytes; below this, a writer that gives no reason most likely ran out of space


def file_extension(path: str | os.PathLike[str]) -> str:
    """A file's extension in lower case, both parts of `.nii.gz`."""
    path = Path(path)
    extension = path.suffix.lower()
    return ".nii.gz" if extension == ".gz" and path.stem.lower().endswith(".nii") else extension


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a file whole or not at all.

    The block writes to the path it is given, a hidden one in the same folder with the same extension. It takes the
    final name only when the block ends well; otherwise it is removed and an older file of that name is untouched.

    Args:
        path: the final name.

    Yields:
        the temporary path.

    Raises:
        OutputError: for `OSError`, and for `RuntimeError`, which is what ITK raises whatever the reason.
    """
    final = Path(path)
    extension = file_extension(final)
    stem = final.name[: len(final.name) - len(extension)]
    # Not `mkstemp`: its files are readable by their owner only, and keep that mode under the final name.
    temporary = final.parent / f".{stem}.{secrets.token_hex(4)}.part{extension}"
    try:
        if final.is_dir():
            raise OutputError(f"{final} cannot be written: a folder of that name is in the way")
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())  # a network disk may report that it is full only here
        os.replace(temporary, final)
    except (OSError, RuntimeError) as error:
        raise OutputError(f"{final} cannot be written: {_reason(error, final.parent)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def check_output_dir(path: str | os.PathLike[str], *, needed_bytes: int = 0) -> None:
    """Find out before computing whether a folder can be made and written to; nothing is left behind.

    Args:
        path: the folder, which need not exist.
        needed_bytes: free space that the results will take.

    Raises:
        OutputError: naming the path and the problem.
    """
    folder = Path(path)
    existing = _nearest_existing(folder)
    if not existing.is_dir():
        raise OutputError(f"{folder} cannot be used for results: {existing} is a file")
    try:
        # Trying beats asking: `os.access` knows nothing of read-only mounts and of quotas.
        with tempfile.NamedTemporaryFile(dir=existing, prefix=".probe-"):
            pass
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise OutputError(f"{folder} cannot be used for results: {_reason(error, existing)}") from error
    if free < needed_bytes:
        raise OutputError(
            f"{folder} cannot be used for results: they take {needed_bytes / 1e6:.0f} MB "
            f"and {free / 1e6:.0f} MB are free"
        )


class StagedOutput:
    """All files of one result, or none.

    The block writes into a hidden folder on the same file system; at its end every file is moved under its final name.
    When the block or a move fails, files that were there before are back and a newly made folder is gone.

    Args:
        output_dir: the folder for the results, made when missing.
        files: plain names of the files that the block writes; no others are moved.
        obsolete: plain names of files that an earlier result may have left and that do not belong to this one.

    Raises:
        OutputError: on entering, when the folder cannot be written to or a folder bears a file's name; on leaving,
            when a move fails.
        RuntimeError: on leaving, when the block did not write one of `files`.
    """

    def __init__(
        self, output_dir: str | os.PathLike[str], files: Sequence[str], *, obsolete: Sequence[str] = ()
    ) -> None:
        self.output_dir = Path(output_dir)
        self.files = tuple(files)
        self.obsolete = tuple(name for name in obsolete if name not in files)
        self._stage = Path()

    def __enter__(self) -> Path:
        check_output_dir(self.output_dir)
        for name in self.files:
            if (self.output_dir / name).is_dir():
                raise OutputError(f"{self.output_dir / name} cannot be written: a folder of that name is in the way")
        # In the folder itself when it exists: it may be a mount point, where nothing can be renamed from outside.
        try:
            self._stage = Path(tempfile.mkdtemp(dir=_nearest_existing(self.output_dir), prefix=".registration-"))
        except OSError as error:
            raise OutputError(f"{self.output_dir} cannot be written: {error.strerror}") from error
        return self._stage

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._commit()
        finally:
            shutil.rmtree(self._stage, ignore_errors=True)

    def _commit(self) -> None:
        missing = [name for name in self.files if not (self._stage / name).is_file()]
        if missing:
            raise RuntimeError(f"announced but not written: {', '.join(missing)}")
        made = _make_folders(self.output_dir)
        backup = self._stage / ".before"
        moved: list[str] = []
        try:
            backup.mkdir()
            for name in self.files:
                final = self.output_dir / name
                if final.exists():
                    os.replace(final, backup / name)
                moved.append(name)
                os.replace(self._stage / name, final)
            for name in self.obsolete:
                if (self.output_dir / name).is_file():
                    os.replace(self.output_dir / name, backup / name)
                    moved.append(name)
        except BaseException as error:
            for name in moved:
                with suppress(OSError):
                    (self.output_dir / name).unlink(missing_ok=True)
            for kept in backup.glob("*"):
                with suppress(OSError):
                    os.replace(kept, self.output_dir / kept.name)
            for folder in reversed(made):
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError):
                raise OutputError(f"{self.output_dir} cannot be written: {error.strerror or error}") from error
            raise


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def _make_folders(path: Path) -> list[Path]:
    """Make a folder with its parents; returns those that were missing, outermost first."""
    path = path.absolute()
    missing = [folder for folder in (path, *path.parents) if not folder.exists()][::-1]
    try:
        for folder in missing:
            folder.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path} cannot be made: {error.strerror}") from error
    return missing


def _reason(error: OSError | RuntimeError, folder: Path) -> str:
    """A few words on why writing failed."""
    if not folder.is_dir():
        return "its folder does not exist"
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    with suppress(OSError):
        if shutil.disk_usage(folder).free < _LITTLE_SPACE:
            return os.strerror(errno.ENOSPC).lower()
    if not os.access(folder, os.W_OK):
        return os.strerror(errno.EACCES).lower()
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1].removeprefix("ITK ERROR: ") if lines else type(error).__name__
