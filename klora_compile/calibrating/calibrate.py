"""Calibration of a rule with a pipeline, and the compilation of what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from klora_compile.base_models import model_name
from klora_compile.calibrating.branches import Branch, branches_of
from klora_compile.calibrating.checkpoint import Checkpoint
from klora_compile.calibrating.coefficients import FitState, frozen, matches, updates
from klora_compile.calibrating.moments import adding, meetings, no_moments, routed
from klora_compile.calibrating.pictures import OwnPictures, prompts_of, turns
from klora_compile.calibrating.recording import (
    Call,
    Recorder,
    denoisers,
    draw,
    following,
    weights_digest,
)
from klora_compile.compiler import compile_sources, refuse_uncalibrated
from klora_compile.measuring.statistics import OnLayer
from klora_compile.planning.deriving import derivations
from klora_compile.profiles.store import Store
from klora_compile.reading.adapter import Adapter
from klora_compile.reading.layers import Layer
from klora_compile.rules.kit.calibrated import Coefficients, Fitting, Routing
from klora_compile.rules.lookup import RULE_OF_ONE, RULES
from klora_compile.rules.rule import Derived
from klora_compile.settings.calibration import Calibration
from klora_compile.settings.config import Config
from klora_compile.slots import scheduled, slot_of
from klora_compile.sources import layers_by_slot
from klora_runtime.artifact.fusion import Fusion
from klora_runtime.layers.choice import choose
from klora_runtime.layers.live_fusion import LiveFusion
from klora_runtime.layers.targets import find_targets
from klora_runtime.pipeline.handle import apply_fusion

#: Called with what is done, the number of parts of the work so far, and their total.
OnPart = Callable[[str, int, int], None]


def compile_calibrated(
    pipe: Any,
    adapters: Mapping[str, Adapter],
    config: Config,
    own: OwnPictures,
    *,
    measured_on: str | torch.device = "cpu",
    store: Store | None = None,
    checkpoint: Path | None = None,
    on_part: OnPart | None = None,
    on_layer: OnLayer | None = None,
) -> Fusion:
    """Calibrate a rule with a pipeline and compile; the pipeline is as before then.

    Args:
        pipe: a diffusers pipeline of the base model, without a fusion or adapters.
        adapters: source -> LoRA, from :func:`~klora_compile.sources.read_sources`.
        config: a rule that a base model calibrates, and the shared settings.
        own: what to draw with each LoRA alone.
        measured_on: where to measure the LoRAs.
        store: see :func:`~klora_compile.compiler.compile_sources`.
        checkpoint: a file that keeps the state, so that a calibration that was stopped goes on; it
            is removed at the end.
        on_part: called after each picture and each update.
        on_layer: see :func:`~klora_compile.compiler.compile_fusion`.

    Raises:
        ConfigError: the rule needs no base model, or a LoRA has no prompt.
        IncompatibleModelError: the LoRAs do not fit the pipeline.
        KloraError: the pipeline failed.
    """
    refuse_uncalibrated(config.rule, True)
    prompts = prompts_of(own, scheduled(layers_by_slot(adapters)), adapters)
    work = Calibrating(pipe, adapters, config, own, prompts, checkpoint, on_part or _nothing)
    settled, derived = work.result()
    fusion = compile_sources(
        adapters, settled, device=measured_on, store=store, calibrated=derived, on_layer=on_layer
    )
    work.checkpoint.remove()
    return fusion


@dataclass
class Calibrating:
    """One calibration."""

    pipe: Any
    adapters: Mapping[str, Adapter]
    config: Config
    own: OwnPictures
    prompts: Mapping[str, tuple[str, ...]]
    kept_at: Path | None
    on_part: OnPart

    def result(self) -> tuple[Config, Mapping[str, Mapping[str, Derived]]]:
        """Calibrate, and return the settled config and slot -> layer name -> derived delta."""
        rule = self.config.rule
        config = replace(self.config, calibration=self.record)
        if isinstance(rule, Routing):
            return config, self._routed(rule)
        assert isinstance(rule, Fitting)
        return replace(config, rule=rule.scheduled(self._fitted(rule))), {}

    @cached_property
    def record(self) -> Calibration:
        """What determines the result, for the artifact."""
        weight = next(next(iter(self.models.values())).parameters())
        name = getattr(self.pipe, "name_or_path", None)
        return Calibration(
            by=self.config.rule.name,
            settings=self.config.rule.parameters(),
            model=model_name(Path(name)) if name else type(self.pipe).__name__,
            weights=weights_digest(self.models),
            prompts=self.prompts,
            seed=self.own.seed,
            pictures=self.own.count,
            call=self.own.call,
            dtype=str(weight.dtype).removeprefix("torch."),
            device=weight.device.type,
            torch=str(torch.__version__),
            threads=torch.get_num_threads(),
        )

    @cached_property
    def checkpoint(self) -> Checkpoint:
        inputs = {
            "calibration": self.record.parameters(),
            "settings": self.config.settings.parameters(),
            "loras": {source: adapter.sha256 for source, adapter in self.adapters.items()},
        }
        return Checkpoint(self.kept_at, inputs)

    @cached_property
    def models(self) -> dict[str, nn.Module]:
        """Name -> denoiser that the LoRAs change."""
        return denoisers(self.pipe, self.sum)

    @cached_property
    def sum(self) -> Fusion:
        """The plain sum, in the denoisers alone."""
        settings = replace(self.config.settings, text_encoder="none")
        return compile_sources(self.adapters, Config(RULES[RULE_OF_ONE](), settings), device="cpu")

    @cached_property
    def given(self) -> dict[str, Mapping[str, Layer]]:
        """Slot -> layers, of the LoRAs that the rule schedules."""
        every = layers_by_slot(self.adapters)
        return {slot: every[slot] for slot in scheduled(every)}

    def solo(self, slot: str) -> Fusion:
        """Return one LoRA alone, with its weight, beside those that always act."""
        there = {
            source: adapter
            for source, adapter in self.adapters.items()
            if slot_of(source) == slot or slot_of(source) not in self.given
        }
        settings = self.config.settings
        slots = set(map(slot_of, there))
        weights = {n: value for n, value in settings.weights.items() if slot_of(n) in slots}
        config = Config(RULES[RULE_OF_ONE](), replace(settings, weights=weights))
        return compile_sources(there, config, device="cpu")

    def _routed(self, rule: Routing) -> dict[str, Mapping[str, Derived]]:
        """Add up moments, picture by picture, and return the merged slot."""
        found = meetings(self.models, derivations(self.given, self.config))
        done, state = self.checkpoint.load() or (0, no_moments(found))
        total = len(self.given) * self.own.count
        for place, slot in enumerate(self.given):
            first = place * self.own.count
            if done >= first + self.own.count:
                continue
            with apply_fusion(self.pipe, self.solo(slot)):
                for number, (prompt, seed) in enumerate(turns(self.own, self.prompts[slot]), first):
                    if number < done:
                        continue
                    with adding(state, found, slot):
                        draw(self.pipe, prompt, seed, self.own.call)
                    self.checkpoint.save(number + 1, state)
                    self.on_part(f"picture with {slot}", number + 1, total)
        (slot,) = rule.derives(tuple(self.given))
        return {slot: routed(rule, state, found)}

    def _fitted(self, rule: Fitting) -> Coefficients:
        """Record the LoRAs' own pictures, and fit coefficients to them."""
        descent = rule.descent
        pictures = len(self.given) * self.own.count
        total = pictures + descent.updates * descent.phases
        calls = self._recorded(total)
        phases = matches(self.models, calls, descent)
        branches = branches_of(self.models, self._weighed())
        count = sum(len(branch.columns) for branch in branches)
        kept = self.checkpoint.load()
        begin, fit = (
            (0, FitState.begin(descent.phases, count))
            if kept is None
            else (kept[0], FitState(kept[1]))
        )
        with frozen(self.models), self._summed():
            steps = updates(fit, begin, phases, self.models, branches, descent, self.own.seed)
            for number in steps:
                self.checkpoint.save(number, fit.tensors)
                self.on_part("update", pictures + number, total)
        return _coefficients(fit, branches, tuple(self.given))

    def _recorded(self, total: int) -> dict[str, list[Call]]:
        """Return slot -> calls of the denoisers in its LoRA's own pictures."""
        recorder, calls, done = Recorder(self.pipe, self.models), dict[str, list[Call]](), 0
        for slot in self.given:
            calls[slot] = []
            clock_name = self.config.settings.clock
            with (
                apply_fusion(self.pipe, self.solo(slot)),
                following(self.pipe, clock_name) as clock,
            ):
                for prompt, seed in turns(self.own, self.prompts[slot]):
                    calls[slot] += recorder.record(clock, prompt, seed, self.own.call)
                    done += 1
                    self.on_part(f"picture with {slot}", done, total)
        return calls

    def _weighed(self) -> dict[str, dict[str, Layer]]:
        """Return the layers with the weights of their LoRAs in their scalings."""
        weight = self.config.settings.weight
        return {
            slot: {
                name: replace(layer, scaling=layer.scaling * weight(slot, layer.component))
                for name, layer in own.items()
            }
            for slot, own in self.given.items()
        }

    @contextmanager
    def _summed(self) -> Iterator[None]:
        """Let the plain sum act on the denoisers inside the block, also outside of a sampling."""
        targets = find_targets(self.models, self.sum)
        mode, _ = choose("auto", targets, {})
        live = LiveFusion(self.sum, mode, {})
        live.write()
        try:
            yield
        finally:
            live.release()


def _coefficients(fit: FitState, branches: Sequence[Branch], slots: Sequence[str]) -> Coefficients:
    c = fit.tensors["c"]
    found: dict[str, dict[str, list[float]]] = {slot: {} for slot in slots}
    for branch in branches:
        for slot, column in zip(branch.slots, branch.columns, strict=True):
            found[slot][branch.name] = c[:, column].tolist()
    return found


def _nothing(*_: object) -> None:
    """Report to nobody."""
