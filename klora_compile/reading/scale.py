"""Where a layer's alpha comes from; alpha / rank is what multiplies its delta.

One rule. These sources may state an alpha, and the first that does is taken:

1. the layer's own alpha tensor (``tensor``);
2. the configuration that PEFT and diffusers write: ``lora_adapter_metadata``, or
   ``adapter_config.json`` of an adapter folder;
3. kohya's setting of the whole training, ``ss_network_alpha`` or its kin in the metadata; for
   convolutions above 1x1 ``conv_alpha`` of ``ss_network_args``;
4. none: alpha is the rank (``rank``), so that the delta is up @ down.

Two sources that state different numbers for one layer are an error that names both, unless the
first is asked for. A setting of the whole training states nothing about layers that have settings
of their own (``block_alphas`` and the like), nor where it is ``Dynamic``, as ``resize_lora`` of
sd-scripts writes. Forms without a rank have no alpha.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from klora_compile.reading.layouts.spelling import CLIP_PREFIX
from klora_runtime.errors import LoraError, shown
from klora_runtime.safetensors_file import parse_json

METADATA_KEY = "lora_adapter_metadata"

#: Metadata keys with the alpha of a whole training.
TRAINING_KEYS = ("ss_network_alpha", "network_alpha", "lora_alpha")
#: What they say where layers differ or nothing was set.
_SILENT = ("", "None", "Dynamic")
#: Keys of ``ss_network_args`` under which layers have alphas of their own.
_OWN_ALPHAS = ("block_alphas", "conv_block_alphas", "network_reg_alphas", "reg_alphas", "preset")

#: An alpha beyond these magnitudes is no setting that anybody trained with; 0 is one.
MIN_ALPHA, MAX_ALPHA = 1e-12, 1e12

#: Numbers this near are one: bfloat16 has eight bits.
_SAME = 2.0**-8

#: PEFT settings under which a pair means something else than up @ down -> the form's name.
_REFUSED_SETTINGS: Mapping[str, str] = {
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "activated LoRA",
}
#: PEFT's types of adapters that are read, and where each states its alpha.
_TYPES: Mapping[str, str] = {
    "LORA": "lora_alpha",
    "LOHA": "alpha",
    "LOKR": "alpha",
}
#: Initialisations that change the base as well, which the file does not hold.
_REFUSED_STARTS = ("pissa", "olora", "corda", "loftq")

#: A module path or the end of one, dots escaped or not. PEFT allows any regular expression here,
#: and a hostile one takes for ever.
_NAME = re.compile(r"\^?[A-Za-z0-9_-]+(\\?\.[A-Za-z0-9_-]+)*\$?")


@dataclass(frozen=True)
class Alpha:
    """An alpha and where it is from."""

    value: float
    source: str


class Scales:
    """What a file says about alphas.

    Args:
        metadata: the safetensors metadata.
        config: text and name of the PEFT configuration beside the file; None where there is none.
        where: how to name the file in errors.

    Raises:
        LoraError: a statement cannot be read, or an alpha in it is not a number or is for a pattern
            that is not a module name.
    """

    def __init__(
        self, metadata: Mapping[str, str], config: tuple[str, str] | None, where: str
    ) -> None:
        stated = (metadata[METADATA_KEY], METADATA_KEY) if METADATA_KEY in metadata else config
        self._config = None if stated is None else AdapterConfig(*stated, where)
        self._training = _Training(metadata, where)

    def alpha(
        self, component: str, module: str, rank: int, kernel: bool, tensor: float | None
    ) -> tuple[Alpha, Alpha | None]:
        """The alpha of a layer, and another that is stated for it and differs.

        Args:
            module: its path as the file names it.
            rank: as declared.
            kernel: whether it is a convolution above 1x1.
            tensor: the value of its alpha tensor.
        """
        stated = [] if tensor is None else [Alpha(tensor, "tensor")]
        config = None if self._config is None else self._config.alpha(component, module, rank)
        if config is not None:
            assert self._config is not None
            stated.append(Alpha(config, self._config.name))
        training = self._training.alpha(rank, kernel)
        if training is not None:
            stated.append(training)
        if not stated:
            return Alpha(float(rank), "rank"), None
        first, *others = stated
        different = (each for each in others if not _are_near(each.value, first.value))
        return first, next(different, None)

    def refused_form(self, component: str) -> str | None:
        """The form that the file says its layers have, where klora cannot read it."""
        return None if self._config is None else self._config.refused_form(component)

    def rank(self, component: str, module: str) -> int | None:
        """The rank that alpha is divided by where the tensors of a LoKr do not say it."""
        stated = None if self._config is None else self._config.rank(component, module)
        return self._training.rank() if stated is None else stated

    def is_dora(self, component: str) -> bool:
        """Whether the file says that its layers are DoRA's."""
        return self._config is not None and self._config.is_dora(component)


class AdapterConfig:
    """The PEFT configuration of a file, per component.

    Args:
        text: its JSON.
        name: how to call it.
        where: how to name the file in errors.

    Raises:
        LoraError: see :class:`Scales`.
    """

    def __init__(self, text: str, name: str, where: str) -> None:
        self.name = name
        try:
            values = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise LoraError(f"{where}: {name} is no valid JSON: {shown(error)}.") from error
        if not isinstance(values, dict):
            raise LoraError(f"{where}: {name} is not a JSON object.")
        issues = [issue for key, value in values.items() for issue in _problems(key, value)]
        if issues:
            raise LoraError(f"{where}: {name} cannot be followed.", issues)
        self._values: Mapping[str, Any] = values

    def alpha(self, component: str, module: str, rank: int) -> float | None:
        """The alpha that acts as alpha / rank for this module, or None where nothing is said.

        Under rank-stabilised LoRA PEFT scales by alpha / sqrt(rank); the value returned is
        multiplied by sqrt(rank), so that the one formula alpha / rank holds.
        """
        patterns = self._get(component, "alpha_pattern") or {}
        spellings = [module]
        if component.startswith("text_encoder"):
            spellings.append(CLIP_PREFIX + module)
        named = (value for name, value in patterns.items() if _matches(name, spellings))
        alpha = next(named, self._get(component, self._type(component)))
        if alpha is None:
            return None
        if self._get(component, "use_rslora") is True:
            return float(alpha) * math.sqrt(rank)
        return float(alpha)

    def rank(self, component: str, module: str) -> int | None:
        """The rank that LoKr's alpha is divided by in PEFT, also where no matrix is factored."""
        if str(self._get(component, "peft_type")) != "LOKR":
            return None
        patterns = self._get(component, "rank_pattern") or {}
        named = (
            value
            for name, value in (patterns.items() if isinstance(patterns, dict) else ())
            if _NAME.fullmatch(name) and _matches(name, [module])
        )
        rank = next(named, self._get(component, "r"))
        return rank if type(rank) is int and rank > 0 else None

    def _type(self, component: str) -> str:
        return _TYPES.get(str(self._get(component, "peft_type")), _TYPES["LORA"])

    def refused_form(self, component: str) -> str | None:
        """See :meth:`Scales.refused_form`."""
        kind = self._get(component, "peft_type")
        if kind is not None and kind not in _TYPES:
            return shown(kind)
        start = self._get(component, "init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_REFUSED_STARTS):
            return f"{shown(start)}, which changes the base too, and this is not in the file"
        found = (name for key, name in _REFUSED_SETTINGS.items() if self._get(component, key))
        return next(found, None)

    def is_dora(self, component: str) -> bool:
        """See :meth:`Scales.is_dora`."""
        return bool(self._get(component, "use_dora"))

    def _get(self, component: str, key: str) -> Any:
        return self._values.get(f"{component}.{key}", self._values.get(key))


class _Training:
    """The settings of a whole training, as kohya's scripts record them."""

    def __init__(self, metadata: Mapping[str, str], where: str) -> None:
        self._name = next((key for key in TRAINING_KEYS if metadata.get(key)), TRAINING_KEYS[0])
        text = metadata.get(self._name, "")
        args = _network_args(metadata)
        own = any(args.get(key) not in (None, "") for key in _OWN_ALPHAS)
        self._alpha = None if text in _SILENT or own else _number(text, self._name, where)
        conv = str(args.get("conv_alpha", ""))
        name = "conv_alpha of ss_network_args"
        self._conv = None if conv in _SILENT or own else _number(conv, name, where)
        self._rank_stabilised = str(args.get("rs_lora", "")).lower() == "true"
        rank = metadata.get("ss_network_dim", "")
        self._rank = int(rank) if rank.isdecimal() and int(rank[:9]) > 0 else None

    def rank(self) -> int | None:
        """Of LyCORIS' rank-stabilised LoKr; otherwise its scale is 1 where nothing is factored."""
        return self._rank if self._rank_stabilised else None

    def alpha(self, rank: int, kernel: bool) -> Alpha | None:
        """What is stated for layers of a rank, or None."""
        value = self._conv if kernel else self._alpha
        if value is None:
            return None
        name = "conv_alpha of ss_network_args" if kernel else self._name
        return Alpha(value * math.sqrt(rank) if self._rank_stabilised else value, name)


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
            f"{where}: {name} is {shown(text)} in its metadata, expected a number. Correct it, or "
            "take the entry out."
        )
    return value


def _are_near(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=_SAME)


def _problems(key: str, value: Any) -> Iterator[str]:
    """What is wrong with one value of the metadata, of those that decide an alpha."""
    name = key.rpartition(".")[2]
    if value is None:
        return
    if name in ("lora_alpha", "alpha"):
        if not _is_number(value):
            yield f"{shown(key)}: expected a number, found {shown(value)}"
    elif name == "use_rslora":
        if not isinstance(value, bool):
            yield f"{shown(key)}: expected true or false, found {shown(value)}"
    elif name == "alpha_pattern":
        if not isinstance(value, dict):
            yield f"{shown(key)}: expected an object, found {shown(value)}"
            return
        for pattern, alpha in value.items():
            if not _NAME.fullmatch(pattern):
                yield (
                    f"{shown(key)}: {shown(pattern)} is a regular expression; "
                    "write the names of the modules out"
                )
            if not _is_number(alpha):
                yield f"{shown(key)}.{shown(pattern)}: expected a number, found {shown(alpha)}"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= MAX_ALPHA


def _matches(pattern: str, spellings: list[str]) -> bool:
    """PEFT's rule for alpha_pattern: a whole path, or its end after a dot; ``^``: whole only."""
    name = pattern.removeprefix("^").replace("\\.", ".").removesuffix("$")
    return any(
        spelling == name or (pattern[:1] != "^" and spelling.endswith(f".{name}"))
        for spelling in spellings
    )
