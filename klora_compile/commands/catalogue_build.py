"""``klora catalogue STORE``: link all pairs of a store into one file."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klora_compile.commands.parameters import Device, engine_option, workers_option
from klora_compile.commands.progress import lora_bar
from klora_compile.commands.result import json_option, print_json
from klora_compile.commands.rule_options import RuleCommand, rule_option
from klora_compile.commands.setting_options import given, shared_options
from klora_compile.rules.lookup import DEFAULT_RULE

if TYPE_CHECKING:
    from klora_compile.cataloguing.building import Draft, Selection
    from klora_compile.cataloguing.selecting import StoredLora
    from klora_compile.profiles.store import Store
    from klora_compile.settings.config import Config
    from klora_runtime.catalogue.file import CatalogueFile


class NamedPattern(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """``NAME=GLOB[:WEIGHT]``."""

    name = "NAME=GLOB[:WEIGHT]"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str, float | None]:
        if isinstance(value, tuple):
            return value
        name, sign, rest = str(value).partition("=")
        pattern, colon, factor = rest.rpartition(":")
        weight: float | None = None
        if colon:
            try:
                weight = float(factor)
            except ValueError:
                pattern = rest
        else:
            pattern = rest
        if not name or not sign or not pattern:
            self.fail(f"{value!r} is not {self.name}.", param, ctx)
        return name, pattern, weight

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


@click.command("build", cls=RuleCommand)
@click.argument("store", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--content", multiple=True, required=True, metavar="GLOB", help="Subjects. Quote the pattern."
)
@click.option(
    "--style", multiple=True, required=True, metavar="GLOB", help="Styles. Quote the pattern."
)
@click.option(
    "--always",
    multiple=True,
    type=NamedPattern(),
    help="A LoRA that acts beside every pair, in all its layers at every step.",
)
@click.option("--family", multiple=True, help="Only LoRAs that may be for this base model.")
@click.option(
    "--licence", multiple=True, metavar="GLOB", help="Only LoRAs whose licence matches this."
)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The catalogue to write, by custom NAME.klora-catalogue.safetensors.",
)
@rule_option(DEFAULT_RULE)
@shared_options()
@click.option("--add", is_flag=True, help="Add to the catalogue; its pairs are not linked again.")
@click.option("--force", is_flag=True, help="Overwrite an existing file.")
@click.option(
    "--complete",
    is_flag=True,
    help="Read LoRAs again that lack what partners of new ranks need.",
)
@click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Where to measure, with --complete.",
)
@workers_option
@engine_option
@click.option(
    "--table",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Also write a row for each pair, as NAME.jsonl or NAME.parquet.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be linked, and write nothing.")
@json_option
def build_command(
    store: Path,
    content: tuple[str, ...],
    style: tuple[str, ...],
    always: tuple[tuple[str, str, float | None], ...],
    family: tuple[str, ...],
    licence: tuple[str, ...],
    output: Path,
    rule: str,
    add: bool,
    force: bool,
    complete: bool,
    device: str,
    workers: int,
    engine: str,
    table: Path | None,
    dry_run: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Link every subject with every style of STORE.

    A GLOB with a slash is compared with the paths of the profiled files, any other one with their
    names. Pairs that do not fit are refused with a reason; the others are linked. The catalogue
    holds numbers and no weights: services find the LoRAs by their digests.
    """
    from klora_compile.cataloguing.building import build, draft
    from klora_compile.cataloguing.table import check_table, write_table
    from klora_compile.commands.output import check_output
    from klora_compile.engines import engine_of
    from klora_compile.profiles.store import Store
    from klora_compile.settings.config import Config
    from klora_runtime.catalogue.opened import OpenCatalogue

    exists = output.exists()
    if add and not exists:
        raise click.UsageError(f"--add: there is no catalogue {output}; leave --add out.")
    if not dry_run:
        check_output(output, force or add, inputs=())
        if table is not None:
            check_table(table)
            check_output(table, force or add, inputs=())
    settings["weights"] += tuple((n, weight) for n, _, weight in always if weight is not None)
    config = Config.named(rule, **given(settings))
    begin = time.perf_counter()
    held = Store(store)
    before = _opened(output) if add else None
    selection = _selection(held, content, style, always, (family, licence), before)
    run = engine_of(engine, workers)
    _refuse_lacking(held, selection, config, complete, device, run)
    if complete:
        selection = _selection(held, content, style, always, (family, licence), before)
    found = draft(held, selection, config, before)
    if dry_run:
        _print_draft(found, output, as_json)
        return
    with lora_bar("linking") as on_pairs:
        built = build(found, output, overwrite=force or add, engine=run, on_pairs=on_pairs)
    if table is not None:
        write_table(OpenCatalogue.open(output), table, overwrite=force or add)
    facts = {
        "output": str(output),
        "bytes_out": built.nbytes,
        "contents": len(found.contents),
        "styles": len(found.styles),
        "linked": built.linked,
        "kept": built.kept,
        "refused": dict(built.refused),
        "seconds": time.perf_counter() - begin,
    }
    _print(facts, as_json)


def _opened(path: Path) -> CatalogueFile:
    from klora_runtime.catalogue.file import CatalogueFile

    return CatalogueFile(path)


def _selection(
    store: Store,
    contents: Sequence[str],
    styles: Sequence[str],
    always: Sequence[tuple[str, str, float | None]],
    filters: tuple[Sequence[str], Sequence[str]],
    before: CatalogueFile | None,
) -> Selection:
    """Return the LoRAs of a catalogue: those that match, and those of an earlier one."""
    from klora_compile.cataloguing.building import Selection
    from klora_compile.cataloguing.selecting import Filters, loras_of, matching
    from klora_runtime.artifact.checks import refuse_always_name
    from klora_runtime.errors import ConfigError, shown

    loras = loras_of(store.profiles())
    if not loras:
        raise ConfigError(f"{shown(store.folder)} holds no profiles; run klora profile first.")
    wanted = Filters(*filters)
    beside = {}
    for name, pattern, _ in always:
        refuse_always_name(name)
        found = matching(loras, [pattern], Filters(), "--always")
        if len(found) > 1:
            raise ConfigError(f"--always {name}: {len(found)} LoRAs match; name one.")
        beside[name] = found[0]
    roles = [
        matching(loras, patterns, wanted, option)
        for patterns, option in ((contents, "--content"), (styles, "--style"))
    ]
    if before is not None:
        document = before.document
        known = {lora.id: lora for lora in loras}
        for role, numbers in zip(roles, (document.contents, document.styles), strict=True):
            role += _earlier(known, [document.loras[number] for number in numbers], role)
    return Selection(roles[0], roles[1], beside)


def _earlier(
    known: Mapping[tuple[str, ...], StoredLora], loras: Sequence[Any], role: Sequence[StoredLora]
) -> list[StoredLora]:
    """Return the LoRAs of an earlier catalogue that were not selected."""
    from klora_runtime.errors import ConfigError, shown

    missing = [lora.name for lora in loras if lora.sha256 not in known]
    if missing:
        raise ConfigError(
            f"the store lacks {len(missing)} LoRAs of the catalogue; profile them, or write "
            "another file.",
            map(shown, missing),
        )
    taken = {lora.id for lora in role}
    return [known[lora.sha256] for lora in loras if lora.sha256 not in taken]


def _refuse_lacking(
    store: Store,
    selection: Selection,
    config: Config,
    complete: bool,
    device: str,
    engine: Any,
) -> None:
    """Refuse LoRAs that lack sums, or read them again."""
    from klora_compile.cataloguing.building import lacking, partners_of
    from klora_compile.cataloguing.terms import terms_of
    from klora_compile.profiles.gathering import run_tasks, tasks_of
    from klora_runtime.errors import KloraError, shown

    terms = terms_of(config, ("content", "style", *selection.always))
    found = lacking(store, selection, terms)
    if not found:
        return
    if not complete:
        raise KloraError(
            f"{len(found)} LoRAs lack sums that partners of other ranks need, so their files have "
            "to be read again. Add --complete, or run klora profile with all LoRAs.",
            (shown(lora.first.path) for lora in found.values()),
        )
    partners = partners_of(terms, selection)
    asked = tuple(sorted({key for id_ in found for key in partners[id_]}))
    fixed = terms.duel is not None and terms.duel.top_k is not None
    profiles = [profile for lora in found.values() for profile in lora.profiles.values()]
    tasks = tasks_of(profiles, store, device, () if fixed else asked, asked if fixed else ())
    with lora_bar("completing") as on_lora:
        results = run_tasks(tasks, store, engine, on_lora)
    refused = [f"{result.lora}: {result.refused}" for result in results if result.refused]
    if refused or lacking(store, selection, terms):
        raise KloraError("some LoRAs cannot be read again as they were profiled:", refused)


def _print_draft(found: Draft, output: Path, as_json: bool) -> None:
    """Print what would be linked: counts, bytes and seconds."""
    from klora_compile.cataloguing.bulk import Wanted, link_all

    wanted = found.wanted
    pairs = sum(len(each.styles) for each in wanted)
    sample, begin = [Wanted(w.content, w.styles[:64]) for w in wanted[:2]], time.perf_counter()
    linked = sum(
        len(each.styles) for each in link_all(found.terms, sample, found.numbers, found.components)
    )
    seconds = (time.perf_counter() - begin) * pairs / linked if linked else 0.0
    numbers = sum(8 * len(n.table.places) * (4 + len(n.sums)) for n in found.numbers)
    facts = {
        "output": str(output),
        "dry_run": True,
        "contents": len(found.contents),
        "styles": len(found.styles),
        "linked": pairs,
        "kept": len(found.known),
        "refused": dict(found.refusals),
        "bytes_out": numbers + len(found.kind_of) * (12 + 16 + 8 * len(found.components)),
        "seconds": seconds,
    }
    _print(facts, as_json)


def _print(facts: Mapping[str, Any], as_json: bool) -> None:
    from klora_compile.report.summary import bytes_text
    from klora_compile.report.table import labelled
    from klora_runtime.errors import shown

    if as_json:
        print_json("catalogue", facts)
        return
    size = bytes_text(facts["bytes_out"])
    about = "about " if "dry_run" in facts else ""
    rows = [
        ("catalogue", f"{shown(facts['output'])}, {about}{size}"),
        ("LoRAs", f"{facts['contents']} subjects, {facts['styles']} styles"),
        ("linked", f"{facts['linked']} pairs, {about}{facts['seconds']:.1f} s"),
    ]
    if facts["kept"]:
        rows.append(("kept", f"{facts['kept']} pairs of the file"))
    rows += [("refused", f"{n} pairs: {shown(why, 400)}") for why, n in facts["refused"].items()]
    if "dry_run" in facts:
        rows.append(("dry run", "nothing was written"))
    click.echo(labelled(rows))
