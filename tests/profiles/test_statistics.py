"""Statistics that are kept: the same numbers, never measured twice, never believed when damaged."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random

import platformdirs
import pytest
import torch
from click.testing import CliRunner
from platformdirs.unix import Unix
from support.lora_files import random_pair
from tiny_pipeline import tiny_lora, tiny_pipeline

from klora_compile.cli import main
from klora_compile.compiler import compile_fusion
from klora_compile.measuring import measure as measuring
from klora_compile.measuring.measure import Task, measure
from klora_compile.measuring.statistics import Statistics
from klora_compile.profiles import once as looking_up
from klora_compile.profiles.numbers_file import Rows, write_numbers
from klora_compile.profiles.once import measure_once, statistics_key
from klora_compile.profiles.store import Store, cache_folder
from klora_compile.reading.layers import Layer

CPU = torch.device("cpu")


def layer(seed: int = 0, rank: int = 3, name: str = "x") -> Layer:
    down, up = random_pair(40, 30, rank, seed=seed)
    return Layer.lora("unet", name, down, up, 1.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the layers that were measured, in order."""
    names: list[str] = []

    def spy(tasks: Iterable[Task], device: torch.device) -> Iterator[tuple[Layer, Statistics]]:
        for layer, statistics in measuring.measured(tasks, device):
            names.append(layer.name)
            yield layer, statistics

    monkeypatch.setattr(looking_up, "measured", spy)
    return names


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "store"


def once(folder: Path, *layers: Layer, k: int = 9) -> dict[str, Statistics]:
    ks = {each.name: (k,) for each in layers}
    found = measure_once(layers, ks, device=CPU, store=Store(folder))
    assert found == measure(layers, ks, device=CPU)
    assert list(found) == [each.name for each in layers]
    return found


def test_a_lora_is_measured_once_whatever_its_names(folder: Path, measured: list[str]) -> None:
    once(folder, layer(0), layer(1, name="y"))
    assert measured == ["unet.x", "unet.y"]
    once(folder, layer(0, name="other"), layer(1))
    assert len(measured) == 2
    once(folder, layer(0), layer(2, name="y"))
    assert measured[2:] == ["unet.x", "unet.y"]


def test_partners_of_usual_ranks_need_no_second_pass(folder: Path, measured: list[str]) -> None:
    for times in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        once(folder, layer(), k=3 * times)
    assert measured == ["unet.x"]
    once(folder, layer(), k=5 * 3)
    assert len(measured) == 2
    once(folder, layer(), k=5 * 3)
    once(folder, layer(), k=6)
    assert len(measured) == 2


@pytest.mark.parametrize("change", ["values", "dtype", "shape", "version"])
def test_another_tensor_or_measure_is_another_entry(
    change: str, folder: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = layer()
    once(folder, subject)
    down, up = subject.down.clone(), subject.up.clone()
    if change == "values":
        down[0, 0] += 1
    elif change == "dtype":
        down = down.half()
    elif change == "shape":
        down = down.reshape(3, 10, 3)
        up = up[..., None]
    else:
        monkeypatch.setattr(looking_up, "MEASURE_VERSION", 2)
    once(folder, Layer.lora("unet", "x", down, up, 1.0))
    assert len(measured) == 2


def write(content: bytes | None) -> Callable[[Path], None]:
    """Another content; None for the first part of what is there."""

    def run(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:300] if content is None else content)

    return run


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def another_number(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def another_file(file: Path) -> None:
    """A whole one, of layers that are not these."""
    write_numbers(file, {}, {"numbers": Rows("F64", [[1.0, 1.0]]), "k": Rows("I64", [[]])})


def no_norms(file: Path) -> None:
    rows = [[-1.0, 1.0, 5.0]] * 2
    write_numbers(file, {}, {"numbers": Rows("F64", rows), "k": Rows("I64", [[9], [9]])})


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no safetensors": write(b"not a file of numbers at all" * 99),
    "cut": write(None),
    "empty": write(b""),
    "a folder": make_folder,
    "another number": another_number,
    "of other layers": another_file,
    "no norms": no_norms,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_is_measured_again(
    case: str, folder: Path, measured: list[str], logged: list[str]
) -> None:
    once(folder, layer(), layer(1, name="y"))
    (file,) = (folder / "statistics").iterdir()
    DAMAGE[case](file)
    once(folder, layer(), layer(1, name="y"))
    assert len(measured) == 4
    told = f"statistics/{file.name} is damaged, so its LoRA is measured again."
    assert logged == ([] if case == "of other layers" else [told])
    if case != "a folder":  # and kept anew
        once(folder, layer(), layer(1, name="y"))
        assert len(measured) == 4


def test_random_damage_costs_no_more_than_measuring(folder: Path) -> None:
    layers = [layer(i, name=f"x{i}") for i in range(8)]
    once(folder, *layers)
    (file,) = (folder / "statistics").iterdir()
    whole, random = file.read_bytes(), Random(1)
    for count in (1, 20, 200) * 8:
        damaged = bytearray(whole)
        for _ in range(count):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        file.write_bytes(damaged)
        once(folder, *layers)


def test_a_store_that_cannot_be_written_is_read(folder: Path, measured: list[str]) -> None:
    once(folder, layer())
    (folder / "statistics").chmod(0o555)
    try:
        once(folder, layer())
        once(folder, layer(1, name="y"))
    finally:
        (folder / "statistics").chmod(0o755)
    assert measured == ["unet.x", "unet.y"]


def test_a_folder_that_cannot_be_written_is_passed_over(
    tmp_path: Path, measured: list[str]
) -> None:
    (tmp_path / "a").write_text("a file where a folder should be")
    once(tmp_path / "a" / "store", layer())
    assert measured == ["unet.x"]


def test_two_writers_keep_the_sums_of_both(folder: Path, measured: list[str]) -> None:
    """As if both had measured before either kept anything."""
    key = statistics_key([layer()], CPU)
    for k in (15, 21):
        found = measure([layer()], {"unet.x": (k,)}, device=CPU)
        Store(folder).keep_statistics(key, list(found.values()))
    for k in (15, 21):
        once(folder, layer(), k=k)
    assert measured == []


def test_the_cache_is_bounded(tmp_path: Path, measured: list[str]) -> None:
    """The longest unused statistics go first."""
    folder, ks = tmp_path / "cache", {"unet.x": (9,)}
    for seed in range(3):
        measure_once([layer(seed)], ks, device=CPU, store=Store(folder))
    sizes = [path.stat().st_size for path in (folder / "statistics").iterdir()]
    for age, path in enumerate(sorted((folder / "statistics").iterdir(), key=used)):
        os.utime(path, (age, age))
    bounded = Store(folder, limit=3 * max(sizes))
    measure_once([layer(0)], ks, device=CPU, store=bounded)  # used just now
    measure_once([layer(3)], ks, device=CPU, store=bounded)
    assert len(measured) == 4
    assert Store(folder).contents().files["statistics"] == 3
    measure_once([layer(0)], ks, device=CPU, store=bounded)
    assert len(measured) == 4
    measure_once([layer(1)], ks, device=CPU, store=bounded)
    assert len(measured) == 5


def used(path: Path) -> int:
    return path.stat().st_mtime_ns


def test_progress_counts_what_was_looked_up(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    layers = [layer(i, name=f"x{i}") for i in range(3)]
    for ks in ({}, {"unet.x1": (15,)}, {}):
        measure_once(
            layers,
            ks,
            device=CPU,
            store=Store(folder),
            on_layer=lambda _, *counts: seen.append(counts),
        )
    assert seen == [(1, 3), (2, 3), (3, 3), (3, 3), (3, 3)]


def test_a_second_pair_with_the_same_subject(tmp_path: Path, measured: list[str]) -> None:
    pipe = tiny_pipeline("sd1")
    files = [tiny_lora(pipe, tmp_path / f"{i}.safetensors", seed=i, rank=4) for i in range(3)]
    cache = tmp_path / "store"
    one = compile_fusion(files[0], files[1], device="cpu", cache=cache)
    first = len(measured)
    other = compile_fusion(files[0], files[2], device="cpu", cache=cache)
    assert len(measured) == first * 3 // 2
    for fusion, style in ((one, files[1]), (other, files[2])):
        plain = compile_fusion(files[0], style, device="cpu")
        assert [e.scores for e in plain.entries] == [e.scores for e in fusion.entries]
        assert [e.timeline for e in plain.entries] == [e.timeline for e in fusion.entries]


def test_the_command_keeps_statistics_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KLORA_CACHE", str(tmp_path / "cache"))
    pipe = tiny_pipeline("sd1")
    files = [str(tiny_lora(pipe, tmp_path / f"{i}.safetensors", seed=i)) for i in range(2)]
    command = ["compile", *files, "--force", "-o", str(tmp_path / "a.klora.safetensors")]
    assert CliRunner().invoke(main, [*command, "--no-cache"]).exit_code == 0
    assert not (tmp_path / "cache").exists()
    written = (tmp_path / "a.klora.safetensors").read_bytes()
    for _ in range(2):
        assert CliRunner().invoke(main, command).exit_code == 0
        assert (tmp_path / "a.klora.safetensors").read_bytes() == written
    assert cache_folder() == tmp_path / "cache"
    assert len(list((tmp_path / "cache" / "statistics").iterdir())) == 2


def test_the_user_s_cache_folder_is_the_system_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    assert cache_folder() == tmp_path / "klora"


def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user without a home folder, as in many containers."""
    for name in ("KLORA_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)


def a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("KLORA_CACHE", str(tmp_path / "file"))


@pytest.mark.parametrize("without", [nobody, a_file])
def test_without_a_folder_for_it_compiling_works_and_says_so(
    without: Callable[[pytest.MonkeyPatch, Path], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pipe = tiny_pipeline("sd1")
    files = [str(tiny_lora(pipe, tmp_path / f"{i}.safetensors", seed=i)) for i in range(2)]
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    without(monkeypatch, tmp_path)
    command = ["compile", *files, "-o", "a.klora.safetensors", "--json"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert json.loads(result.stdout)["output"] == "a.klora.safetensors"
    assert result.stderr.splitlines() == [
        "no folder for the cache can be made, so no statistics are kept; set KLORA_CACHE to one, "
        "or add --no-cache."
    ]
    assert [path.name for path in here.iterdir()] == ["a.klora.safetensors"]
    assert CliRunner().invoke(main, [*command, "--force", "--no-cache"]).stderr == ""
