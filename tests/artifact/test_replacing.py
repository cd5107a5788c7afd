"""Taking a place whole or not at all: who was first, what a kill left, what cannot be replaced."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.lora_files import ROOT, run_python

from klora_runtime.artifact import replacing as replacing_module
from klora_runtime.artifact.replacing import check_place, replacing
from klora_runtime.errors import ArtifactError, KloraError

OLD, NEW, OTHER = b"old", b"new", b"of another process"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def any_file(name: str) -> bool:
    return True


def write(path: Path, **options: Any) -> None:
    """A file, or a folder with one file in it."""
    with replacing(path, **options) as new:
        (new / "a" if new.is_dir() else new).write_bytes(NEW)


# --- two at once ------------------------------------------------------------------------------

EXISTS = "exists already; add --force (overwrite=True in Python) to replace it."


def test_of_two_files_without_overwrite_the_first_wins(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def late() -> None:
        with replacing(path, overwrite=False, error=ArtifactError) as new:
            new.write_bytes(NEW)
            path.write_bytes(OTHER)

    with pytest.raises(ArtifactError) as caught:
        late()
    assert str(caught.value) == f"{path} {EXISTS}"
    assert path.read_bytes() == OTHER
    assert names(tmp_path) == ["a"]


def test_of_two_folders_without_overwrite_the_first_wins(tmp_path: Path) -> None:
    path = tmp_path / "a"

    def late() -> None:
        with replacing(path, overwrite=False, folder_of=any_file) as new:
            (new / "mine").write_bytes(NEW)
            write(path, overwrite=False, folder_of=any_file)

    with pytest.raises(KloraError) as caught:
        late()
    assert str(caught.value) == f"{path} {EXISTS}"
    assert names(path) == ["a"]
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("folder_of", [None, any_file], ids=["file", "folder"])
def test_of_two_with_overwrite_the_last_wins(
    folder_of: Callable[[str], bool] | None, tmp_path: Path
) -> None:
    path = tmp_path / "a"
    with replacing(path, overwrite=True, folder_of=folder_of) as new:
        (new if folder_of is None else new / "last").write_bytes(b"last")
        write(path, overwrite=True, folder_of=folder_of)
    assert (path if folder_of is None else path / "last").read_bytes() == b"last"
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("taken", [False, True])
def test_a_file_system_without_hard_links(
    taken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def link(source: Path, target: Path) -> None:
        if taken:
            target.write_bytes(OTHER)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    path = tmp_path / "a"
    if taken:
        with pytest.raises(KloraError, match="exists already"):
            write(path, overwrite=False)
    else:
        write(path, overwrite=False)
    assert path.read_bytes() == (OTHER if taken else NEW)
    assert names(tmp_path) == ["a"]


def test_a_place_that_was_claimed_in_vain_is_free_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(KloraError, match="cannot be written: No space left on device"):
        write(tmp_path / "a", overwrite=False)
    assert names(tmp_path) == []


def test_of_many_processes_one_wins(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from klora_runtime.artifact.replacing import replacing\n"
        "from klora_runtime.errors import KloraError\n"
        "try:\n"
        "    with replacing(Path(sys.argv[1]), overwrite=False) as new:\n"
        "        new.write_text(sys.argv[2])\n"
        "        print('ready', flush=True)\n"
        "        sys.stdin.readline()\n"
        "except KloraError as error:\n"
        "    sys.exit(str(error))\n"
    )
    path = tmp_path / "a"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(index)],
            env=os.environ | {"PYTHONPATH": str(ROOT / "runtime")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(4)
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()
    errors = [child.communicate()[1] for child in children]
    (winner,) = [index for index, child in enumerate(children) if child.returncode == 0]
    assert path.read_text() == str(winner)
    assert all(error.strip() == f"{path} {EXISTS}" for error in errors if error)
    assert sum(map(bool, errors)) == 3
    assert names(tmp_path) == ["a"]


# --- what a kill left -------------------------------------------------------------------------

#: Dies in the block, with a file or a folder half written.
KILLED = """
import os, signal, sys
from pathlib import Path
from klora_runtime.artifact.replacing import replacing
path, folder = Path(sys.argv[1]), sys.argv[2] == "folder"
with replacing(path, overwrite=True, folder_of=(lambda name: True) if folder else None) as new:
    (new / "half" if folder else new).write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(params=["file", "file.png", "folder"])
def left(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder in which a writer was killed."""
    result = run_python(KILLED, tmp_path / request.param, request.param)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert len(names(tmp_path)) == 1
    return tmp_path


def test_what_a_kill_left_is_gone_after_the_next_write(left: Path) -> None:
    write(left / "b", overwrite=False)
    assert names(left) == ["b"]


def test_what_a_kill_left_does_not_go_by_a_look(left: Path) -> None:
    check_place(left / "b", overwrite=False)
    assert len(names(left)) == 1


def test_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    with (
        replacing(tmp_path / "a", overwrite=False) as file,
        replacing(tmp_path / "b", overwrite=False, folder_of=any_file) as folder,
    ):
        os.utime(file, (0, 0))
        os.utime(folder, (0, 0))
        result = run_python(
            "import sys; from pathlib import Path\n"
            "from klora_runtime.artifact.replacing import replacing\n"
            "with replacing(Path(sys.argv[1]), overwrite=False): pass\n",
            tmp_path / "c",
        )
        assert result.returncode == 0, result.stderr
        assert names(tmp_path) == sorted([file.name, folder.name, "c"])
    assert names(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize(
    "name",
    [
        ".klora-0123456789abcdef",
        ".klora-0123456789abcdef.old",
        ".klora-0123456789abcdef.tmp.",
        ".klora-0123456789abcdef.tmp.tar.gz",
        ".klora-0123456789ABCDEF.tmp",
        ".klora-mine.tmp",
        "klora-0123456789abcdef.tmp",
        ".other-0123456789abcdef.tmp",
    ],
)
def test_what_has_another_name_is_left_alone(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(OTHER)
    os.utime(tmp_path / name, (0, 0))
    write(tmp_path / "a", overwrite=False)
    assert names(tmp_path) == sorted([name, "a"])


TEMPORARY = ".klora-0123456789abcdef.tmp"


@pytest.mark.parametrize("kind", ["link", "fifo"])
def test_what_is_neither_file_nor_folder_is_left_alone(kind: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(OTHER)
    if kind == "link":
        (tmp_path / TEMPORARY).symlink_to(tmp_path / "precious")
    else:
        os.mkfifo(tmp_path / TEMPORARY)
    write(tmp_path / "a", overwrite=False)
    assert names(tmp_path) == sorted([TEMPORARY, "a", "precious"])


def test_what_belongs_to_someone_else_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / TEMPORARY).write_bytes(OTHER)
    monkeypatch.setattr(os, "getuid", lambda: os.stat(tmp_path).st_uid + 1)
    write(tmp_path / "a", overwrite=False)
    assert names(tmp_path) == [TEMPORARY, "a"]


@pytest.mark.parametrize(("hours", "stays"), [(23, True), (25, False)])
def test_a_file_system_without_locks_goes_by_age(
    hours: int, stays: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("klora_runtime.artifact.replacing.fcntl.flock", flock)
    (tmp_path / TEMPORARY).write_bytes(OTHER)
    os.utime(tmp_path / TEMPORARY, (time.time() - hours * 3600,) * 2)
    write(tmp_path / "a", overwrite=False)
    assert names(tmp_path) == [*([TEMPORARY] if stays else []), "a"]


@pytest.mark.parametrize("when", ["before it is opened", "before it is locked", "at the lock"])
def test_a_temporary_file_that_another_process_cleans_up_at_once_is_made_anew(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one sees a file without a lock in the moment before its writer has locked it."""
    cleaned: list[str] = []
    flock, touch = replacing_module.fcntl.flock, Path.touch

    def clean() -> None:
        cleaned.extend(names(tmp_path))
        os.unlink(tmp_path / cleaned[0])

    def touched(path: Path, **options: Any) -> None:
        touch(path, **options)
        if not cleaned and when == "before it is opened":
            clean()

    def locked(handle: int, operation: int) -> None:
        if not cleaned and when != "before it is opened":
            clean()
            if when == "at the lock":
                raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        flock(handle, operation)

    monkeypatch.setattr(Path, "touch", touched)
    monkeypatch.setattr(replacing_module.fcntl, "flock", locked)
    with replacing(tmp_path / "a", overwrite=False) as new:
        assert names(tmp_path) == [new.name] != cleaned
    assert names(tmp_path) == ["a"]


# --- what cannot be replaced ------------------------------------------------------------------


@pytest.mark.parametrize("begin", [check_place, write], ids=["look", "write"])
def test_a_name_that_is_too_long(begin: Callable[..., None], tmp_path: Path) -> None:
    path = tmp_path / ("ü" * 128)
    with pytest.raises(KloraError) as caught:
        begin(path, overwrite=True)
    assert str(caught.value).endswith(
        "cannot be written: its name takes 256 bytes, more than the 255 allowed. Name a shorter "
        "one."
    )
    assert names(tmp_path) == []


def test_a_name_of_the_longest_size(tmp_path: Path) -> None:
    for name in ("n" * 255, "a." + "n" * 253):
        write(tmp_path / name, overwrite=False)
        assert (tmp_path / name).read_bytes() == NEW


def test_the_ending_is_kept_for_libraries_that_go_by_it(tmp_path: Path) -> None:
    with replacing(tmp_path / "a.png", overwrite=False) as new:
        assert new.suffix == ".png"


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no"), "no"),
        (FileExistsError(errno.EEXIST, "File exists"), "{path} cannot be written: File exists."),
    ],
    ids=["any", "of a file"],
)
def test_what_fails_before_the_block_ends_leaves_nothing(
    error: Exception, words: str, tmp_path: Path
) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a", overwrite=True):
            raise error

    (tmp_path / "a").write_bytes(OLD)
    with pytest.raises((ValueError, KloraError)) as caught:
        fail()
    assert str(caught.value) == words.format(path=tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == OLD
    assert names(tmp_path) == ["a"]


def test_a_folder_whose_new_one_cannot_be_put_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    write(path, overwrite=False, folder_of=any_file)
    rename = Path.rename

    def fails(source: Path, target: Path) -> Path:
        if (source / "b").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        return rename(source, target)

    monkeypatch.setattr(Path, "rename", fails)

    def replace() -> None:
        with replacing(path, overwrite=True, folder_of=any_file) as new:
            (new / "b").write_bytes(NEW)

    with pytest.raises(KloraError, match="cannot be written: No space left on device"):
        replace()
    assert names(path) == ["a"]
    assert names(tmp_path) == ["a"]
