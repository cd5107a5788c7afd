"""The race of the workshop: its rows do what they say, run in turns, and are all in the table."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmark import race as race_module
from benchmark.__main__ import main
from benchmark.contestants import KINDS, KloraBranch, KloraMerge, PeftCallback
from benchmark.loras import Files, all_switching, write_files
from benchmark.memory import Peak
from benchmark.models import MODELS
from benchmark.race import Race, Result, compile_for, run
from benchmark.table import race_table
from benchmark.timing import Interval, turns
from benchmark.traffic import branch_work, memory_bandwidth
from click.testing import CliRunner
from reference import KLora, sampling
from tiny_pipeline import relative_difference

from klora_compile.reading.adapter import read_adapter
from klora_runtime.artifact.file import load_fusion
from klora_runtime.layers.additions import Addition
from klora_runtime.layers.leaf import attach

CPU = torch.device("cpu")
TINY = MODELS["sd1-tiny"]
RACE = Race(TINY, CPU, steps=3, resolution=64, rank=4, rounds=1)
EXACT, EFFECT = 1e-4, 1e-3

#: What issue trackers and scripts read; more keys may stand beside them.
KEYS = {"device", "model", "steps", "rows"}
ROW_KEYS = {
    *("name", "compiled", "seconds", "spread", "ratio"),
    *("peak_bytes", "first_image_seconds", "switch_seconds", "difference"),
}


@pytest.fixture(scope="module")
def result() -> Result:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(race_module, "memory_bandwidth", lambda device: 1e10)
        return run(RACE)


@pytest.fixture(scope="module")
def denoiser() -> torch.nn.Module:
    return TINY.denoiser(CPU)


@pytest.fixture(scope="module")
def files(denoiser: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_files(denoiser, "unet", tmp_path_factory.mktemp("bench"), rank=4)


@pytest.fixture
def no_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is copied to time the memory."""
    monkeypatch.setattr(race_module, "memory_bandwidth", lambda device: 1e10)


def bench(*arguments: object) -> Any:
    return CliRunner().invoke(main, ["race", *map(str, arguments)])


def test_klora_equals_the_literal_rule_and_the_others_do_not(result: Result) -> None:
    differences = {row.name: row.difference or 0.0 for row in result.rows}
    exact = {name for name, difference in differences.items() if difference <= EXACT}
    assert exact == {"literal", "merge", "branch"}
    assert all(differences[name] > EFFECT for name in set(differences) - exact)
    assert result.layers / 4 < result.switching < result.layers


@pytest.mark.parametrize("name", ["sd1-tiny", "flux-tiny"])
def test_the_literal_row_is_the_reference(name: str, tmp_path: Path) -> None:
    model = MODELS[name]
    race = replace(RACE, model=model, steps=3)
    denoiser = model.denoiser(CPU)
    files = write_files(denoiser, model.component, tmp_path, rank=4)
    arguments = model.arguments(CPU, 64, 3)
    literal = race_module._set_up(race, denoiser, files, KINDS["literal"], False, arguments)
    bare = race_module._set_up(race, denoiser, files, KINDS["bare"], False, arguments)
    with sampling(bare.pipe, KLora(files.content, files.style), [1 / 6, 3 / 6, 5 / 6]):
        expected = bare.sample()
    assert relative_difference(literal.latents, expected) <= EXACT
    assert relative_difference(bare.latents, expected) > EFFECT


def test_fused_weights_are_not_the_bare_ones(result: Result) -> None:
    rows = {row.name: row for row in result.rows}
    assert rows["peft-fused"].difference != rows["bare"].difference
    assert rows["peft-fused"].difference == pytest.approx(rows["peft-active"].difference, rel=1e-2)


def test_every_row_is_in_the_json_and_in_the_table(result: Result) -> None:
    facts = json.loads(json.dumps(result.json()))
    assert set(facts) >= KEYS
    assert [row["name"] for row in facts["rows"]] == list(KINDS)
    assert all(set(row) >= ROW_KEYS for row in facts["rows"])
    slow = replace(result.rows[-1], seconds=1e3, ratio=99.0, peak_bytes=None)
    table = race_table(replace(result, rows=(*result.rows[:-1], slow)))
    lines = [line for line in table.splitlines() if line.startswith("| ")]
    assert len(lines) == 2 + len(KINDS)
    for kind, line in zip(KINDS.values(), lines[2:], strict=True):
        assert line.startswith(f"| {kind.what} |")
    assert "| 1e+03 (" in lines[-1]
    assert "| 99.000 (" in lines[-1]


def test_what_branches_do_is_counted() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(6, 10), torch.nn.Linear(10, 3))
    attach(model[0], Addition(torch.zeros(2, 6), torch.zeros(2, 10), torch.zeros(2)))
    x = torch.zeros(5, 6)
    work = branch_work(model, lambda: (model(x), model(x)))
    assert work.nbytes == 2 * 4 * (5 * 6 + 2 * 5 * 10 + 2 * 6 + 10 * 2)
    assert work.share == pytest.approx(2 * (6 + 10) / (6 * 10 + 10 * 3))
    assert not model[0]._forward_hooks
    assert 1e8 < memory_bandwidth(CPU) < 1e13


def test_the_floor_of_mode_branch(result: Result) -> None:
    assert result.branch_bytes is not None
    assert result.branch_bytes > 0
    known = replace(result, branch_bytes=30, branch_share=0.123, bandwidth=10.0)
    bare = known.rows[0].seconds
    assert known.branch_floor == pytest.approx(1 + 3 / bare)
    assert f"its ratio is {known.branch_floor:.3f} at least" in race_table(known)
    assert "Branch multiplies 12.3% more than the bare model." in race_table(known)
    without = replace(result, branch_bytes=None)
    assert without.branch_floor is None
    assert "more through memory" not in race_table(without)


def test_what_has_no_meaning_is_null(result: Result) -> None:
    rows = {row.name: row for row in result.rows}
    switch = {name for name, row in rows.items() if row.switch_seconds is not None}
    assert switch == {"peft-callback", "merge", "branch"}
    assert [name for name, row in rows.items() if row.bytes_on_disk is None] == ["bare"]
    assert rows["merge"].bytes_on_disk == rows["branch"].bytes_on_disk
    assert rows["bare"].ratio == rows["bare"].work_ratio == 1.0
    assert all(row.work_interval is not None for row in rows.values())
    on_a_gpu = replace(result, rows=(replace(rows["bare"], work_ratio=None, work_interval=None),))
    assert "| 1.000 (1.000 to 1.000) | – |" in race_table(on_a_gpu)


@pytest.mark.usefixtures("no_bandwidth")
def test_rows_run_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def time_it(runner: Any) -> None:
        order.append(runner.kind.name)
        runner.times.append(1.0)
        runner.works.append(2.0)

    monkeypatch.setattr(race_module, "_time", time_it)
    run(replace(RACE, steps=1, rounds=5, kinds=("peft-active", "branch")))
    rounds = [order[start : start + 3] for start in range(0, len(order), 3)]
    assert len(rounds) == 5
    assert all(Counter(one) == Counter(["bare", "peft-active", "branch"]) for one in rounds)
    assert len({tuple(one) for one in rounds}) > 1


@pytest.mark.usefixtures("no_bandwidth")
def test_compiled_rows_stand_beside_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[Any] = []
    monkeypatch.setattr(race_module, "compile_for", lambda model, device: compiled.append(model))
    pace = {False: iter([2.0, 3.0]), True: iter([10.0, 5.0])}

    def time_it(runner: Any) -> None:
        runner.times.append(next(pace[runner.compiled]))
        runner.works.append(runner.times[-1] ** 2)

    monkeypatch.setattr(race_module, "_time", time_it)
    monkeypatch.setattr(race_module, "turns", lambda count, rounds: iter([range(count)]))
    result = run(replace(RACE, steps=1, compiled=True, kinds=("merge",)))
    rows = [(row.name, row.compiled, row.ratio) for row in result.rows]
    assert rows == [
        ("bare", False, 1.0),
        ("merge", False, 1.5),
        ("bare", True, 1.0),
        ("merge", True, 0.5),
    ]
    assert [row.work_ratio for row in result.rows] == [1.0, 2.25, 1.0, 0.25]
    assert len(compiled) == 2
    assert race_table(result).count(", compiled |") == 2
    assert all(row.difference is None for row in result.rows)  # nothing literal to compare with


def test_a_gpu_compiles_with_graphs_and_a_cpu_by_blocks() -> None:
    calls: list[Any] = []

    class Denoiser:
        def compile(self, **options: Any) -> None:
            calls.append(options)

        def compile_repeated_blocks(self) -> None:
            calls.append("blocks")

    for device in ("cuda", "cpu"):
        compile_for(Denoiser(), torch.device(device))
    assert calls == [{"mode": "reduce-overhead"}, "blocks"]


def test_on_a_gpu_the_weights_are_half() -> None:
    dtypes = [MODELS[name].dtype(torch.device("cuda")) for name in ("sd1", "sdxl", "flux")]
    assert dtypes == [torch.float16, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("sd1", 859_520_964), ("sdxl", 2_567_463_684), ("flux", 11_901_408_320)],
)
def test_the_full_sizes_are_those_of_the_published_models(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = MODELS[name].denoiser(torch.device("meta"))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


def test_weights_are_shared_where_nothing_writes_into_them(denoiser: torch.nn.Module) -> None:
    pointers = [parameter.data_ptr() for parameter in denoiser.parameters()]
    shared = TINY.twin(denoiser, own_weights=False)
    assert [parameter.data_ptr() for parameter in shared.parameters()] == pointers
    own = TINY.twin(denoiser, own_weights=True)
    assert not {parameter.data_ptr() for parameter in own.parameters()} & set(pointers)
    for one, other in zip(own.parameters(), denoiser.parameters(), strict=True):
        assert torch.equal(one, other)
    assert {kind.name for kind in KINDS.values() if kind.writes_weights} == {"peft-fused", "merge"}


@pytest.mark.parametrize("kind", [KloraMerge, KloraBranch])
def test_a_switch_turns_every_layer(kind: Any, denoiser: torch.nn.Module, files: Files) -> None:
    pipe = TINY.pipeline(TINY.twin(denoiser, own_weights=True))
    contestant = kind(pipe, files)
    assert contestant.switch() > 0
    fusion = contestant.handle.fusion
    style = read_adapter(files.style).layers
    assert contestant.handle.report().switches == len(fusion.entries) == len(style)
    for entry in fusion.entries:
        module: Any = pipe.unet.get_submodule(entry.module)
        base: Any = denoiser.get_submodule(entry.module)
        layer = style[f"unet.{entry.module}"]
        x = torch.eye(entry.shape[1])
        delta = module(x) - base(x)
        torch.testing.assert_close(delta, (layer.up @ layer.down).T, atol=1e-5, rtol=1e-3)


def test_the_switching_fusion_keeps_the_layers(files: Files) -> None:
    fusion = load_fusion(files.artifact)
    turned = all_switching(fusion, files)
    assert [entry.module for entry in turned.entries] == [entry.module for entry in fusion.entries]
    assert all(set(entry.factors) == {"content", "style"} for entry in turned.entries)


def test_the_callback_has_one_adapter_active_at_a_time(
    denoiser: torch.nn.Module, files: Files
) -> None:
    pipe = TINY.pipeline(TINY.twin(denoiser, own_weights=False))
    contestant = PeftCallback(pipe, files)
    active = []
    for step in range(4):
        contestant.before_step(step, 4)
        active.append(pipe.get_active_adapters())
    assert active[0] == ["content"]
    assert active[-1] == ["style"]
    assert all(len(names) == 1 for names in active)


def test_intervals_and_turns() -> None:
    interval = Interval.of([1.0, 2.0, 3.0, 4.0, 100.0])
    assert interval.median == 3.0
    assert interval.low < 3.0 < interval.high
    assert Interval.of([5.0]) == Interval(5.0, 5.0, 5.0)
    orders = list(turns(6, 10))
    assert all(sorted(order) == list(range(6)) for order in orders)
    assert orders == list(turns(6, 10))


def test_the_peak_is_above_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    peak = Peak(CPU)
    torch.ones(2**24)  # 64 MiB, and free again
    found = peak.nbytes()
    assert found is None or 0.95 * 2**26 < found < 2**27  # Linux counts in batches
    monkeypatch.setattr("benchmark.memory.sys.platform", "plan9")
    assert Peak(CPU).nbytes() is None


def test_the_command_prints_the_table_or_json(
    result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Race] = []

    def run(race: Race, on_progress: Any) -> Result:
        asked.append(race)
        on_progress("a part", 1)
        return result

    monkeypatch.setattr("benchmark.__main__.run", run)
    options = ("--model", "sd1-tiny", "--device", "cpu", "--steps", 2, "--rounds", 1)
    few = (*options, "--rank", 2, "--row", "branch")
    assert json.loads(bench(*few, "--json").stdout) == json.loads(json.dumps(result.json()))
    assert bench(*few).stdout == race_table(result) + "\n"
    assert race_table(result).startswith("sd1-tiny, float32, 64 x 64 pixels, 3 steps, rank 4, ")
    wanted = replace(RACE, steps=2, rank=2, kinds=("branch",))
    assert asked == [wanted, wanted]


@pytest.mark.parametrize(
    ("name", "resolution", "text"),
    [
        ("sd1-tiny", 100, "--resolution 100: expected a multiple of 64 for sd1-tiny."),
        ("flux-tiny", 24, "--resolution 24: expected a multiple of 16 for flux-tiny."),
    ],
)
def test_a_resolution_that_does_not_fit(name: str, resolution: int, text: str) -> None:
    result = bench("--model", name, "--device", "cpu", "--resolution", resolution)
    assert result.exit_code == 1
    assert text in result.stderr
