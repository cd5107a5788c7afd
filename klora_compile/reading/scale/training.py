"""The settings of a whole training, as kohya's scripts record them in a file's metadata."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klora_compile.reading.scale.peft_config import MAX_ALPHA
from klora_runtime.errors import LoraError, shown

#: Metadata keys with the alpha of a whole training.
TRAINING_KEYS = ("ss_network_alpha", "network_alpha", "lora_alpha")
CONV_ALPHA = "conv_alpha of ss_network_args"

#: What they say where layers differ, nothing was set, or (0) alpha is each layer's rank.
_SILENT = ("", "None", "Dynamic", "0", "0.0")
#: Keys of ``ss_network_args`` under which layers have alphas of their own.
_OWN_ALPHAS = ("block_alphas", "conv_block_alphas", "network_reg_alphas", "reg_alphas", "preset")
#: How sd-scripts' ``resize_lora`` begins its comment; it leaves ``ss_network_args`` as they were.
_RESIZED = "dimension is resized"

#: A rank in digits; longer ones are no ranks.
_RANK = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Training:
    """What the metadata says of all layers together."""

    name: str
    """The metadata key of :attr:`alpha`."""
    alpha: float | None
    """Of linear layers and 1x1 convolutions."""
    conv_alpha: float | None
    """Of convolutions above 1x1."""
    rank: int | None
    """``ss_network_dim``."""
    rank_stabilised: bool
    """Whether alpha is divided by the root of the rank (LyCORIS' ``rs_lora``)."""

    @property
    def by_kohya(self) -> bool:
        """Whether it is sd-scripts' own record. Their converters to other spellings fold alpha into
        the weights and leave this record as it was."""
        return self.name.startswith("ss_")

    def stated(self, rank: int, *, kernel: bool) -> float | None:
        """The alpha that acts as alpha / rank in a layer of this rank, or None."""
        value = self.conv_alpha if kernel else self.alpha
        if value is None:
            return None
        return value * math.sqrt(rank) if self.rank_stabilised else value

    def is_same_scale(self, alpha: float, rank: int, *, kernel: bool) -> bool:
        """Whether a layer's alpha / rank is that of the training, its rank being another one.

        One of musubi-tuner's converters joins query, key and value into one layer of three times
        the rank and three times the alpha.
        """
        own = self.conv_alpha if kernel else self.alpha
        if own is None or self.rank is None or kernel:
            return False
        return math.isclose(alpha / rank, own / self.rank, rel_tol=2.0**-8)


def training_of(metadata: Mapping[str, str], where: str) -> Training:
    """The settings in a file's metadata; None in them where nothing is said.

    Raises:
        LoraError: an alpha is no number.
    """
    name = next((key for key in TRAINING_KEYS if metadata.get(key)), TRAINING_KEYS[0])
    text = metadata.get(name, "")
    args = _network_args(metadata)
    own = any(args.get(key) not in (None, "") for key in _OWN_ALPHAS)
    changed = text == "Dynamic" or metadata.get("ss_training_comment", "").startswith(_RESIZED)
    conv = "" if changed else str(args.get("conv_alpha", ""))
    rank = metadata.get("ss_network_dim", "")
    return Training(
        name=name,
        alpha=None if text in _SILENT or own else _number(text, name, where),
        conv_alpha=None if conv in _SILENT or own else _number(conv, CONV_ALPHA, where),
        rank=int(rank) if _RANK.fullmatch(rank) else None,
        rank_stabilised=str(args.get("rs_lora", "")).lower() in ("true", "1"),
    )


def _network_args(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        args = json.loads(metadata.get("ss_network_args") or "{}")
    except (ValueError, RecursionError):
        return {}  # only a hint; tensors and ss_network_alpha speak for themselves
    return args if isinstance(args, dict) else {}


def _number(text: str, name: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not abs(value) <= MAX_ALPHA:
        raise LoraError(
            f"{where}: its metadata gives {name} as {shown(text)}, expected a number. Correct "
            "the entry, or remove it."
        )
    return value
