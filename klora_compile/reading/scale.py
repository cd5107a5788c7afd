"""Where a layer's alpha comes from; alpha / rank is what multiplies its delta.

In this order: the layer's own alpha tensor (kohya), the ``lora_adapter_metadata`` that PEFT and
diffusers write, and alpha = rank where a file says nothing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from klora_runtime.errors import LoraError
from klora_runtime.safetensors_file import parse_json

METADATA_KEY = "lora_adapter_metadata"


class AdapterConfig:
    """The PEFT configuration inside a file's metadata, per component; may be absent.

    Args:
        metadata: the safetensors metadata.
        where: how to name the file in errors.

    Raises:
        LoraError: the metadata is there and cannot be read.
    """

    def __init__(self, metadata: Mapping[str, str], where: str) -> None:
        self._values: Mapping[str, Any] = {}
        if METADATA_KEY not in metadata:
            return
        try:
            values = parse_json(metadata[METADATA_KEY])
        except (ValueError, RecursionError) as error:
            raise LoraError(f"{where}: {METADATA_KEY} is not valid JSON: {error}.") from error
        if not isinstance(values, dict):
            raise LoraError(f"{where}: {METADATA_KEY} is not a JSON object.")
        self._values = values

    def alpha(self, component: str, module: str, rank: int) -> float | None:
        """The alpha that acts as alpha / rank for this module, or None where nothing is said.

        Under rank-stabilised LoRA PEFT scales by alpha / sqrt(rank); the value returned is
        multiplied by sqrt(rank), so that the one formula alpha / rank holds.
        """
        base = self._get(component, "lora_alpha")
        pattern = self._get(component, "alpha_pattern")
        alpha = base
        if isinstance(pattern, dict):
            for name, value in pattern.items():
                if _matches(name, module):
                    alpha = value
                    break
        if not isinstance(alpha, int | float):
            return None
        if self._get(component, "use_rslora") is True:
            return float(alpha) * math.sqrt(rank)
        return float(alpha)

    def uses_dora(self, component: str) -> bool:
        """Whether the file says that its layers are DoRA."""
        return self._get(component, "use_dora") is True

    def _get(self, component: str, key: str) -> Any:
        return self._values.get(f"{component}.{key}", self._values.get(key))


def _matches(pattern: str, module: str) -> bool:
    """PEFT's rule for alpha_pattern: a whole path, or its end after a dot; a regular expression."""
    try:
        return re.fullmatch(rf"(.*\.)?({pattern.removeprefix('^')})", module) is not None
    except re.error:
        return module == pattern or module.endswith(f".{pattern}")
