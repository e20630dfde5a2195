"""No half-written file under a final name, and no trace of a failure."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from common.errors import InputError, OutputError
from common.io import StagedOutput, atomic_path, check_output_dir
from common.io import atomic as module


def test_writes_under_the_final_name_with_the_extension(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "a.nii.gz") as temporary:
        assert temporary.name.endswith(".nii.gz")
        assert temporary.parent == tmp_path
        temporary.write_text("new")
        assert not (tmp_path / "a.nii.gz").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["a.nii.gz"]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE((tmp_path / "a.nii.gz").stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left on device"),
        (PermissionError(errno.EACCES, "x"), "permission denied"),
        (RuntimeError("/some/file.cxx:1:\nITK ERROR: H5Dwrite failed"), "H5Dwrite failed"),
    ],
)
def test_failures_keep_the_old_file(tmp_path: Path, error: Exception, words: str) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OutputError, match=rf"a\.txt.*{words}"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise error
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text() == "old"


def test_itk_failure_without_reason_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = type("Usage", (), {"free": 0})()
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: full)
    with pytest.raises(OutputError, match="no space left"), atomic_path(tmp_path / "a.h5"):
        raise RuntimeError("H5Dwrite failed")


def test_other_errors_pass_but_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="unrelated"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise InputError("unrelated")
    assert list(tmp_path.iterdir()) == []


def test_missing_folder_and_folder_in_the_way(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"), atomic_path(tmp_path / "no" / "a.txt") as temporary:
        temporary.write_text("x")
    (tmp_path / "taken.txt").mkdir()
    with pytest.raises(OutputError, match="in the way"), atomic_path(tmp_path / "taken.txt"):
        pass


def test_staged_files_appear_together_in_a_new_folder(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with StagedOutput(out, ["a", "b"]) as stage:
        (stage / "a").write_text("1")
        (stage / "b").write_text("2")
        (stage / "scratch").write_text("3")
        assert not out.exists()
    assert sorted(p.name for p in out.iterdir()) == ["a", "b"]
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_block_leaves_nothing(tmp_path: Path, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "a").write_text("old")
    with pytest.raises(KeyboardInterrupt), StagedOutput(out, ["a", "b"]) as stage:
        (stage / "a").write_text("new")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])
    assert not existing or [p.read_text() for p in out.iterdir()] == ["old"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_move_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    out = tmp_path / "out"
    if existing:
        out.mkdir()
        (out / "a").write_text("old")
    replace = os.replace

    def fail_on_b(source: Path, target: Path) -> None:
        if Path(target) == out / "b":
            raise OSError(errno.ENOSPC, "full")
        replace(source, target)

    monkeypatch.setattr(module.os, "replace", fail_on_b)
    with pytest.raises(OutputError, match="out"), StagedOutput(out, ["a", "b"]) as stage:
        (stage / "a").write_text("new")
        (stage / "b").write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == (["out"] if existing else [])
    assert not existing or [(p.name, p.read_text()) for p in out.iterdir()] == [("a", "old")]


def test_an_announced_file_must_be_written(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="b"), StagedOutput(tmp_path / "out", ["a", "b"]) as stage:
        (stage / "a").write_text("1")
    assert list(tmp_path.iterdir()) == []


def test_unusable_output_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError, match="is a file"):
            check_output_dir(path)
        with pytest.raises(OutputError, match="is a file"), StagedOutput(path, ["a"]):
            pytest.fail("the block must not run")
    (tmp_path / "out" / "a").mkdir(parents=True)
    with pytest.raises(OutputError, match="in the way"), StagedOutput(tmp_path / "out", ["a"]):
        pytest.fail("the block must not run")
    with pytest.raises(OutputError, match="MB are free"):
        check_output_dir(tmp_path, needed_bytes=10**18)
    check_output_dir(tmp_path / "new" / "deep", needed_bytes=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "out"]

    def refuse(**kwargs: object) -> None:
        raise OSError(errno.EROFS, "x")

    monkeypatch.setattr(module.tempfile, "NamedTemporaryFile", refuse)
    with pytest.raises(OutputError, match="read-only"):
        check_output_dir(tmp_path)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    with pytest.raises(OutputError, match="permission denied"):
        check_output_dir(locked / "out")


def test_what_an_earlier_result_left_goes_with_it(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "old", "mine"):
        (out / name).write_text("before")
    with StagedOutput(out, ["a"], obsolete=["a", "old", "never"]) as stage:
        (stage / "a").write_text("new")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a": "new", "mine": "before"}


def test_it_stays_when_the_new_result_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in ("a", "old"):
        (out / name).write_text("before")
    replace = os.replace

    def fail_at_old(source: object, target: object) -> None:
        if Path(str(source)) == out / "old":
            raise OSError(5, "Input/output error")
        replace(str(source), str(target))

    monkeypatch.setattr(os, "replace", fail_at_old)
    with pytest.raises(OutputError, match="out"), StagedOutput(out, ["a"], obsolete=["old"]) as stage:
        (stage / "a").write_text("new")
    assert {path.name: path.read_text() for path in out.iterdir()} == {"a": "before", "old": "before"}
