"""Fusions that stay loaded."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import pytest
from support.lora_files import GOLDEN, peft_keys, random_pair, write_lora
from support.many_loras import BLOCK

from klora_compile import compile_fusion, compress
from klora_compile.rules import Klora
from klora_runtime import (
    ArtifactError,
    ConfigError,
    Fusion,
    FusionLibrary,
    load_fusion,
    save_fusion,
)
from klora_runtime.catalogue import library as library_module

SIZE = load_fusion(GOLDEN).nbytes


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were loaded, in order."""
    names: list[str] = []

    def spy(path: Any, **options: Any) -> Fusion:
        names.append(Path(path).name)
        return load_fusion(path, **options)

    monkeypatch.setattr(library_module, "load_fusion", spy)
    return names


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / name for name in "abcd"]
    for path in paths:
        path.write_bytes(GOLDEN.read_bytes())
    return paths


def test_what_was_used_last_is_kept(files: list[Path], loads: list[str]) -> None:
    library = FusionLibrary(2 * SIZE)
    a, b, c, _ = files
    for path in (a, b, a, c, a, b):
        library.get(path)
        assert library.nbytes <= library.budget
    assert loads == ["a", "b", "c", "b"]
    assert (a in library, b in library, c in library, len(library)) == (True, True, False, 2)
    assert library.get(a) is library.get(a)
    library.clear()
    assert (len(library), library.nbytes) == (0, 0)


@pytest.mark.parametrize("budget", [0, SIZE - 1])
def test_what_is_larger_than_the_budget_is_not_kept(
    budget: int, files: list[Path], loads: list[str]
) -> None:
    library = FusionLibrary(budget)
    for _ in range(2):
        assert library.get(files[0]).nbytes == SIZE
    assert loads == ["a", "a"]
    assert len(library) == 0


def test_a_changed_file_is_loaded_again(files: list[Path], loads: list[str]) -> None:
    library = FusionLibrary(9 * SIZE)
    before = library.get(files[0])
    os.utime(files[0], ns=(1, 1))
    assert files[0] not in library
    assert library.get(files[0]) is not before
    assert loads == ["a", "a"]
    assert len(library) == 1
    link = files[0].with_name("link")
    link.symlink_to(files[0])
    library.get(link)
    assert loads == ["a", "a"]


def test_what_is_decoded_later_counts_from_the_start(tmp_path: Path) -> None:
    """Deltas that never act stay compressed until somebody reads them."""
    names = [f"{BLOCK}.attn{n}.to_{letter}" for n in (1, 2) for letter in "qk"]
    files = [
        write_lora(
            tmp_path / f"{seed}.safetensors",
            peft_keys({name: random_pair(70, 90, 3, seed=seed) for name in names}),
        )
        for seed in (1, 2)
    ]
    path = tmp_path / "small.klora.safetensors"
    rule = Klora(gamma=1e-3)  # the content alone acts
    save_fusion(compress(compile_fusion(*files, rule, device="cpu"), 0.01), path)
    library = FusionLibrary(2**20)
    fusion = library.get(path)
    idle = [
        held
        for entry in fusion.entries
        for slot, held in entry.factors.items()
        if not entry.timeline.uses(slot)
    ]
    before = fusion.nbytes
    counted = library.nbytes
    assert sum(held.pending for held in idle) > 0
    for held in idle:
        assert held.pending == sum(part.nbytes for part in held.delta.parts) or not held.pending
    assert before < fusion.nbytes <= counted == library.nbytes
    assert not any(held.pending for held in idle)
    assert library.get(path) is fusion
    tight = FusionLibrary(counted - 1)
    tight.get(path)
    assert path not in tight


def test_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    library = FusionLibrary(SIZE)
    with pytest.raises(ArtifactError, match="No such file"):
        library.get(tmp_path / "none")
    (tmp_path / "bad").write_bytes(b"<html>")
    with pytest.raises(ArtifactError, match="is a web page"):
        library.get(tmp_path / "bad")
    assert len(library) == 0


@pytest.mark.parametrize("budget", [-1, 1.5, "1 GB", True])
def test_a_budget_is_a_number_of_bytes(budget: Any) -> None:
    with pytest.raises(ConfigError, match="expected a whole number of bytes"):
        FusionLibrary(budget)


def test_threads_may_share_it(files: list[Path]) -> None:
    library = FusionLibrary(2 * SIZE)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            for step in range(40):
                assert library.get(files[(seed + step) % 4]).nbytes == SIZE
                assert library.nbytes <= library.budget
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
