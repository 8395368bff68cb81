from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from safetensors import SafetensorError

from manylora import files
from manylora.errors import DiskFull
from manylora.files import recover, write_folder_atomic, write_json_atomic, write_text_atomic


def full_disk(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fill_halfway(folder, error: BaseException) -> None:
    with write_folder_atomic(folder) as partial:
        (partial / "a").write_text("half")
        raise error


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_text_arrives_whole_and_leaves_nothing_beside_it(tmp_path):
    write_text_atomic(tmp_path / "deep" / "a.txt", "one\ntwo \u00e9\n")
    assert (tmp_path / "deep" / "a.txt").read_bytes() == "one\ntwo \u00e9\n".encode()
    assert names(tmp_path / "deep") == ["a.txt"]


def test_json_refuses_nan_and_keeps_the_file_that_was_there(tmp_path):
    write_json_atomic(tmp_path / "a.json", {"loss": 1.5})
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json_atomic(tmp_path / "a.json", {"loss": float("nan")})
    assert (tmp_path / "a.json").read_text() == '{\n  "loss": 1.5\n}\n'


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_a_full_disk_keeps_the_text_that_was_there(tmp_path, monkeypatch, call):
    path = tmp_path / "a.txt"
    write_text_atomic(path, "old")
    monkeypatch.setattr(files.os, call, full_disk)
    with pytest.raises(DiskFull, match=r"a\.txt \([\d,]+ bytes free\)"):
        write_text_atomic(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    with write_folder_atomic(tmp_path / "step-1") as partial:
        (partial / "inner").mkdir()
        (partial / "inner" / "a").write_text("a")
        assert not (tmp_path / "step-1").exists()
    assert (tmp_path / "step-1" / "inner" / "a").read_text() == "a"
    assert names(tmp_path) == ["step-1"]


def test_a_new_folder_replaces_the_old_one_with_all_its_files(tmp_path):
    for name in ("old", "new"):
        with write_folder_atomic(tmp_path / "step-1") as partial:
            (partial / name).write_text(name)
    assert names(tmp_path / "step-1") == ["new"]
    assert names(tmp_path) == ["step-1"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        DiskFull("no space left to write state.json"),
    ],
)
def test_a_full_disk_inside_the_block_keeps_the_previous_folder(tmp_path, error):
    with write_folder_atomic(tmp_path / "step-1") as partial:
        (partial / "a").write_text("good")
    with pytest.raises(DiskFull, match=r"step-1 \(") as caught:
        fill_halfway(tmp_path / "step-1", error)
    assert isinstance(caught.value, OSError)
    assert (tmp_path / "step-1" / "a").read_text() == "good"
    assert names(tmp_path) == ["step-1"]


def test_a_rename_that_fails_brings_the_previous_folder_back(tmp_path, monkeypatch):
    with write_folder_atomic(tmp_path / "step-1") as partial:
        (partial / "a").write_text("good")
    rename = os.replace

    def fail_on_partial(source, target):
        if files.PARTIAL in str(source):
            full_disk()
        rename(source, target)

    monkeypatch.setattr(files.os, "replace", fail_on_partial)
    with pytest.raises(DiskFull), write_folder_atomic(tmp_path / "step-1") as partial:
        (partial / "a").write_text("new")
    assert (tmp_path / "step-1" / "a").read_text() == "good"
    assert names(tmp_path) == ["step-1"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_any_other_error_passes_through_and_leaves_no_folder(tmp_path, error):
    with pytest.raises(error):
        fill_halfway(tmp_path / "step-1", error())
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_cleared_and_a_replaced_folder_comes_back(tmp_path):
    (tmp_path / "step-1").mkdir()
    (tmp_path / ".partial-step-2-77").mkdir()
    (tmp_path / ".partial-step-2-77" / "a").write_text("half")
    (tmp_path / ".partial-a.txt-77").write_text("half")
    (tmp_path / ".replaced-step-1-77").mkdir()
    (tmp_path / ".replaced-step-3-77").mkdir()
    (tmp_path / ".replaced-step-3-77" / "a").write_text("good")
    assert len(recover(tmp_path)) == 4
    assert names(tmp_path) == ["step-1", "step-3"]
    assert (tmp_path / "step-3" / "a").read_text() == "good"
    assert recover(tmp_path) == []


def test_a_killed_process_leaves_either_the_old_folder_or_the_new_one(tmp_path, monkeypatch):
    """Stop after each rename and removal in turn, as kill -9 would, then recover."""

    class Killed(BaseException):
        pass

    def killing(function, calls, deadline):
        def call(*arguments, **options):
            if calls[0] == deadline:
                raise Killed
            calls[0] += 1
            return function(*arguments, **options)

        return call

    remove, rename = shutil.rmtree, os.replace
    for deadline in range(6):
        folder = tmp_path / str(deadline)
        with write_folder_atomic(folder / "step-1") as partial:
            (partial / "a").write_text("old")
        calls = [0]
        monkeypatch.setattr(files.shutil, "rmtree", killing(remove, calls, deadline))
        monkeypatch.setattr(files.os, "replace", killing(rename, calls, deadline))
        try:
            with write_folder_atomic(folder / "step-1") as partial:
                (partial / "a").write_text("new")
        except Killed:
            pass
        monkeypatch.undo()
        recover(folder)
        assert names(folder) == ["step-1"]
        assert (folder / "step-1" / "a").read_text() in ("old", "new")


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_files_of_a_folder_have_the_rights_that_new_files_have(tmp_path: Path) -> None:
    with write_folder_atomic(tmp_path / "made") as new:
        (new / "secret").touch(mode=0o600)
        (new / "plain").touch()
    rights = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "made").iterdir()}
    assert rights["secret"] == rights["plain"]
