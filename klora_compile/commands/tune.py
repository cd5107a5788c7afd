"""``klora tune``: a page on which one sees what each setting does."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from klora_compile.commands.beside import Beside
from klora_compile.commands.lora_arguments import NamedLoras, lora_arguments
from klora_compile.commands.lora_files import Files
from klora_compile.commands.parameters import SlotText
from klora_compile.commands.progress import layer_bar
from klora_compile.commands.sampling_options import model_option, sampling_options
from klora_compile.commands.setting_options import option_words, reading_options, reading_words
from klora_compile.commands.user_cache import no_cache_option, user_cache
from klora_compile.extras import missing_library
from klora_compile.settings.read_options import ReadOptions

_WEIGHT = "weight."

#: Options that say how to sample, with the values that a command need not state.
_HOW = {
    "scheduler": None,
    "mode": "auto",
    "missing": "error",
    "device": "auto",
    "dtype": "auto",
    "trust_remote_code": False,
}


@click.command("tune")
@lora_arguments
@model_option
@click.option("--prompt", default="", help="What to show at first.")
@click.option(
    "--set",
    "settings",
    type=SlotText("VALUE", "NAME"),
    multiple=True,
    help="A setting at first, such as rule=np, bias=0.3, weight.style=0.8, steps=20, seed=7 or "
    "guidance=4. Repeat it for others.",
)
@sampling_options
@reading_options
@no_cache_option
@click.option(
    "--folder",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=".",
    show_default=True,
    help="Where the page saves artifacts.",
)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="The address to listen at. Everyone who reaches it can use the page and save artifacts.",
)
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    help="The port to listen at.  [default: the first free one from 7860 on]",
)
@click.option("--open", "opened", is_flag=True, help="Open the page in a browser.")
def tune_command(
    loras: tuple[Files, ...],
    content: tuple[Files, ...],
    style: tuple[Files, ...],
    always: tuple[Beside, ...],
    halves: str | None,
    both_denoisers: bool,
    weight_names: tuple[tuple[str | None, str], ...],
    model: str,
    prompt: str,
    settings: tuple[tuple[str, str], ...],
    reading: ReadOptions,
    no_cache: bool,
    folder: Path,
    host: str,
    port: int | None,
    opened: bool,
    **how: Any,
) -> None:
    """Show a page on which the fusion of CONTENT and STYLE follows every setting.

    The page has the schedule as a map, the picture beside that of the plain sum, and a strip of
    what was tried. It saves the artifact, and states the commands that make the same picture.
    LoRAs are named as for klora compile. Ctrl-C ends the page.
    """
    named = NamedLoras(loras, content, style, always, halves, both_denoisers, weight_names)
    weights = [(n.removeprefix(_WEIGHT), 1.0) for n, _ in settings if n.startswith(_WEIGHT)]
    found = named.found(weights, lambda: None)
    try:
        from klora_compile.tuning.events import Events
        from klora_compile.tuning.opening import Opening
        from klora_compile.tuning.page import built, serve
        from klora_compile.tuning.repeating import Recipe
    except ModuleNotFoundError as error:
        raise missing_library("klora tune", error, "tune") from error

    cache = user_cache(no_cache)
    roles = found.contents, found.styles, found.always
    with layer_bar("reading") as on_module:
        desk = Opening(*roles, reading, model, cache=cache, **how).desk(on_module)
    factors = {f"{_WEIGHT}{slot}": str(factor) for slot, factor in found.factors.items()}
    first = desk.first_settings({"prompt": prompt, **factors, **dict(settings)})
    recipe = Recipe((*named.words(), *reading_words(reading)), _model_words(model, how))
    page = built(Events(desk, first, recipe, folder))
    click.echo(f"klora tune is at {serve(page, host, port, opened=opened)} until Ctrl-C")
    try:
        page.block_thread()
    finally:
        page.close(verbose=False)
        desk.close()


def _model_words(model: str, how: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the words of ``klora sample`` that name the model and how to load it."""
    words = ["--model", model]
    for name, usual in _HOW.items():
        if how[name] != usual:
            words += option_words(name, how[name])
    return tuple(words)
