"""The measured state of a fusion on a pipeline."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from klora_runtime.artifact.timeline import ClockName


@dataclass(frozen=True, repr=False)
class Report:
    """The measured state of a fusion; ``str()`` and ``repr()`` give short texts."""

    mode: str
    """``merge`` or ``branch``."""
    why: str
    """Why this mode was chosen."""
    layers: Mapping[str, int]
    """Fate -> number of applied layers."""
    missing: tuple[str, ...]
    """Layers that were left out because the model lacks them (``missing="skip"``)."""
    components: tuple[str, ...]
    """Names of the components that carry the fusion."""
    switches: int
    """Number of single-layer switches in one run of the whole schedule."""
    weights: Mapping[str, float]
    """Slot -> factor on its deltas, -100 to 100."""
    enabled: bool
    """Whether the fusion acts."""
    progress: float | None
    """Progress, in [0, 1], of the step that runs now or ran last; None before the first step."""
    clock: ClockName
    """What the progress follows: ``step``, the count of steps, or ``noise``, the noise level."""
    rounding: float
    """||held delta - exact delta|| / ||exact delta|| over all layers; 0 means exact."""
    worst_rounding: tuple[str, float]
    """The layer with the largest rounding, and that rounding."""
    nbytes: Mapping[str, int]
    """Purpose and place, such as ``factors on cuda:0`` -> bytes in use."""
    copied: Mapping[str, str]
    """Parameter whose base value is copied, although ``base`` was given -> why."""

    def __repr__(self) -> str:
        """Return three lines: the mode, the size, and what acts."""
        kept = sum(self.nbytes.values()) / 1e6
        weights = ", ".join(f"{slot} {weight:g}" for slot, weight in self.weights.items())
        place = "" if self.progress is None else f" {place_text(self.clock, self.progress)}"
        return (
            f"Report: mode {self.mode}, {self.why}\n"
            f"{sum(self.layers.values())} layers in {', '.join(self.components)}"
            f"{self._left_out}; {self.switches} switches a run; {kept:.2f} MB kept\n"
            + (f"acting{place}: {weights}" if self.enabled else "disabled: the bare model acts")
            + f"; rounding {self.rounding:.2g} of the delta"
        )

    @property
    def _left_out(self) -> str:
        """How many layers the model lacks; empty if it has all."""
        return f", {len(self.missing)} left out that the model lacks" if self.missing else ""

    @property
    def _copied(self) -> str:
        """How many base values are copied for each reason; empty if none is."""
        counts = Counter(self.copied.values())
        firsts = {why: path for path, why in reversed(list(self.copied.items()))}
        return "".join(
            f"\ncopied: {count} base values, {why} ({firsts[why]})" for why, count in counts.items()
        )

    def __str__(self) -> str:
        fates = ", ".join(f"{count} {fate}" for fate, count in self.layers.items())
        kept = ", ".join(f"{size / 1e6:.2f} MB {what}" for what, size in self.nbytes.items())
        state = "" if self.enabled else " (disabled)"
        place = "no step yet" if self.progress is None else place_text(self.clock, self.progress)
        return (
            f"mode {self.mode}{state}: {self.why}\n"
            f"layers: {fates} in {', '.join(self.components)}{self._left_out}; "
            f"{self.switches} switches a run\n"
            f"clock: {self.clock}, {place}\n"
            f"rounding: {self.rounding:.2g} of the delta, at most {self.worst_rounding[1]:.2g} "
            f"({self.worst_rounding[0]})\n"
            f"memory: {kept}{self._copied}"
        )


def place_text(clock: ClockName, progress: float) -> str:
    """Return where a run is, in a few words."""
    return f"at progress {progress:.3g}" + (" by noise" if clock == "noise" else "")
