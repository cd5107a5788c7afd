"""What a user may decide about a fusion, checked once; None means *as the semantics say*."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from klora_runtime.errors import ConfigError

Semantics = Literal["paper", "authors"]
Pattern = Literal["s", "s*"]
TextEncoder = Literal["both", "content", "style", "none"]
Unpaired = Literal["keep", "drop", "error"]
GammaRule = Literal["paper", "code"]

#: beta of pattern ``s*`` in the authors' code, as a share of alpha; the paper states 1.3.
_AUTHORS_WRAPPED_SHARE = 0.85


@dataclass(frozen=True)
class Config:
    """Settings of one fusion with K-LoRA.

    Raises:
        ConfigError: a value is out of its range.
    """

    semantics: Semantics = "paper"
    """``paper`` as published; ``authors`` as their public code computes: its gamma, its offset of
    s*, ties to the style, the network alpha ignored."""
    pattern: Pattern = "s"
    """``s`` rises once; ``s*`` starts high, wraps to 0 and rises again."""
    alpha: float | None = None
    """Slope of S, -100 to 100; for ``s*`` also the modulus, and then above 0. Default 1.5."""
    beta: float | None = None
    """S at progress 0, -100 to 100 (``s*``: 0 to 100); higher favours style. Default 0.5 for
    ``s``; for ``s*`` 1.3, with the authors' semantics 0.85 * alpha."""
    gamma: GammaRule | float | None = None
    """Balance of the two LoRAs' magnitudes: ``paper`` (ratio of sums), ``code`` (mean of ratios
    without outliers), or a number above 0; higher favours style."""
    top_k: int | None = None
    """How many weights of a layer count, 1 or more; None: product of the layer's two ranks."""
    content_weight: float = 1.0
    """Factor on the content's deltas where they are applied; the choice does not see it."""
    style_weight: float = 1.0
    """Factor on the style's deltas where they are applied; the choice does not see it."""
    text_encoder: TextEncoder = "both"
    """Whose text encoder layers act; they have no steps."""
    unpaired: Unpaired = "keep"
    """Denoiser layers that only one LoRA adapts: always act, are left out, or are an error."""

    def __post_init__(self) -> None:
        for name, kind in _CHOICES.items():
            _require_choice(name, getattr(self, name), get_args(kind))
        if isinstance(self.gamma, str):
            _require_choice("gamma", self.gamma, get_args(GammaRule))
        elif self.gamma is not None:
            _require_number("gamma", self.gamma, 1e-12, 1e12)
        wrapped = self.pattern == "s*"
        if self.alpha is not None:
            _require_number("alpha", self.alpha, 1e-3 if wrapped else -100.0, 100.0)
        if self.beta is not None:
            _require_number("beta", self.beta, 0.0 if wrapped else -100.0, 100.0)
        if self.top_k is not None and (type(self.top_k) is not int or self.top_k < 1):
            raise ConfigError(f"top_k: expected a whole number from 1, found {self.top_k!r}.")
        for name in ("content_weight", "style_weight"):
            _require_number(name, getattr(self, name), -100.0, 100.0)

    def parameters(self) -> dict[str, Any]:
        """Every setting with its default filled in, as the artifact records it."""
        authors = self.semantics == "authors"
        alpha = 1.5 if self.alpha is None else float(self.alpha)
        beta = self.beta
        if beta is None and self.pattern == "s":
            beta = 0.5
        elif beta is None:
            beta = _AUTHORS_WRAPPED_SHARE * alpha if authors else 1.3
        gamma = self.gamma
        if gamma is None:
            gamma = "code" if authors else "paper"
        return asdict(self) | {
            "alpha": alpha,
            "beta": float(beta),
            "gamma": gamma if isinstance(gamma, str) else float(gamma),
            "top_k": "auto" if self.top_k is None else self.top_k,
            "content_weight": float(self.content_weight),
            "style_weight": float(self.style_weight),
            "tie": "style" if authors else "content",
            "network_alpha": "ignored" if authors else "applied",
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Config:
        """The config that :meth:`parameters` gives these values for.

        Raises:
            ConfigError: a value is missing or out of its range.
        """
        names = [field.name for field in fields(cls)]
        missing = [name for name in names if name not in parameters]
        if missing:
            raise ConfigError(f"the rule's parameters lack {', '.join(missing)}.")
        values = {name: parameters[name] for name in names}
        if values["top_k"] == "auto":
            values["top_k"] = None
        return cls(**values)


_CHOICES: Mapping[str, Any] = {
    "semantics": Semantics,
    "pattern": Pattern,
    "text_encoder": TextEncoder,
    "unpaired": Unpaired,
}


def _require_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: expected one of {', '.join(choices)}, found {value!r}.")


def _require_number(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:  # type: ignore[operator]
        raise ConfigError(f"{name}: expected a number from {low:g} to {high:g}, found {value!r}.")
