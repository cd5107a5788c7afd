"""Model cards for the Hugging Face Hub, from an artifact alone; equal input gives equal bytes."""

from __future__ import annotations

import json
import os
import shlex
from collections import Counter
from collections.abc import Mapping
from urllib.parse import quote

import click

from klora_compile.report.card_facts import CardFacts
from klora_compile.report.fates import MEANINGS
from klora_compile.report.front_matter import (
    families_of,
    front_matter,
    task_of,
    trigger_words,
)
from klora_compile.report.licences import licence_sentences
from klora_compile.report.markdown import fenced, plain, printable
from klora_compile.report.schedule_map import text_map
from klora_compile.report.summary import bytes_text, gamma_text, ranks_text, rule_of, summarise
from klora_compile.report.table import markdown_table
from klora_compile.rules.lookup import RULES
from klora_runtime.__about__ import INSTALL, INSTALL_RUNTIME, REPOSITORY
from klora_runtime.artifact.checks import FORMAT_NAME, FORMAT_VERSION
from klora_runtime.artifact.schedule import ALWAYS, Schedule, Source
from klora_runtime.families.catalogue import FAMILIES, families_name

_MAP_WIDTH = 60

_ANY_PIPELINE = "DiffusionPipeline"
_BASE_MODEL = "BASE-MODEL"

#: What a pipeline makes -> a name for one, and the attribute of its result that holds them.
_OUTPUTS = {
    "image": ("image", ".images"),
    "video": ("frames", ".frames"),
    "audio": ("audio", ".audios"),
}
#: The same where base models of several tasks are possible: the first field is what they make.
_ANY_OUTPUT = ("result", "")


def model_card(fusion: Schedule, facts: CardFacts) -> str:
    """Return the card as Markdown after a YAML header; text from the artifact is no markup."""
    parts = [
        front_matter(fusion, facts),
        f"# {plain(_title(facts.name))}",
        _introduction(fusion),
        *_samples(facts),
        "## Base model",
        _base_model(fusion, facts),
        "## Sources",
        _sources(fusion),
        *licence_sentences(facts.licence, fusion.sources),
        "## Schedule",
        _schedule(fusion, facts),
        "## How to load",
        _how_to_load(fusion, facts),
        "## File",
        _file(fusion, facts),
        *_citation(fusion),
    ]
    return "\n\n".join(parts) + "\n"


def _title(name: str) -> str:
    return name.removesuffix(".safetensors").removesuffix(".klora") or name


def _introduction(fusion: Schedule) -> str:
    name, choice = f"the rule {plain(fusion.rule.name)}", ""
    kind, rule = RULES.get(fusion.rule.name), rule_of(fusion)
    steps = "for any number of steps"
    if rule is not None and rule.made_for_steps is not None:
        steps = f"are made for {rule.made_for_steps} steps and stretch with any other number"
    if kind is not None:
        papers = ", ".join(f"[{paper.where}]({paper.link})" for paper in kind.papers)
        name, choice = kind.title, f"{kind.sentence}{f' ({papers})' if papers else ''}. "
    what = f"{_what(fusion)} in one file"
    if len(fusion.slots) == 1:
        told = (
            f"{what}, with its schedule: it holds for any prompt, any seed and any number of steps."
        )
    else:
        told = (
            f"{what}, fused by {name}. {choice}All of these choices are in the file: they hold "
            f"for any prompt and any seed, and {steps}."
        )
    return (
        f"{told} It is not a plain LoRA: load it as [below](#how-to-load), not with "
        "`load_lora_weights`."
    )


def _what(fusion: Schedule) -> str:
    roles = Counter(slot.role for slot in fusion.slots.values())
    subjects, styles = roles["content"], roles["style"]
    parts = [
        f"{'a LoRA' if count == 1 else f'{count} LoRAs'} {what if count == 1 else plural}"
        for count, what, plural in (
            (subjects, "of a subject", "of subjects"),
            (styles, "of a style", "of styles"),
            (roles[ALWAYS], "that always acts", "that always act"),
        )
        if count
    ]
    text = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return text[:1].upper() + text[1:]


def _citation(fusion: Schedule) -> list[str]:
    kind = RULES.get(fusion.rule.name)
    if kind is None or not kind.papers:
        return []
    return ["## Citation", fenced("\n\n".join(paper.bibtex for paper in kind.papers), "bibtex")]


def _samples(facts: CardFacts) -> list[str]:
    """Return the pictures, each with its prompt below."""
    if not facts.samples:
        return []
    parts = ["## Pictures"]
    for sample in facts.samples:
        parts.append(f"![{plain(sample.prompt)}]({quote(os.fsencode(sample.picture))})")
        parts.append(plain(sample.prompt))
    return parts


def _base_model(fusion: Schedule, facts: CardFacts) -> str:
    family = plain(families_name(fusion.candidates)) if fusion.candidates else ""
    components = ", ".join(f"`{name}`" for name in fusion.components)
    if facts.base_model is not None:
        link = f"https://huggingface.co/{quote(facts.base_model)}"
        model = f"[{plain(facts.base_model)}]({link}){f', {family}' if family else ''}."
    elif fusion.families:
        model = f"{family[:1].upper()}{family[1:]}: their LoRAs have these layers in common."
    elif family:
        model = f"{family}: any model of this family with its layers."
    else:
        model = "Not stated. The layers do not identify the family; their shapes must match."
    return f"{model} The fusion changes {components}."


def _sources(fusion: Schedule) -> str:
    heads = ["Role", "File", "Bytes", "Keys", "Ranks", "Licence", "Trigger words", "SHA-256"]
    rows = [_source_row(fusion, name, source) for name, source in fusion.sources.items()]
    return markdown_table(heads, rows)


def _source_row(fusion: Schedule, name: str, source: Source) -> list[str]:
    roles = {slot.role for slot in fusion.slots.values() if name in slot.sources}
    roles = {name} if name in fusion.slots else roles
    return [
        " and ".join(sorted(roles)) or plain(name),
        plain(source.file),
        f"{source.bytes:,}",
        plain(source.layout),
        ranks_text(source.ranks),
        plain(source.license) if source.license else "not stated",
        plain(", ".join(filter(None, source.trigger_words))) or "none stated",
        f"`{source.sha256}`",
    ]


def _schedule(fusion: Schedule, facts: CardFacts) -> str:
    summary = summarise(fusion)
    settings = [
        ["rule", plain(fusion.rule.name)],
        *([plain(key), plain(_value(value))] for key, value in sorted(summary.settings.items())),
        *(
            [f"{plain(name)}, computed", plain(gamma_text(summary.gamma if name == "gamma" else v))]
            for name, v in summary.derived.items()
        ),
        *(
            [f"slot {plain(name)}", plain(slot.derived)]
            for name, slot in fusion.slots.items()
            if slot.derived is not None
        ),
    ]
    total = sum(summary.fates.values())
    fates = [
        [str(count), plain(fate), MEANINGS.get(fate, "")]
        for fate, count in summary.fates.items()
        if count
    ]
    picture = []
    if facts.picture is not None:
        words = "The schedule as a heat map: layers by progress of sampling"
        picture = [f"![{words}]({quote(os.fsencode(facts.picture))})"]
    parts = [
        markdown_table(["Setting", "Value"], settings),
        markdown_table([f"Layers ({total})", "Fate", "Which LoRA acts"], fates),
        *picture,
        "By block of the denoiser, progress of sampling from left to right:",
        fenced(click.unstyle(text_map(fusion, _MAP_WIDTH)), "text"),
    ]
    return "\n\n".join(parts)


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return gamma_text(value)
    return "not set" if value is None else str(value)


def _how_to_load(fusion: Schedule, facts: CardFacts) -> str:
    families = families_of(fusion)
    where = "" if REPOSITORY is None else f" ([repository]({REPOSITORY}))"
    hint = ""
    if facts.base_model is None:
        such = " or ".join(f"`{family.hub}`" for family in families)
        such = f", such as {such}" if such else ""
        hint = f" {_BASE_MODEL} stands for the folder or the id of yours{such}."
    command = _command(fusion, facts)
    return "\n\n".join(
        [
            f"klora's runtime and diffusers are enough. In klora's source folder{where}:",
            fenced(INSTALL_RUNTIME, "sh"),
            f"Then use Python.{hint}",
            fenced(_python(fusion, facts), "python"),
            *(["With all of klora, a command does the same:"] if command else []),
            *([fenced(INSTALL, "sh"), fenced(command, "sh")] if command else []),
        ]
    )


def _python(fusion: Schedule, facts: CardFacts) -> str:
    """Return Python lines that load the base model, apply the artifact and sample."""
    family, task = FAMILIES.get(fusion.family or ""), task_of(fusion) or ""
    pipeline = _ANY_PIPELINE if family is None else family.pipeline
    one, attribute = _OUTPUTS.get(task.rpartition("-")[2], _ANY_OUTPUT)
    model = f"pipe = {pipeline}.from_pretrained({_literal(facts.base_model or _BASE_MODEL)})"
    if family is not None and family.is_modular:
        model += "\npipe.load_components()"
    needed = _sources_needed(fusion)
    sources = f", sources={json.dumps(needed, ensure_ascii=False)}" if needed else ""
    imports, given = "", ""
    if task.startswith("image"):
        imports, given = "from diffusers.utils import load_image\n", 'image=load_image("in.png"), '
    return (
        f"from diffusers import {pipeline}\n{imports}"
        "from klora_runtime import apply_fusion\n\n"
        f'{model}  # .to("cuda")\n'
        f"handle = apply_fusion(pipe, {_literal(printable(_place(facts)))}{sources})\n"
        f"{one} = pipe(prompt={_literal(_prompt(fusion))}, {given}num_inference_steps=30)"
        f"{attribute}[0]\n"
        "handle.remove()  # every weight back to the bit"
    )


def _place(facts: CardFacts) -> str:
    """Return how the artifact is named: by its file, or on the Hub."""
    return facts.name if facts.repo is None else f"{facts.repo}/{facts.name}"


def _command(fusion: Schedule, facts: CardFacts) -> str | None:
    """Return the same as a command; None if a command cannot do it."""
    task = task_of(fusion)
    if task is None or task.startswith("image") or task.endswith("audio"):
        return None
    if any(family.is_modular for family in families_of(fusion)):
        return None
    name = printable(_place(facts))
    words = ["klora", "sample", f"./{name}" if name.startswith("-") else name]
    words += ["--model", facts.base_model or _BASE_MODEL, "--prompt", _prompt(fusion)]
    words += ["-o", "video.gif" if task.endswith("video") else "picture.png"]
    words += [w for pair in _sources_needed(fusion).items() for w in ("--source", "=".join(pair))]
    return " ".join(map(shlex.quote, words))


def _prompt(fusion: Schedule) -> str:
    return trigger_words(fusion) or "a prompt"


def _sources_needed(fusion: Schedule) -> dict[str, str]:
    """Return name -> file name of the sources that a thin fusion needs."""
    names = {ref.source for entry in fusion.entries for ref in entry.references.values()}
    return {printable(name): printable(fusion.sources[name].file) for name in sorted(names)}


def _file(fusion: Schedule, facts: CardFacts) -> str:
    rows = [
        ["Name", plain(facts.name)],
        ["Size", f"{facts.nbytes:,} bytes ({bytes_text(facts.nbytes)})"],
        ["SHA-256", f"`{facts.sha256}`"],
        ["Format", f"{FORMAT_NAME}, version {FORMAT_VERSION}"],
        ["Fits layers", f"`{fusion.fingerprint}`"],
        ["Written by", plain(fusion.tool)],
    ]
    return markdown_table(["Property", "Value"], rows)


def _literal(text: str) -> str:
    """Return a string literal that is valid in Python and JSON."""
    return json.dumps(text, ensure_ascii=False)
