"""Putting an artifact in place: whole or not at all, whatever goes wrong on the way."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forking import forked
from support.golden_fusion import golden_fusion, switching_entry
from support.lora_files import GOLDEN

from klora_runtime import load_fusion, save_fusion
from klora_runtime.artifact import file as artifact
from klora_runtime.artifact.delta import LowRank, Stored
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.errors import ArtifactError

OLD = b"an older artifact, dear to its owner"
NAME = "a.klora.safetensors"


def large() -> Fusion:
    """A fusion of 3 x 2**21 floats, 24 MiB as a file."""
    wide = torch.arange(3 * 2**21, dtype=torch.float32).reshape(3, -1)
    pair = {slot: Stored(1.0, LowRank(wide, torch.ones(3, 3))) for slot in ("content", "style")}
    entry = replace(switching_entry(), shape=(3, 2**21), factors=pair)
    return replace(golden_fusion(), entries=(entry,))


@pytest.fixture
def old(tmp_path: Path) -> Path:
    path = tmp_path / NAME
    path.write_bytes(OLD)
    return path


def test_an_existing_file_is_not_overwritten_unless_told(old: Path) -> None:
    with pytest.raises(ArtifactError, match="exists already; add --force"):
        save_fusion(golden_fusion(), old)
    assert old.read_bytes() == OLD
    save_fusion(golden_fusion(), old, overwrite=True)
    assert old.read_bytes() == GOLDEN.read_bytes()
    assert list(old.parent.iterdir()) == [old]


def test_a_dangling_link_counts_as_existing(tmp_path: Path) -> None:
    (tmp_path / NAME).symlink_to(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="exists already"):
        save_fusion(golden_fusion(), tmp_path / NAME)
    assert (tmp_path / NAME).is_symlink()


def half_then(error: BaseException) -> Callable[..., None]:
    def write_tensors(path: Path, *_: Any) -> None:
        path.write_bytes(GOLDEN.read_bytes()[:2000])
        raise error

    return write_tensors


def failing(error: BaseException) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise error

    return call


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(
    ("target", "replacement"),
    [
        ("klora_runtime.artifact.file.write_tensors", half_then(FULL_DISK)),
        ("klora_runtime.artifact.replacing.os.fsync", failing(FULL_DISK)),
        ("pathlib.Path.replace", failing(FULL_DISK)),
    ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    target: str, replacement: Callable[..., None], old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, replacement)
    with pytest.raises(ArtifactError, match=r"cannot be written: .*No space left on device"):
        save_fusion(golden_fusion(), old, overwrite=True)
    monkeypatch.undo()
    assert old.read_bytes() == OLD
    assert list(old.parent.iterdir()) == [old]


def test_an_interrupt_leaves_the_old_file_and_nothing_else(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artifact, "write_tensors", half_then(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        save_fusion(golden_fusion(), old, overwrite=True)
    assert old.read_bytes() == OLD
    assert list(old.parent.iterdir()) == [old]


def test_bytes_that_arrive_broken_are_not_put_in_place(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_tensors(path: Path, *_: Any) -> None:
        path.write_bytes(GOLDEN.read_bytes()[:-1])

    monkeypatch.setattr(artifact, "write_tensors", write_tensors)
    with pytest.raises(ArtifactError, match=r"could not be read:\n.*truncated or extended"):
        save_fusion(golden_fusion(), old, overwrite=True)
    assert old.read_bytes() == OLD
    assert list(old.parent.iterdir()) == [old]


def test_a_real_limit_on_file_size_leaves_the_old_file(old: Path, tmp_path_factory: Any) -> None:
    fusion, errors = large(), tmp_path_factory.mktemp("errors") / "errors"

    def save() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
        save_fusion(fusion, old, overwrite=True)

    assert forked(save, errors) == 1
    assert "ArtifactError" in errors.read_text()
    assert "File too large" in errors.read_text()
    assert old.read_bytes() == OLD
    assert list(old.parent.iterdir()) == [old]


@pytest.mark.parametrize("stage", ["write_tensors", "os.fsync", "SafetensorsFile"])
def test_a_kill_leaves_the_old_file_whole(
    stage: str, old: Path, tmp_path_factory: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process dies with half of the bytes written, before they are safe, before the rename."""
    fusion, real = large(), artifact.write_tensors

    def die(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def die_half_way(path: Path, *rest: Any) -> None:
        real(path, *rest)
        os.truncate(path, path.stat().st_size // 2)
        die()

    dying = die_half_way if stage == "write_tensors" else die
    monkeypatch.setattr(f"klora_runtime.artifact.file.{stage}", dying)
    errors = tmp_path_factory.mktemp("errors") / "errors"
    ended = forked(lambda: save_fusion(fusion, old, overwrite=True), errors)
    monkeypatch.undo()
    assert ended == -signal.SIGKILL, errors.read_text()
    assert old.read_bytes() == OLD
    assert len(list(old.parent.iterdir())) == 2  # it died after the new file was begun


def test_a_kill_at_any_moment_leaves_one_whole_file(old: Path, tmp_path_factory: Any) -> None:
    """A real kill from outside as soon as a second file appears: the old bytes or all the new."""
    fusion, errors = large(), tmp_path_factory.mktemp("errors") / "errors"
    forked(
        lambda: save_fusion(fusion, old, overwrite=True),
        errors,
        until=lambda: len(os.listdir(old.parent)) > 1,
    )
    assert old.read_bytes() == OLD or load_fusion(old, check="full").nbytes == 24 * 2**20 + 36


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_file_mode_follows_the_umask(umask: int, mode: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        save_fusion(golden_fusion(), tmp_path / NAME)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / NAME).stat().st_mode) == mode


@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("no/such/folder/a.klora.safetensors", "No such file or directory"),
        ("file/a.klora.safetensors", "Not a directory"),
        ("x" * 300, "its name takes 300 bytes, more than the 255 allowed"),
    ],
)
def test_a_place_that_cannot_be_written_is_one_clear_error(
    place: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(OLD)
    with pytest.raises(ArtifactError, match=rf"cannot be written: .*{message}"):
        save_fusion(golden_fusion(), tmp_path / place, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_longest_file_name_is_written(tmp_path: Path) -> None:
    path = tmp_path / f"{'n' * 237}.klora.safetensors"
    assert len(path.name) == 255
    save_fusion(golden_fusion(), path)
    assert path.read_bytes() == GOLDEN.read_bytes()


@pytest.mark.parametrize("kind", ["folder", "fifo"])
def test_what_is_no_regular_file_is_not_replaced(kind: str, tmp_path: Path) -> None:
    place = tmp_path / kind
    place.mkdir() if kind == "folder" else os.mkfifo(place)
    with pytest.raises(ArtifactError, match="is not a regular file; name another"):
        save_fusion(golden_fusion(), place, overwrite=True)
    assert not place.is_file()
    assert [path.name for path in tmp_path.iterdir()] == [kind]


def test_a_link_stays_and_leads_to_the_new_file(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(OLD)
    link.symlink_to(target)
    save_fusion(golden_fusion(), link, overwrite=True)
    assert link.is_symlink()
    assert target.read_bytes() != OLD
    load_fusion(link, check="full")


def test_a_link_that_leads_to_itself_is_replaced(tmp_path: Path) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    save_fusion(golden_fusion(), loop, overwrite=True)
    assert loop.read_bytes() == GOLDEN.read_bytes()
