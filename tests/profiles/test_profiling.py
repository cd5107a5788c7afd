"""Profiles of LoRAs: measured once, exact, resumed, refused one by one, by any engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
import torch
from support.dying import dies_once
from support.lora_files import peft_keys, random_pair, write_lora
from support.many_loras import BLOCK, write_many

from klora_compile import read_adapter
from klora_compile.engines import Engine, engine_of, results
from klora_compile.halves import Halves
from klora_compile.measuring import measure as measuring
from klora_compile.measuring.measure import Task as MeasureTask
from klora_compile.measuring.measure import measure
from klora_compile.measuring.statistics import Statistics
from klora_compile.profiles import profiling
from klora_compile.profiles.gathering import Gathered, gather
from klora_compile.profiles.store import Store
from klora_compile.reading.layers import Layer
from klora_compile.settings.read_options import ReadOptions
from klora_runtime.errors import ConfigError, KloraError

TO_Q = f"{BLOCK}.attn1.to_q"


def gathered(
    loras: Iterable[Path | Halves[Path]], store: Store, engine: Engine | None = None
) -> Gathered:
    return gather(list(loras), store, options=ReadOptions(), device="cpu", engine=engine)


def lora(path: Path, rank: int = 2, seed: int = 0) -> Path:
    return write_lora(path, peft_keys({TO_Q: random_pair(12, 10, rank, seed=seed)}))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []

    def spy(
        tasks: Iterable[MeasureTask], device: torch.device
    ) -> Iterator[tuple[Layer, Statistics]]:
        for layer, statistics in measuring.measured(tasks, device):
            names.append(layer.name)
            yield layer, statistics

    monkeypatch.setattr(profiling, "measured", spy)
    return names


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_profile_holds_what_measuring_gives(tmp_path: Path) -> None:
    files, store = write_many(tmp_path / "loras", 5), Store(tmp_path / "store")
    assert [result.word for result in gathered(files, store).results] == ["measured"] * 5
    profiles = {profile.path: profile for profile in store.profiles()}
    for path in files:
        adapter, profile = read_adapter(path), profiles[str(path)]
        layers = list(adapter.layers.values())
        assert [each.place[:3] for each in profile.layers] == [
            (v.component, v.module, v.parameter) for v in layers
        ]
        statistics = store.statistics(profile.statistics)
        assert statistics is not None
        ks = {v.name: sorted(own.top_k) for v, own in zip(layers, statistics, strict=True)}
        assert statistics == list(measure(layers, ks, device=torch.device("cpu")).values())
        assert list(profile.norms) == [v.delta.norm() for v in layers]
        for layer, each in zip(layers, profile.layers, strict=True):
            assert (each.rank, each.scaling, each.place.shape) == (
                layer.rank,
                layer.scaling,
                layer.shape,
            )
            wanted = {min(layer.rank * times, layer.numel) for times in (1, 2, 4, 8, 256)}
            assert wanted <= set(ks[layer.name])


def test_nothing_is_measured_twice(tmp_path: Path, measured: list[str]) -> None:
    files, store = [lora(tmp_path / f"{i}.safetensors", seed=i) for i in range(3)], tmp_path / "s"
    gathered(files[:2], Store(store))
    before = contents(store)
    assert len(measured) == 2
    again = gathered(files, Store(store))
    assert [result.word for result in again.results] == ["known", "known", "measured"]
    assert len(measured) == 3
    assert before.items() <= contents(store).items()


def test_a_command_that_was_stopped_goes_on(
    tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [lora(tmp_path / f"{i}.safetensors", seed=i) for i in range(3)]
    store, keep = tmp_path / "store", profiling.keep

    def stopped(held: Store, result: profiling.Result) -> None:
        if len(measured) == 2:
            raise KeyboardInterrupt
        keep(held, result)

    monkeypatch.setattr("klora_compile.profiles.gathering.keep", stopped)
    with pytest.raises(KeyboardInterrupt):
        gathered(files, Store(store))
    monkeypatch.setattr("klora_compile.profiles.gathering.keep", keep)
    words = [result.word for result in gathered(files, Store(store)).results]
    assert words == ["known", "measured", "measured"]
    whole = tmp_path / "whole"
    gathered(files, Store(whole))
    assert contents(whole) == contents(store)


def test_a_partner_of_a_new_rank_makes_only_those_read_again_that_lack_it(
    tmp_path: Path, measured: list[str]
) -> None:
    files = [lora(tmp_path / f"{i}.safetensors", rank=2, seed=i) for i in range(2)]
    store = Store(tmp_path / "store")
    gathered(files, store)
    found = gathered([lora(tmp_path / "three.safetensors", rank=3)], store)
    assert len(found.again) == 2
    assert len(measured) == 5
    for profile in store.profiles():
        statistics = store.statistics(profile.statistics)
        assert statistics is not None
        assert {profile.layers[0].rank * 3, profile.layers[0].rank * 2} <= set(statistics[0].top_k)
    assert not gathered([lora(tmp_path / "more.safetensors", rank=3, seed=5)], store).again


def test_a_bad_lora_is_quarantined_and_the_rest_goes_on(tmp_path: Path) -> None:
    good = [lora(tmp_path / f"{i}.safetensors", seed=i) for i in range(2)]
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"<html>")
    nan = write_lora(
        tmp_path / "nan.safetensors",
        peft_keys({TO_Q: (torch.full((2, 10), float("nan")), torch.ones(12, 2))}),
    )
    store = Store(tmp_path / "store")
    missing = "missing.safetensors"
    found = gathered([good[0], bad, nan, tmp_path / missing, good[1]], store)
    assert [each.word for each in found.results] == [
        *("measured", "refused", "refused", "refused", "measured")
    ]
    reasons = {Path(each.path).name: each.reason for each in store.quarantined()}
    assert "web page" in reasons["bad.safetensors"]
    assert "NaN" in reasons["nan.safetensors"]
    assert reasons.keys() == {"bad.safetensors", "nan.safetensors", missing}
    lora(bad, seed=9)
    assert gathered([bad], store).results[0].word == "measured"
    assert {Path(each.path).name for each in store.quarantined()} == {"nan.safetensors", missing}
    elsewhere = good[0].rename(tmp_path / "elsewhere.safetensors")
    assert gathered([good[0]], store).results[0].word == "refused"
    elsewhere.rename(good[0])
    assert gathered([good[0]], store).results[0].word == "known"
    assert {Path(each.path).name for each in store.quarantined()} == {"nan.safetensors", missing}


def test_two_halves_are_one_lora(tmp_path: Path) -> None:
    name = "transformer.blocks.0.attn1.to_q"
    files = [
        write_lora(
            tmp_path / f"fox_{half}_noise.safetensors",
            peft_keys({name: random_pair(12, 10, 2, seed=seed)}),
        )
        for seed, half in enumerate(("high", "low"))
    ]
    store = Store(tmp_path / "store")
    gathered([Halves(*files)], store)
    profiles = {profile.half: profile for profile in store.profiles()}
    assert profiles.keys() == {"high", "low"}
    assert profiles["high"].lora == profiles["low"].lora
    assert [profiles[half].layers[0].place.component for half in ("high", "low")] == [
        "transformer",
        "transformer_2",
    ]


def test_a_moved_file_is_found_again_and_not_measured(tmp_path: Path, measured: list[str]) -> None:
    store = Store(tmp_path / "store")
    old = lora(tmp_path / "old.safetensors")
    gathered([old], store)
    new = old.rename(tmp_path / "new.safetensors")
    gathered([new], store)
    (profile,) = store.profiles()
    assert (profile.path, profile.source.file) == (str(new), "new.safetensors")
    assert len(measured) == 1


def test_several_writers_leave_one_store(tmp_path: Path) -> None:
    files = write_many(tmp_path / "loras", 6)
    stores = [Store(tmp_path / "store") for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        orders = (files, files[::-1], files[3:] + files[:3])
        list(threads.map(lambda own: gathered(own[0], own[1]), zip(orders, stores, strict=True)))
    alone = tmp_path / "alone"
    gathered(files, Store(alone))
    assert contents(tmp_path / "store") == contents(alone)


def test_any_executor_gives_equal_bytes(tmp_path: Path) -> None:
    files = write_many(tmp_path / "loras", 4)
    gathered(files, Store(tmp_path / "here"))
    gathered(files, Store(tmp_path / "there"), lambda: ThreadPoolExecutor(2))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


@pytest.mark.slow
def test_processes_give_equal_bytes(tmp_path: Path) -> None:
    files = write_many(tmp_path / "loras", 4)
    gathered(files, Store(tmp_path / "here"))
    gathered(files, Store(tmp_path / "there"), engine_of("processes", 2))
    assert contents(tmp_path / "there") == contents(tmp_path / "here")


class Dying(Executor):
    """Whose first pool loses a worker after one result."""

    pools = 0

    def __init__(self) -> None:
        type(self).pools += 1
        self.given = 0

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.given += 1
        future: Future[Any] = Future()
        if self.given > 1 and self.pools == 1:
            future.set_exception(BrokenProcessPool("a worker died"))
        else:
            future.set_result(fn(*args, **kwargs))
        return future


class AlwaysDying(Dying):
    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_exception(BrokenProcessPool("a worker died"))
        return future


def test_what_a_dead_worker_had_is_given_to_a_new_pool() -> None:
    assert sorted(results(Dying, abs, [-1, -2, -3])) == [1, 2, 3]
    assert Dying.pools == 2
    with pytest.raises(KloraError, match="workers died 3 times, and 2 pieces of work are left"):
        list(results(AlwaysDying, abs, [-1, -2]))


def test_unknown_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match="expected processes, ray or ray:ADDRESS, found 'dask'"):
        engine_of("dask", 2)


@pytest.mark.slow
def test_a_killed_process_is_replaced(tmp_path: Path) -> None:
    marker = str(tmp_path / "died")
    assert list(results(engine_of("processes", 2), dies_once, [marker])) == [marker]


@pytest.mark.slow
def test_a_real_ray_of_two_workers_gives_equal_bytes(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    files = write_many(tmp_path / "loras", 4)
    gathered(files, Store(tmp_path / "here"))
    gathered(files, Store(tmp_path / "ray"), engine_of("ray", 2))
    assert contents(tmp_path / "ray") == contents(tmp_path / "here")


@pytest.mark.slow
def test_ray_starts_a_task_again_whose_worker_died(tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (extra ray)")
    marker = str(tmp_path / "died")
    assert list(results(engine_of("ray", 2), dies_once, [marker])) == [marker]


@pytest.mark.slow
def test_a_dask_client_is_an_engine_too(tmp_path: Path) -> None:
    distributed = pytest.importorskip("distributed", reason="Dask's distributed is not installed")
    files = write_many(tmp_path / "loras", 3)
    gathered(files, Store(tmp_path / "here"))
    with distributed.Client(n_workers=2, threads_per_worker=1, dashboard_address=None) as client:
        gathered(files, Store(tmp_path / "dask"), client.get_executor)
    assert contents(tmp_path / "dask") == contents(tmp_path / "here")
