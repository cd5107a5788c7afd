"""What a file's metadata says for people: who trained it, its trigger words, its licence.

Only hints: whatever cannot be read is passed over, and nothing here decides a number.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

#: Metadata keys that hold a trigger phrase or a licence, as written by the common trainers.
_TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger_words", "trigger_word", "instance_prompt")
_LICENSE_KEYS = ("modelspec.license", "license", "source_licence")

#: Metadata keys with the base model, and beginnings of what they say -> the family.
_FAMILY_KEYS = ("modelspec.architecture", "ss_base_model_version")
_FAMILIES: Mapping[str, str] = {
    "chroma": "chroma",
    "flux-2": "flux.2",
    "flux2": "flux.2",
    "flux": "flux.1",
    "hunyuan": "hunyuan-video",
    "lumina": "lumina2",
    "z-image": "z-image",
    "zimage": "z-image",
    "anima": "anima",
    "stable-diffusion-v1": "sd1",
    "stable-diffusion-v2": "sd2",
    "stable-diffusion-xl-v1-refiner": "sdxl-refiner",
    "stable-diffusion-xl": "sdxl",
    "sdxl": "sdxl",
}

#: At most so many tags of kohya's statistics are taken for trigger words.
_MAX_TAGS = 8

#: Beginning of ``ss_network_module`` -> the trainer.
_NETWORK_MODULES: Mapping[str, str] = {
    "lycoris": "LyCORIS",
    "networks.lora_wan": "musubi-tuner",
    "networks.lora_hv": "musubi-tuner",
    "networks.lora_framepack": "musubi-tuner",
    "networks.lora_flux_2": "musubi-tuner",
    "networks.lora_qwen": "musubi-tuner",
    "networks.lora_zimage": "musubi-tuner",
    "networks.lora_krea2": "musubi-tuner",
    "networks.lora_kandinsky": "musubi-tuner",
    "networks.lora_ideogram": "musubi-tuner",
    "networks.lora_hidream": "musubi-tuner",
    "networks.loha": "musubi-tuner",
    "networks.lokr": "musubi-tuner",
    "networks.": "sd-scripts",
}
#: Metadata key -> the trainer that writes it.
_MARKS: Mapping[str, str] = {
    "ot_config": "OneTrainer",
    "ot_revision": "OneTrainer",
    "ss_sd_scripts_commit_hash": "sd-scripts",
    "lora_adapter_metadata": "PEFT",
}


@dataclass(frozen=True)
class Origin:
    """Where a LoRA is from, as its file says."""

    trainer: str | None
    trigger_words: tuple[str, ...]
    """Phrases, or tags that every picture of the training had."""
    license: str | None


class _File(Protocol):
    @property
    def metadata(self) -> Mapping[str, str]: ...

    @property
    def config(self) -> tuple[str, str] | None: ...

    @property
    def prompt(self) -> str | None: ...


def origin_of(file: _File) -> Origin:
    """The origin of a file, or what of it is known."""
    return Origin(
        trainer=_trainer(file.metadata) or (None if file.config is None else "PEFT"),
        trigger_words=_trigger_words(file),
        license=_first(file.metadata, _LICENSE_KEYS),
    )


def stated_family(metadata: Mapping[str, str]) -> str | None:
    """The base model family that trainers write down, as far as it tells more than names do."""
    stated = [metadata.get(key, "").lower() for key in _FAMILY_KEYS]
    return next(
        (
            family
            for text in stated
            for beginning, family in _FAMILIES.items()
            if text.startswith(beginning)
        ),
        None,
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
    """A stated phrase, else the prompt of the folder's card, else the tags of all pictures."""
    phrase = _first(file.metadata, _TRIGGER_KEYS) or file.prompt
    if phrase:
        return (phrase,)
    return tuple(dict.fromkeys(_common_tags(file.metadata)))[:_MAX_TAGS]


def _common_tags(metadata: Mapping[str, str]) -> Iterator[str]:
    """Tags that occur as often as their folder has pictures.

    kohya's ``ss_tag_frequency`` is ``{folder: {tag: count}}``, ``ss_dataset_dirs`` is
    ``{folder: {"img_count": n}}``; ai-toolkit writes its trigger word as the only tag. Where the
    number of pictures is not stated, it is the highest count.
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
    """A JSON object out of metadata, empty where it is none."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _first(metadata: Mapping[str, str], keys: tuple[str, ...]) -> str | None:
    return next((metadata[key] for key in keys if metadata.get(key)), None)
