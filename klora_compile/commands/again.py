"""The option ``--again``: what a picture was made with, as the defaults of ``klora sample``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from klora_compile.commands.beside import Beside
from klora_runtime.hub.choosing import ARTIFACT
from klora_runtime.hub.fetching import located

if TYPE_CHECKING:
    from klora_compile.sampling.making import Making


def _take_over(
    context: click.Context, option: click.Parameter, picture: Path | None
) -> Making | None:
    """Make the values of a picture the defaults of the other options."""
    if picture is None:
        return None
    from klora_compile.sampling.making import read_making

    making = read_making(picture)
    settings = {**making.settings, "guidance": making.settings.get("guidance_scale")}
    always = {name: _found(each, picture) for name, each in making.always.items()}
    context.default_map = {
        **({"file": _found(making.artifact, picture)} if making.artifact else {}),
        "model": _named(making.model, picture),
        "prompts": making.prompts,
        "steps": making.settings.get("num_inference_steps"),
        "weights": tuple(making.weights.items()),
        "always": tuple(Beside(name, (path,), (None,)) for name, path in always.items()),
        **{name: settings.get(name) for name in ("negative_prompt", "guidance", "height", "width")},
        **{name: getattr(making, name) for name in _SAME},
    }
    return making


#: Options whose values a making has under the same name.
_SAME = ("seed", "count", "scheduler", "mode", "missing", "dtype")

again_option = click.option(
    "--again",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    is_eager=True,
    callback=_take_over,
    metavar="PICTURE",
    help="Make this .png of klora again: FILE, --model, --prompt and the other options are "
    "as they were, unless named. Files are looked for here and beside the picture.",
)


def _found(artifact: Mapping[str, str], picture: Path) -> Path:
    """Return the path of an artifact: on the Hub, here, or beside the picture."""
    if "hub" in artifact:
        return Path(located(artifact["hub"], ARTIFACT))
    return Path(_named(artifact["file"], picture))


def _named(name: str, picture: Path) -> str:
    """Return a name, with the picture's folder before it if it is there and not here."""
    beside = picture.parent / Path(name).name
    return str(beside) if beside.exists() and not Path(name).exists() else name
