"""The YAML header of a model card, and what the card's text shares with it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

from klora_compile.report.card_facts import CardFacts
from klora_compile.report.licences import licence_fields
from klora_compile.report.markdown import printable, yaml_string
from klora_runtime.artifact.schedule import Schedule
from klora_runtime.families.catalogue import FAMILIES
from klora_runtime.families.family import Family, Task

T = TypeVar("T")

#: The task in a card if the family is unknown.
_ANY_TASK: Task = "text-to-image"


def front_matter(fusion: Schedule, facts: CardFacts) -> str:
    """Return the header, between its lines of dashes."""
    task, tag = task_of(fusion), only(family.tag for family in families_of(fusion))
    tags = filter(None, ("lora", "klora", "diffusers", task, tag))
    lines = ["---", "library_name: klora", *([f"pipeline_tag: {task}"] if task else [])]
    lines += ["tags:", *(f"- {tag}" for tag in tags)]
    if facts.base_model is not None:
        lines += [f"base_model: {yaml_string(facts.base_model)}", "base_model_relation: adapter"]
    words = trigger_words(fusion)
    if words:
        lines.append(f"instance_prompt: {yaml_string(words)}")
    if facts.samples:
        lines.append("widget:")
    for sample in facts.samples:
        lines.append(f"- text: {yaml_string(sample.prompt)}")
        lines.append(f"  output: {{url: {yaml_string(sample.picture)}}}")
    licences = [source.license for source in fusion.sources.values()]
    fields = licence_fields(facts.licence, licences)
    lines += [f"{key}: {yaml_string(value)}" for key, value in fields.items()]
    return "\n".join([*lines, "---"])


def families_of(fusion: Schedule) -> list[Family]:
    """Return the known base models that the fusion may be for."""
    return [FAMILIES[key] for key in fusion.candidates if key in FAMILIES]


def only(values: Iterable[T]) -> T | None:
    """Return the value that all of these are; None if there is none, or more than one."""
    distinct = set(values)
    return distinct.pop() if len(distinct) == 1 else None


def task_of(fusion: Schedule) -> Task | None:
    """Return the task in a card; None if the base models that it may be for have several."""
    families = families_of(fusion)
    return only(family.task for family in families) if families else _ANY_TASK


def trigger_words(fusion: Schedule) -> str:
    """Return the trigger words of all sources, each once."""
    words = [word.strip() for source in fusion.sources.values() for word in source.trigger_words]
    return printable(", ".join(dict.fromkeys(filter(None, words))))
