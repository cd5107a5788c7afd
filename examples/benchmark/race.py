"""The race: set up each row alone, then let all rows make images in turns."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tiny_pipeline import relative_difference
from torch import nn

from benchmark.contestants import KINDS, Contestant, Kind
from benchmark.loras import Files, write_files
from benchmark.memory import Peak
from benchmark.models import BenchModel
from benchmark.timing import Interval, ratios, seconds_of, turns
from benchmark.traffic import BranchWork, branch_work, memory_bandwidth
from klora_runtime.artifact.file import load_fusion
from klora_runtime.devices.device_types import type_of

#: Called after each part of the work with a description and the total number of parts.
OnProgress = Callable[[str, int], None]

_BASELINE, _TRUTH, _BRANCH = "bare", "literal", "branch"
_SEED = 7

#: All rows run the same code of diffusers with their own graphs; torch's limit is 8.
_GRAPHS = 256


@dataclass(frozen=True)
class Race:
    """The settings of a race."""

    model: BenchModel
    device: torch.device
    steps: int
    resolution: int
    rank: int
    rounds: int
    compiled: bool = False
    """Whether each row runs a second time with torch.compile."""
    kinds: Sequence[str] = tuple(KINDS)
    """Names in :data:`KINDS`; the bare model is always included."""


@dataclass(frozen=True)
class Row:
    """A row of the result; a field without meaning for it is None."""

    name: str
    compiled: bool
    seconds: float
    """Seconds per image, the median of all rounds."""
    spread: tuple[float, float]
    """95 % bootstrap interval of :attr:`seconds`."""
    ratio: float
    """Ratio to the bare model, equally compiled: the median of the ratios within each round."""
    ratio_interval: tuple[float, float]
    """95 % bootstrap interval of :attr:`ratio`."""
    work_ratio: float | None
    """The same ratio of processor time, which other processes hardly affect; on a CPU only."""
    work_interval: tuple[float, float] | None
    """95 % bootstrap interval of :attr:`work_ratio`."""
    peak_bytes: int | None
    """Peak memory from loading to the end of the first image, including base weights."""
    first_image_seconds: float
    """Seconds from the files to the end of the first image, with the model loaded before."""
    switch_seconds: float | None
    """Seconds to switch all layers from one LoRA to the other."""
    bytes_on_disk: int | None
    difference: float | None
    """||latents - literal K-LoRA's|| / ||literal K-LoRA's|| for the same seed."""


@dataclass(frozen=True)
class Result:
    """The result of a race."""

    device: str
    dtype: str
    model: str
    steps: int
    resolution: int
    rank: int
    rounds: int
    layers: int
    """Number of layers that both LoRAs adapt."""
    switching: int
    """Number of these layers that switch during a run."""
    rows: tuple[Row, ...]
    bandwidth: float
    """Bytes per second of the device's memory, from a large copy."""
    branch_bytes: int | None
    """Least bytes that the branches of one image move through memory; None without that row."""
    branch_share: float | None
    """Operations of the branches relative to the bare model's products; None without that row."""

    @property
    def branch_floor(self) -> float | None:
        """The least ratio to bare that mode branch can have if memory is the limit."""
        if self.branch_bytes is None:
            return None
        bare = next(row for row in self.rows if row.name == _BASELINE and not row.compiled)
        return 1.0 + self.branch_bytes / self.bandwidth / bare.seconds

    def json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self) | {"branch_floor": self.branch_floor}


@dataclass
class _Runner:
    """A row on its pipeline."""

    kind: Kind
    compiled: bool
    pipe: Any
    race: Race
    arguments: dict[str, Any]
    contestant: Contestant | None = None
    peak_bytes: int | None = None
    first_image_seconds: float = 0.0
    latents: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    times: list[float] = field(default_factory=list)
    works: list[float] = field(default_factory=list)
    """Processor time per image."""

    def load(self, files: Files) -> None:
        """Make the contestant from files."""
        self.contestant = self.kind.make(self.pipe, files)
        if self.compiled:
            compile_for(getattr(self.pipe, self.race.model.component), self.race.device)

    def sample(self) -> torch.Tensor:
        """Return the latents of one image, always from the same noise."""
        contestant, steps = self.contestant, self.race.steps
        assert contestant is not None
        extra: dict[str, Any] = {}
        if self.kind.follows_steps:
            contestant.before_step(0, steps)

            def after(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> Any:
                if index + 1 < steps:
                    contestant.before_step(index + 1, steps)
                return values

            extra["callback_on_step_end"] = after
        generator = torch.Generator().manual_seed(_SEED)
        latents = self.pipe(**self.arguments, generator=generator, **extra).images
        assert isinstance(latents, torch.Tensor)
        return latents


def run(race: Race, on_progress: OnProgress | None = None) -> Result:
    """Time every row.

    Args:
        race: the settings.
        on_progress: see :data:`OnProgress`.

    Raises:
        ConfigError: the resolution is not one of this model.
    """
    kinds = [kind for kind in KINDS.values() if kind.name in {_BASELINE, *race.kinds}]
    states = (False, True) if race.compiled else (False,)
    rows = [(kind, compiled) for compiled in states for kind in kinds]
    total = 1 + len(rows) * (1 + race.rounds + 1)
    tell = on_progress or (lambda what, parts: None)
    arguments = race.model.arguments(race.device, race.resolution, race.steps)
    with (
        tempfile.TemporaryDirectory() as folder,
        torch._dynamo.config.patch(recompile_limit=_GRAPHS),
    ):
        denoiser = race.model.denoiser(race.device)
        files = write_files(denoiser, race.model.component, Path(folder), race.rank)
        _set_up(race, denoiser, files, KINDS[_BASELINE], False, arguments)  # warms up
        tell("files", total)
        runners = []
        for kind, compiled in rows:
            runners.append(_set_up(race, denoiser, files, kind, compiled, arguments))
            tell(f"first image, {kind.name}", total)
        for order in turns(len(runners), race.rounds):
            for index in order:
                _time(runners[index])
                tell(f"images in turns, {runners[index].kind.name}", total)
        work = _branch_work(runners)
        switches = []
        for runner in runners:
            assert runner.contestant is not None
            switches.append(runner.contestant.switch())
            tell(f"switch, {runner.kind.name}", total)
        return _result(race, files, runners, switches, work)


def _set_up(
    race: Race,
    denoiser: nn.Module,
    files: Files,
    kind: Kind,
    compiled: bool,
    arguments: dict[str, Any],
) -> _Runner:
    """Return a row after all work that happens once."""
    peak = Peak(race.device)
    twin = race.model.twin(denoiser, own_weights=kind.writes_weights)
    runner = _Runner(kind, compiled, race.model.pipeline(twin), race, arguments)

    def first_image() -> None:
        runner.load(files)
        runner.latents = runner.sample()

    runner.first_image_seconds = seconds_of(first_image, race.device)
    rise = peak.nbytes()
    if rise is not None:
        shared = 0 if kind.writes_weights else _nbytes(denoiser)
        runner.peak_bytes = rise + shared
    runner.latents = runner.latents.float().cpu()
    return runner


def _time(runner: _Runner) -> None:
    begin = time.process_time()
    runner.times.append(seconds_of(runner.sample, runner.race.device))
    runner.works.append(time.process_time() - begin)


def compile_for(denoiser: Any, device: torch.device) -> None:
    """Compile in place: the whole, with graphs, if the device records graphs, else the blocks."""
    if type_of(device).graphs:
        denoiser.compile(mode="reduce-overhead")
    else:
        denoiser.compile_repeated_blocks()


def _branch_work(runners: Sequence[_Runner]) -> BranchWork | None:
    """Return the work of an image's branches, measured on one more image."""
    found = (r for r in runners if r.kind.name == _BRANCH and not r.compiled)
    branch = next(found, None)
    if branch is None:
        return None
    return branch_work(getattr(branch.pipe, branch.race.model.component), branch.sample)


def _result(
    race: Race,
    files: Files,
    runners: Sequence[_Runner],
    switches: Sequence[float | None],
    branches: BranchWork | None,
) -> Result:
    bare = {r.compiled: r for r in runners if r.kind.name == _BASELINE}
    truth = next((r.latents for r in runners if r.kind.name == _TRUTH and not r.compiled), None)
    rows = []
    for runner, switch in zip(runners, switches, strict=True):
        seconds = Interval.of(runner.times)
        base = bare[runner.compiled]
        ratio = Interval.of(ratios(runner.times, base.times))
        work = None
        if type_of(race.device).is_host:
            work = Interval.of(ratios(runner.works, base.works))
        row = Row(
            name=runner.kind.name,
            compiled=runner.compiled,
            seconds=seconds.median,
            spread=(seconds.low, seconds.high),
            ratio=ratio.median,
            ratio_interval=(ratio.low, ratio.high),
            work_ratio=None if work is None else work.median,
            work_interval=None if work is None else (work.low, work.high),
            peak_bytes=runner.peak_bytes,
            first_image_seconds=runner.first_image_seconds,
            switch_seconds=switch,
            bytes_on_disk=runner.kind.on_disk(files),
            difference=None if truth is None else relative_difference(runner.latents, truth),
        )
        rows.append(row)
    entries = load_fusion(files.artifact).entries
    return Result(
        device=type_of(race.device).describe(race.device),
        dtype=str(race.model.dtype(race.device)).removeprefix("torch."),
        model=race.model.name,
        steps=race.steps,
        resolution=race.resolution,
        rank=race.rank,
        rounds=race.rounds,
        layers=len(entries),
        switching=sum(entry.timeline.switches for entry in entries),
        rows=tuple(rows),
        bandwidth=memory_bandwidth(race.device),
        branch_bytes=None if branches is None else branches.nbytes,
        branch_share=None if branches is None else branches.share,
    )


def _nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
