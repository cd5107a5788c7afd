"""Where a layer's alpha comes from; alpha / rank is what multiplies its delta.

In this order: the layer's own alpha tensor (kohya), the configuration that PEFT and
diffusers write (see :class:`AdapterConfig`), and alpha = rank where a file says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from klora_compile.reading.key_layouts import CLIP_PREFIX
from klora_runtime.errors import LoraError, shown
from klora_runtime.safetensors_file import parse_json

METADATA_KEY = "lora_adapter_metadata"

#: The two files of an adapter folder as PEFT saves it.
PEFT_MODEL, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_MAX_CONFIG_BYTES = 2**20

#: An alpha beyond these magnitudes is no setting that anybody trained with; 0 is one.
MIN_ALPHA, MAX_ALPHA = 1e-12, 1e12

#: PEFT settings under which a pair means something else than up @ down -> the form's name.
_REFUSED_SETTINGS: Mapping[str, str] = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "activated LoRA",
}

#: A module path or the end of one, dots escaped or not. PEFT allows any regular expression here,
#: and a hostile one takes for ever.
_NAME = re.compile(r"\^?[A-Za-z0-9_-]+(\\?\.[A-Za-z0-9_-]+)*\$?")


class AdapterConfig:
    """The PEFT configuration of a file, per component; may be empty.

    diffusers writes it into the file's metadata; PEFT's own ``save_pretrained`` writes
    ``adapter_config.json`` beside ``adapter_model.safetensors``.

    Args:
        metadata: the safetensors metadata.
        path: the LoRA file.
        where: how to name the file in errors.

    Raises:
        LoraError: the configuration is there and cannot be read, or an alpha in it is not a number
            or is for a pattern that is not a module name.
    """

    def __init__(self, metadata: Mapping[str, str], path: Path, where: str) -> None:
        self._values: Mapping[str, Any] = {}
        found = _stated(metadata, path, where)
        if found is None:
            return
        text, origin = found
        try:
            values = parse_json(text)
        except (ValueError, RecursionError) as error:
            raise LoraError(f"{where}: {origin} is no valid JSON: {shown(error)}.") from error
        if not isinstance(values, dict):
            raise LoraError(f"{where}: {origin} is not a JSON object.")
        issues = [issue for key, value in values.items() for issue in _problems(key, value)]
        if issues:
            raise LoraError(f"{where}: {origin} cannot be followed.", issues)
        self._values = values

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
        alpha = next(named, self._get(component, "lora_alpha"))
        if alpha is None:
            return None
        if self._get(component, "use_rslora") is True:
            return float(alpha) * math.sqrt(rank)
        return float(alpha)

    def refused_form(self, component: str) -> str | None:
        """The form that the file says its layers have, where that is not plain LoRA."""
        found = (name for key, name in _REFUSED_SETTINGS.items() if self._get(component, key))
        return next(found, None)

    def _get(self, component: str, key: str) -> Any:
        return self._values.get(f"{component}.{key}", self._values.get(key))


def _stated(metadata: Mapping[str, str], path: Path, where: str) -> tuple[str, str] | None:
    """The configuration as text, and what to call it; None where there is none."""
    if METADATA_KEY in metadata:
        return metadata[METADATA_KEY], METADATA_KEY
    beside = path.with_name(PEFT_CONFIG)
    if path.name != PEFT_MODEL or not beside.is_file():
        return None
    try:
        with beside.open("rb") as file:
            return file.read(_MAX_CONFIG_BYTES).decode(), PEFT_CONFIG
    except (OSError, UnicodeDecodeError) as error:
        raise LoraError(f"{where}: {PEFT_CONFIG} cannot be read: {shown(error)}.") from error


def _problems(key: str, value: Any) -> Iterator[str]:
    """What is wrong with one value of the metadata, of those that decide an alpha."""
    name = key.rpartition(".")[2]
    if value is None:
        return
    if name == "lora_alpha":
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
