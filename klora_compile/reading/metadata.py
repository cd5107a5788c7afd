"""Metadata for people: the trainer, the trigger words and the licence of a file.

These are hints: unreadable entries are skipped, and nothing here affects a number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from klora_compile.families.stating import trainers
from klora_runtime.families.family import MUSUBI_TUNER, SD_SCRIPTS

#: Metadata keys of common trainers for a trigger phrase or a licence.
_TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "instance_prompt")
_LICENSE_KEYS = ("modelspec.license", "license", "source_licence")

#: Greatest number of tags of kohya's statistics that are taken as trigger words.
_MAX_TAGS = 8

#: Beginning of ``ss_network_module`` -> trainer: for base models with a record, and for other
#: models and forms of musubi-tuner; sd-scripts and others share a beginning.
_NETWORK_MODULES: Mapping[str, str] = {
    "lycoris": "LyCORIS",
    **trainers(),
    "networks.lora_framepack": MUSUBI_TUNER,
    "networks.lora_hidream": MUSUBI_TUNER,
    "networks.lora_hv": MUSUBI_TUNER,
    "networks.lora_ideogram": MUSUBI_TUNER,
    "networks.lora_kandinsky": MUSUBI_TUNER,
    "networks.loha": MUSUBI_TUNER,
    "networks.lokr": MUSUBI_TUNER,
    "networks.": SD_SCRIPTS,
}
#: Metadata key -> the trainer that writes it.
_MARKS: Mapping[str, str] = {
    "ot_config": "OneTrainer",
    "ot_revision": "OneTrainer",
    "ss_sd_scripts_commit_hash": SD_SCRIPTS,
    "lora_adapter_metadata": "PEFT",
}


@dataclass(frozen=True)
class Origin:
    """The origin of a LoRA, as its file states it."""

    trainer: str | None
    trigger_words: tuple[str, ...]
    """Phrases, or tags that all training pictures have."""
    license: str | None


class _File(Protocol):
    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def config(self) -> tuple[str, str] | None: ...

    @property
    def prompt(self) -> str | None: ...


def origin_of(file: _File) -> Origin:
    """Return the origin of a file, as far as it is stated."""
    return Origin(
        trainer=_trainer(file.metadata) or (None if file.config is None else "PEFT"),
        trigger_words=_trigger_words(file),
        license=_first(file.metadata, _LICENSE_KEYS),
    )


def _trainer(metadata: Mapping[str, str]) -> str | None:
    software = _object(metadata.get("software"))
    if isinstance(software.get("name"), str):
        return str(software["name"])
    module = metadata.get("ss_network_module", "")
    for beginning, trainer in _NETWORK_MODULES.items():
        if module.startswith(beginning):
            return trainer
    return next((trainer for key, trainer in _MARKS.items() if key in metadata), None)


def _trigger_words(file: _File) -> tuple[str, ...]:
    """Return a stated phrase, else the prompt in the folder's card, else the common tags."""
    phrase = _first(file.metadata, _TRIGGER_KEYS) or file.prompt
    if phrase:
        return (phrase,)
    return tuple(dict.fromkeys(_common_tags(file.metadata)))[:_MAX_TAGS]


def _common_tags(metadata: Mapping[str, str]) -> Iterator[str]:
    """Yield the tags that occur as often as their folder has pictures.

    kohya's ``ss_tag_frequency`` is ``{folder: {tag: count}}``, ``ss_dataset_dirs`` is
    ``{folder: {"img_count": n}}``; ai-toolkit writes its trigger word as the only tag. If the
    number of pictures is not stated, the highest count is used.
    """
    folders = _object(metadata.get("ss_dataset_dirs"))
    for folder, tags in _object(metadata.get("ss_tag_frequency")).items():
        counts = {
            tag.strip(): count
            for tag, count in (tags.items() if isinstance(tags, dict) else ())
            if type(count) is int and count > 0 and tag.strip()
        }
        stated = folders.get(folder)
        pictures = stated.get("img_count") if isinstance(stated, dict) else None
        if type(pictures) is not int or pictures < 1:
            pictures = max(counts.values(), default=0)
        yield from (tag for tag, count in counts.items() if count >= pictures)


def _object(text: str | None) -> dict[str, Any]:
    """Return a JSON object from metadata; empty if it is not one."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    return next((metadata[key] for key in keys if metadata.get(key)), None)
