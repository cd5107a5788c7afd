"""The arguments of commands that fuse LoRAs: contents, styles, and those that always act."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import TypeVar

import click

from klora_compile.commands.beside import Beside, BesideLora, by_name
from klora_compile.commands.lora_files import (
    Files,
    LoraFiles,
    both_denoisers,
    halves_order,
    lora_of,
    refuse_idle_order,
)
from klora_compile.commands.names import located_files, weight_names_option
from klora_compile.halves import Halves, files_of
from klora_compile.slots import slot_names
from klora_runtime.artifact.checks import refuse_always_name

_Command = TypeVar("_Command", bound=Callable[..., None])

_OPTIONS = (
    click.argument("loras", nargs=-1, type=LoraFiles(), metavar="[CONTENT [STYLE]]"),
    click.option(
        "--content", multiple=True, type=LoraFiles(), help="A content LoRA. Repeat it for several."
    ),
    click.option(
        "--style", multiple=True, type=LoraFiles(), help="A style LoRA. Repeat it for several."
    ),
    click.option(
        "--always",
        multiple=True,
        type=BesideLora(),
        help="A LoRA that acts beside the others, in all its layers at every step, such as an "
        "accelerator: turbo=lightning.safetensors:0.8. No rule sees it. Repeat it for several.",
    ),
    halves_order,
    both_denoisers,
    weight_names_option,
)


def lora_arguments(command: _Command) -> _Command:
    """Add the arguments; the command gives them to :meth:`NamedLoras.found`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


@dataclass(frozen=True)
class FoundLoras:
    """LoRAs as the compiler takes them."""

    contents: tuple[Path | Halves[Path], ...]
    styles: tuple[Path | Halves[Path], ...]
    always: dict[str, Path | Halves[Path]]
    factors: dict[str, float]
    """Slot or half -> weight, as ``--always`` named it."""
    files: list[Path]


@dataclass(frozen=True)
class NamedLoras:
    """The values of the arguments."""

    loras: tuple[Files, ...]
    content: tuple[Files, ...]
    style: tuple[Files, ...]
    always: tuple[Beside, ...]
    halves: str | None
    both_denoisers: bool
    weight_names: tuple[tuple[str | None, str], ...]

    def found(
        self, weights: Iterable[tuple[str, float]], before_download: Callable[[], None]
    ) -> FoundLoras:
        """Return the LoRAs; those on the Hub are downloaded.

        Args:
            weights: what ``--weight`` named.
            before_download: called if something is downloaded, to check first what else may fail.

        Raises:
            click.UsageError: the arguments name too few LoRAs, or one twice.
            ConfigError: the two files of a LoRA cannot be told apart; or a name on the Hub means no
                file, or several.
            KloraError: the Hub does not give a file.
        """
        roles = _by_role(self.loras, self.content, self.style)
        refuse_idle_order(self.halves, (*roles[0], *roles[1], *(e.files for e in self.always)))
        roles, always = self._located(roles, before_download)
        both = self.both_denoisers
        contents, styles = (
            tuple(lora_of(files, self.halves, both=both) for files in role) for role in roles
        )
        beside, factors = by_name(always, weights, self.halves, both=both)
        every = (*contents, *styles, *beside.values())
        return FoundLoras(contents, styles, beside, factors, _distinct(list(map(files_of, every))))

    def words(self) -> tuple[str, ...]:
        """Return the words of a command line that name the same LoRAs, without their weights."""
        words = [_joined(files) for files in self.loras]
        for flag, role in (("--content", self.content), ("--style", self.style)):
            words += [word for files in role for word in (flag, _joined(files))]
        for each in self.always:
            words += ["--always", f"{each.name}={_joined(each.files)}"]
        words += [] if self.halves is None else ["--halves", self.halves]
        words += ["--both-denoisers"] if self.both_denoisers else []
        for slot, file in self.weight_names:
            words += ["--weight-name", file if slot is None else f"{slot}={file}"]
        return tuple(words)

    def _located(
        self,
        roles: tuple[tuple[Files, ...], tuple[Files, ...]],
        before_download: Callable[[], None],
    ) -> tuple[tuple[tuple[Files, ...], tuple[Files, ...]], tuple[Beside, ...]]:
        """Return the LoRAs with the paths of their files."""
        contents, styles = roles
        for each in self.always:
            refuse_always_name(each.name)
        slots = slot_names(len(contents), len(styles))
        named = dict(zip(slots, [*contents, *styles], strict=True))
        named |= {each.name: each.files for each in self.always}
        if any(isinstance(file, str) for files in named.values() for file in files):
            before_download()
        found = located_files(named, self.weight_names)
        paths = [found[slot] for slot in slots]
        beside = tuple(replace(each, files=found[each.name]) for each in self.always)
        return (tuple(paths[: len(contents)]), tuple(paths[len(contents) :])), beside


def _joined(files: Files) -> str:
    return ",".join(map(str, files))


def _by_role(
    loras: tuple[Files, ...], content: tuple[Files, ...], style: tuple[Files, ...]
) -> tuple[tuple[Files, ...], tuple[Files, ...]]:
    """Return the content and the style LoRAs, from arguments or from options."""
    if loras and (content or style):
        raise click.UsageError("name the LoRAs as CONTENT STYLE or with --content and --style.")
    if content or style:
        return content, style
    if len(loras) not in (1, 2):
        raise click.UsageError(
            f"expected CONTENT STYLE, or one LoRA alone, found {len(loras)} LoRAs; name more with "
            "--content and --style."
        )
    return loras[:1], loras[1:]


def _distinct(loras: Sequence[tuple[Path, ...]]) -> list[Path]:
    """Return the files of all LoRAs; refuse a file that two of them have."""
    for one, other in ((a, b) for x, y in combinations(loras, 2) for a, b in product(x, y)):
        if one.samefile(other):
            raise click.UsageError(f"{one} and {other} are one file; name two LoRAs.")
    return [file for own in loras for file in own]
