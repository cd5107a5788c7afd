"""The settings of a whole training, which kohya's scripts record in a file's metadata.

With ``split_qkv`` sd-scripts trains query, key, value (and a feed-forward layer fused with them) as
separate pairs, each with alpha / dim. It saves them as one pair whose rank is the sum but whose
alpha is that of one pair (``networks/lora_flux.py`` and ``networks/lora_sd3.py``, ``state_dict``
and ``LoRAModule``). To act as trained, the joined pair needs alpha times the number of pairs.
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

#: Metadata key of the alpha of a whole training.
NETWORK_ALPHA = "ss_network_alpha"
CONV_ALPHA = "conv_alpha of ss_network_args"
#: Setting with which alpha is divided by the root of the rank.
RS_LORA = "rs_lora"
#: Setting with which query, key and value are trained separately.
SPLIT_QKV = "split_qkv"

#: Values of alpha if layers differ, nothing was set, or (0) alpha is each layer's rank.
SILENT = ("", "None", "Dynamic", "0", "0.0")
#: Keys of ``ss_network_args`` that give layers their own alphas.
_OWN_ALPHAS = ("block_alphas", "conv_block_alphas", "network_reg_alphas", "reg_alphas", "preset")
#: Beginning of the comment by sd-scripts' ``resize_lora``, which keeps ``ss_network_args``.
_RESIZED = "dimension is resized"

#: Words in names of layers that ``split_qkv`` trains as several pairs -> number of pairs, and the
#: setting with the rank of each if it differs from that of all layers.
_SPLIT: Mapping[tuple[str, ...], tuple[int, str]] = {
    ("double", "img_attn", "qkv"): (3, "img_attn_dim"),
    ("double", "txt_attn", "qkv"): (3, "txt_attn_dim"),
    ("single", "linear1"): (4, "single_dim"),
    ("joint_blocks", "x_block", "qkv"): (3, "x_attn_dim"),
    ("joint_blocks", "context_block", "qkv"): (3, "context_attn_dim"),
}

#: Relative distance at which numbers count as equal: bfloat16 has eight bits.
_SAME = 2.0**-8

#: A rank in digits; longer numbers are not ranks.
_RANK = re.compile(r"[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class Training:
    """The settings in the metadata for all layers."""

    alpha: float | None
    """Alpha of linear layers and 1x1 convolutions."""
    conv_alpha: float | None
    """Alpha of convolutions larger than 1x1."""
    rank: int | None
    """``ss_network_dim``."""
    rank_stabilised: bool
    """Whether alpha is divided by the root of the rank (LyCORIS' ``rs_lora``)."""
    split: Mapping[tuple[str, ...], int]
    """Words in names of layers that were trained as several pairs -> rank of each pair."""

    def pairs(self, module: str, rank: int, alpha: float) -> int:
        """Return the number of pairs that were joined to this layer with the alpha of one pair."""
        for words, dim in self.split.items():
            count = _SPLIT[words][0]
            of_one = float(dim) if self.alpha is None else self.alpha
            if all(word in module for word in words):
                is_joined = rank == count * dim and math.isclose(alpha, of_one, rel_tol=_SAME)
                return count if is_joined else 1
        return 1

    def stated(self, rank: int, *, kernel: bool) -> float | None:
        """Return the alpha that acts as alpha / rank in a layer of this rank, or None."""
        value = self.conv_alpha if kernel else self.alpha
        if value is None:
            return None
        return value * math.sqrt(rank) if self.rank_stabilised else value

    def is_same_scale(self, alpha: float, rank: int, *, kernel: bool) -> bool:
        """Return whether a layer of another rank has the training's alpha / rank.

        One of musubi-tuner's converters joins query, key and value into one layer of three times
        the rank and three times the alpha.
        """
        own = self.conv_alpha if kernel else self.alpha
        if own is None or self.rank is None or kernel:
            return False
        return math.isclose(alpha / rank, own / self.rank, rel_tol=_SAME)


def training_of(metadata: Mapping[str, str], where: str) -> Training:
    """Return the settings in a file's metadata; a missing setting is None.

    Raises:
        LoraError: an alpha is not a number.
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
    """Return a rank from metadata; None if it is not a rank."""
    text = "" if value is None else str(value)
    return int(text) if _RANK.fullmatch(text) else None


def _network_args(metadata: Mapping[str, str]) -> Mapping[str, Any]:
    try:
        args = json.loads(metadata.get("ss_network_args") or "{}")
    except (ValueError, RecursionError):
        return {}  # only a hint: tensors and ss_network_alpha suffice
    return args if isinstance(args, dict) else {}


def stated_number(text: str, name: str, where: str) -> float:
    """Return an alpha from metadata.

    Raises:
        LoraError: it is not a number.
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
