"""The settings of a whole training, as kohya's scripts record them in a file's metadata.

Under ``split_qkv`` sd-scripts trains query, key, value (and a feed-forward fused with them) as
pairs of their own, each with alpha / dim, and saves them as one pair whose rank is the sum and
whose alpha is that of one (``networks/lora_flux.py`` and ``networks/lora_sd3.py``, ``state_dict``
and ``LoRAModule``). The joined pair acts as it was trained with as many times the alpha.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from klora_compile.reading.scale.peft_config import MAX_ALPHA
from klora_runtime.errors import LoraError, shown

#: The metadata key with the alpha of a whole training.
NETWORK_ALPHA = "ss_network_alpha"
CONV_ALPHA = "conv_alpha of ss_network_args"
#: The setting under which alpha is divided by the root of the rank.
RS_LORA = "rs_lora"
#: The setting under which query, key and value are trained apart.
SPLIT_QKV = "split_qkv"

#: What an alpha says where layers differ, nothing was set, or (0) alpha is each layer's rank.
SILENT = ("", "None", "Dynamic", "0", "0.0")
#: Keys of ``ss_network_args`` under which layers have alphas of their own.
_OWN_ALPHAS = ("block_alphas", "conv_block_alphas", "network_reg_alphas", "reg_alphas", "preset")
#: How sd-scripts' ``resize_lora`` begins its comment; it leaves ``ss_network_args`` as they were.
_RESIZED = "dimension is resized"

#: Layers that ``split_qkv`` trains as several pairs, by words in their names -> how many pairs, and
#: the setting with the rank of each where it is not that of all layers.
_SPLIT: Mapping[tuple[str, ...], tuple[int, str]] = {
    ("double", "img_attn", "qkv"): (3, "img_attn_dim"),
    ("double", "txt_attn", "qkv"): (3, "txt_attn_dim"),
    ("single", "linear1"): (4, "single_dim"),
    ("joint_blocks", "x_block", "qkv"): (3, "x_attn_dim"),
    ("joint_blocks", "context_block", "qkv"): (3, "context_attn_dim"),
}

#: Numbers this near are one: bfloat16 has eight bits.
_SAME = 2.0**-8

#: A rank in digits; longer ones are no ranks.
_RANK = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Training:
    """What the metadata says of all layers together."""

    alpha: float | None
    """Of linear layers and 1x1 convolutions."""
    conv_alpha: float | None
    """Of convolutions above 1x1."""
    rank: int | None
    """``ss_network_dim``."""
    rank_stabilised: bool
    """Whether alpha is divided by the root of the rank (LyCORIS' ``rs_lora``)."""
    split: Mapping[tuple[str, ...], int]
    """Words in names of layers that were trained as several pairs -> the rank of each pair."""

    def pairs(self, module: str, rank: int, alpha: float) -> int:
        """How many pairs were joined to a layer of this rank that has the alpha of one; 1: none."""
        for words, dim in self.split.items():
            count = _SPLIT[words][0]
            of_one = float(dim) if self.alpha is None else self.alpha
            if all(word in module for word in words):
                is_joined = rank == count * dim and math.isclose(alpha, of_one, rel_tol=_SAME)
                return count if is_joined else 1
        return 1

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
        return math.isclose(alpha / rank, own / self.rank, rel_tol=_SAME)


def training_of(metadata: Mapping[str, str], where: str) -> Training:
    """The settings in a file's metadata; None in them where nothing is said.

    Raises:
        LoraError: an alpha is no number.
    """
    text = metadata.get(NETWORK_ALPHA, "")
    args = _network_args(metadata)
    own = any(args.get(key) not in (None, "") for key in _OWN_ALPHAS)
    changed = text == "Dynamic" or metadata.get("ss_training_comment", "").startswith(_RESIZED)
    conv = "" if changed else str(args.get("conv_alpha", ""))
    rank = rank_of(metadata.get("ss_network_dim"))
    split = {} if changed else _split(args, rank)
    return Training(
        alpha=None if text in SILENT or own else stated_number(text, NETWORK_ALPHA, where),
        conv_alpha=None if conv in SILENT or own else stated_number(conv, CONV_ALPHA, where),
        rank=rank,
        rank_stabilised=str(args.get(RS_LORA, "")).lower() in ("true", "1"),
        split=split,
    )


def _split(args: Mapping[str, Any], rank: int | None) -> Mapping[tuple[str, ...], int]:
    """See :attr:`Training.split`."""
    if str(args.get(SPLIT_QKV, "")) != "True":
        return {}
    ranks = {words: rank_of(args.get(key)) or rank for words, (_, key) in _SPLIT.items()}
    return {words: own for words, own in ranks.items() if own is not None}


def rank_of(value: object) -> int | None:
    """A rank out of metadata; None where it is none."""
    text = "" if value is None else str(value)
    return int(text) if _RANK.fullmatch(text) else None


def _network_args(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        args = json.loads(metadata.get("ss_network_args") or "{}")
    except (ValueError, RecursionError):
        return {}  # only a hint; tensors and ss_network_alpha speak for themselves
    return args if isinstance(args, dict) else {}


def stated_number(text: str, name: str, where: str) -> float:
    """An alpha out of metadata.

    Raises:
        LoraError: it is no number.
    """
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
