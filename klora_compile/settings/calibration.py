"""What a base model was asked when it calibrated a rule, as an artifact records it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True)
class Calibration:
    """A calibration: the same one gives the same artifact, to the byte."""

    by: str
    """Name of the rule that was calibrated."""
    settings: Mapping[str, Any]
    """Its settings."""
    model: str
    """Name of the base model, without folders; with its commit if it is from the Hub."""
    weights: str
    """Digest of a sample of its denoiser's weights."""
    prompts: Mapping[str, tuple[str, ...]]
    """Slot -> prompts of its LoRA's own pictures."""
    seed: int
    pictures: int
    """Pictures per LoRA."""
    call: Mapping[str, Any]
    """Arguments of the pipeline's call that were given: steps, guidance, size."""
    dtype: str
    """Of the denoiser's weights."""
    device: str
    """Type of the device."""
    torch: str
    """Version of torch."""
    threads: int
    """Threads of torch on the host."""

    def parameters(self) -> dict[str, Any]:
        """Return this as the artifact records it, plain values by names such as rule.ridge."""
        found = {
            each.name: getattr(self, each.name) for each in fields(self) if each.name in _PLAIN
        }
        found |= {f"{_RULE}{name}": value for name, value in self.settings.items()}
        found |= {f"{_CALL}{name}": value for name, value in self.call.items()}
        for slot, texts in self.prompts.items():
            found |= {f"{_PROMPT}{slot}.{n}": text for n, text in enumerate(texts, 1)}
        return found

    @classmethod
    def from_parameters(cls, stated: Any) -> Self | None:
        """Return what :meth:`parameters` gave; None if an artifact states nothing like it."""
        if not isinstance(stated, Mapping) or not _PLAIN.keys() <= stated.keys():
            return None
        if not all(type(stated[name]) is kind for name, kind in _PLAIN.items()):
            return None
        prompts: dict[str, tuple[str, ...]] = {}
        for slot, text in ((n.rpartition(".")[0], t) for n, t in _under(_PROMPT, stated).items()):
            prompts[slot] = (*prompts.get(slot, ()), str(text))
        return cls(
            settings=_under(_RULE, stated),
            prompts=prompts,
            call=_under(_CALL, stated),
            **{name: stated[name] for name in _PLAIN},
        )

    @property
    def text(self) -> str:
        """A few words for reports."""
        return f"rule {self.by} with {self.model}, seed {self.seed}, {self.pictures} pictures each"


#: Fields that are plain values -> their types.
_PLAIN = {
    "by": str,
    "model": str,
    "weights": str,
    "seed": int,
    "pictures": int,
    "dtype": str,
    "device": str,
    "torch": str,
    "threads": int,
}
#: Beginnings of the names of the other fields' values.
_RULE, _CALL, _PROMPT = "rule.", "call.", "prompt."


def _under(beginning: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.removeprefix(beginning): value
        for name, value in stated.items()
        if name.startswith(beginning)
    }
