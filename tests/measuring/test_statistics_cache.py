"""Statistics that are kept: the same numbers, never measured twice, never believed when damaged."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
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
from klora_compile.measuring import cache as statistics_cache
from klora_compile.measuring import measure as measuring
from klora_compile.measuring.cache import cache_file, measure_once
from klora_compile.measuring.measure import Task, measure
from klora_compile.measuring.statistics import Statistics
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

    monkeypatch.setattr(statistics_cache, "measured", spy)
    return names


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "deep" / "statistics.sqlite3"


def once(file: Path, *layers: Layer, k: int = 9) -> dict[str, Statistics]:
    ks = {each.name: (k,) for each in layers}
    found = measure_once(layers, ks, device=CPU, file=file)
    assert found == measure(layers, ks, device=CPU)
    assert list(found) == [each.name for each in layers]
    return found


def test_a_layer_is_measured_once_whatever_its_name(file: Path, measured: list[str]) -> None:
    once(file, layer(0), layer(1, name="y"))
    assert measured == ["unet.x", "unet.y"]
    once(file, layer(0, name="other"), layer(1), layer(2, name="new"))
    assert measured[2:] == ["unet.new"]


def test_partners_of_usual_ranks_need_no_second_pass(file: Path, measured: list[str]) -> None:
    for times in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        once(file, layer(), k=3 * times)
    assert measured == ["unet.x"]
    once(file, layer(), k=5 * 3)
    assert len(measured) == 2
    once(file, layer(), k=5 * 3)
    once(file, layer(), k=6)
    assert len(measured) == 2


@pytest.mark.parametrize("change", ["values", "dtype", "shape", "version"])
def test_another_tensor_or_measure_is_another_entry(
    change: str, file: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = layer()
    once(file, subject)
    down, up = subject.down.clone(), subject.up.clone()
    if change == "values":
        down[0, 0] += 1
    elif change == "dtype":
        down = down.half()
    elif change == "shape":
        down = down.reshape(3, 10, 3)
        up = up[..., None]
    else:
        monkeypatch.setattr(statistics_cache, "MEASURE_VERSION", 2)
    once(file, Layer.lora("unet", "x", down, up, 1.0))
    assert len(measured) == 2


def alter(*statements: str) -> Callable[[Path], None]:
    def run(file: Path) -> None:
        with closing(sqlite3.connect(file)) as store, store:
            for statement in statements:
                store.execute(statement)

    return run


def write(content: bytes | None) -> Callable[[Path], None]:
    """Another content; None for the first part of what is there."""

    def run(file: Path) -> None:
        file.write_bytes(file.read_bytes()[:3000] if content is None else content)

    return run


def make_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGE: dict[str, Callable[[Path], None]] = {
    "no database": write(b"not a database at all" * 99),
    "cut": write(None),
    "empty": write(b""),
    "a folder": make_folder,
    "another number": alter("update statistics set numbers = replace(numbers, '1', '2')"),
    "another row's numbers": alter(
        "update statistics set numbers = '[1.0, 1.0, [[9, 1.0]]]'",
    ),
    "no numbers": alter("update statistics set numbers = null"),
    "bytes": alter("update statistics set numbers = x'ff00'"),
    "another table": alter("drop table statistics", "create table statistics (a)"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_what_is_damaged_is_measured_again(
    case: str, file: Path, measured: list[str], logged: list[str]
) -> None:
    once(file, layer(), layer(1, name="y"))
    DAMAGE[case](file)
    once(file, layer(), layer(1, name="y"))
    assert len(measured) == 4
    told = [f"the statistics in {file} are damaged, so layers are measured again."]
    assert logged == ([] if case in ("empty", "a folder") else told)
    if case != "a folder":  # and kept anew
        once(file, layer(), layer(1, name="y"))
        assert len(measured) == 4


def test_random_damage_costs_no_more_than_measuring(file: Path) -> None:
    layers = [layer(i, name=f"x{i}") for i in range(8)]
    once(file, *layers)
    whole, random = file.read_bytes(), Random(1)
    for count in (1, 20, 200) * 8:
        damaged = bytearray(whole)
        for _ in range(count):
            damaged[random.randrange(len(damaged))] = random.randrange(256)
        file.write_bytes(damaged)
        once(file, *layers)


def test_a_file_that_another_process_holds_is_not_waited_for(
    file: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sum(statistics_cache._WAITS) <= 1.0
    monkeypatch.setattr(statistics_cache, "_WAITS", (0.0, 0.0))
    once(file, layer())
    with closing(sqlite3.connect(file, isolation_level=None)) as other:
        other.execute("begin exclusive")
        once(file, layer(), layer(1, name="y"))
    assert measured == ["unet.x", "unet.x", "unet.y"]


def test_a_file_that_cannot_be_written_is_read(file: Path, measured: list[str]) -> None:
    once(file, layer())
    file.chmod(0o444)
    file.parent.chmod(0o555)
    try:
        once(file, layer(), layer(1, name="y"))
    finally:
        file.parent.chmod(0o755)
    assert measured == ["unet.x", "unet.y"]


def test_a_folder_that_cannot_be_written_is_passed_over(
    tmp_path: Path, measured: list[str]
) -> None:
    (tmp_path / "a").write_text("a file where a folder should be")
    once(tmp_path / "a" / "statistics.sqlite3", layer())
    assert measured == ["unet.x"]


def test_progress_counts_what_was_looked_up(file: Path) -> None:
    seen: list[tuple[int, int]] = []
    layers = [layer(i, name=f"x{i}") for i in range(3)]
    once(file, *layers[:2])
    for _ in range(2):
        measure_once(
            layers, {}, device=CPU, file=file, on_layer=lambda _, *counts: seen.append(counts)
        )
    assert seen == [(3, 3), (3, 3)]


def test_a_second_pair_with_the_same_subject(tmp_path: Path, measured: list[str]) -> None:
    pipe = tiny_pipeline("sd1")
    files = [tiny_lora(pipe, tmp_path / f"{i}.safetensors", seed=i, rank=4) for i in range(3)]
    cache = tmp_path / "statistics.sqlite3"
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
    assert cache_file() == tmp_path / "cache" / "statistics.sqlite3"
    assert cache_file().is_file()


def test_the_user_s_cache_folder_is_the_system_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KLORA_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(platformdirs, "PlatformDirs", Unix)
    assert cache_file() == tmp_path / "klora" / "statistics.sqlite3"


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
