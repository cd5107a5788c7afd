"""``klora profile``: measure LoRAs into a store, once for all their partners."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from klora_compile.commands.lora_files import (
    Files,
    LoraFiles,
    both_denoisers,
    halves_order,
    lora_of,
    refuse_idle_order,
)
from klora_compile.commands.parameters import Device, engine_option, workers_option
from klora_compile.commands.result import json_option, print_json
from klora_compile.commands.setting_options import reading_options
from klora_compile.settings.read_options import ReadOptions

if TYPE_CHECKING:
    from klora_compile.profiles.gathering import Gathered
    from klora_compile.profiles.profiling import Result


@click.command("profile")
@click.argument("loras", nargs=-1, required=True, type=LoraFiles(), metavar="LORA...")
@click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="The folder of profiles, which is made if it is missing.",
)
@halves_order
@both_denoisers
@reading_options
@click.option(
    "--device",
    type=Device(),
    default="auto",
    show_default=True,
    help="Where to measure. auto takes a GPU if there is one.",
)
@workers_option
@engine_option
@json_option
def profile_command(
    loras: tuple[Files, ...],
    store: Path,
    halves: str | None,
    both_denoisers: bool,
    reading: ReadOptions,
    device: str,
    workers: int,
    engine: str,
    as_json: bool,
) -> None:
    """Measure each LORA once and keep what is measured in a store.

    A LORA is a file, a folder that PEFT or diffusers saved, a folder of LoRAs, a name on the
    Hugging Face Hub, or HIGH,LOW. A LoRA that the store knows is not measured again, so a command
    that was stopped goes on when it is run again. Several commands may write to one store at once.

    A LoRA that cannot be read is quarantined: the store keeps the reason, the others go on, and
    the command ends with 1.
    """
    refuse_idle_order(halves, loras)
    from klora_compile.engines import engine_of
    from klora_compile.measuring.places import place_of
    from klora_compile.profiles.gathering import gather
    from klora_compile.profiles.store import Store
    from klora_runtime.hub.choosing import LORA
    from klora_runtime.hub.fetching import located

    begin = time.perf_counter()
    place = place_of(device)
    on_host = isinstance(place, str)
    found = [
        lora_of(tuple(Path(located(file, LORA)) for file in files), halves, both=both_denoisers)
        for given in loras
        for files in _in_folder(given)
    ]
    with _bar() as on_lora:
        gathered = gather(
            list(dict.fromkeys(found)),
            Store(store),
            options=reading,
            device=device,
            engine=engine_of(engine, workers, gpus=not on_host),
            on_lora=on_lora,
        )
    _print(gathered, store, time.perf_counter() - begin, as_json)
    if any(result.refused for result in gathered.results):
        click.get_current_context().exit(1)


def _in_folder(files: Files) -> list[Files]:
    """Return the LoRAs of a folder that is none itself; any other LoRA as it was named."""
    from klora_compile.reading.files.lora_file import DIFFUSERS_WEIGHTS, PEFT_WEIGHTS

    usual = (*PEFT_WEIGHTS, *DIFFUSERS_WEIGHTS)

    def is_lora(folder: Path) -> bool:
        return any((folder / name).is_file() for name in usual)

    folder = files[0]
    if len(files) != 1 or not isinstance(folder, Path) or not folder.is_dir() or is_lora(folder):
        return [files]
    inside = [
        path
        for path in sorted(folder.iterdir())
        if (path.is_dir() and is_lora(path)) or (path.is_file() and path.suffix == ".safetensors")
    ]
    if not inside:
        raise click.UsageError(f"{folder} holds no LoRA; name one that does.")
    return [(path,) for path in inside]


def _bar() -> Any:
    from klora_compile.commands.progress import lora_bar

    return lora_bar("profiling")


def _print(gathered: Gathered, store: Path, seconds: float, as_json: bool) -> None:
    every = (*gathered.results, *gathered.again)
    counts = {
        word: sum(result.word == word for result in gathered.results)
        for word in ("measured", "known", "refused")
    }
    if as_json:
        facts = {
            "store": str(store),
            **counts,
            "read_again": len(gathered.again),
            "seconds": seconds,
            "refusals": [{"lora": _name(r), "reason": r.refused} for r in every if r.refused],
        }
        print_json("profiles", facts)
        return
    for result in every:
        if result.refused:
            click.echo(f"refused {_name(result)}: {result.refused}", err=True)
    told = ", ".join(f"{count} {word}" for word, count in counts.items())
    click.echo(f"{told}; in {seconds:.1f} s")
    if gathered.again:
        click.echo(f"{len(gathered.again)} of the store were read again for partners of new ranks")


def _name(result: Result) -> str:
    from klora_compile.halves import files_of
    from klora_runtime.errors import shown

    return ",".join(shown(path) for path in files_of(result.lora))
