"""A whole run of ``klora sweep --search``: load the model, search, write the sheets."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from klora_compile.measured import MeasuredLoras
from klora_compile.measuring.statistics import OnLayer
from klora_compile.sampling.album import write_picture
from klora_compile.searching.plan import Plan
from klora_compile.searching.result import Search
from klora_compile.searching.run import searched
from klora_compile.sweeping.command import Desk, check_sheets, opened
from klora_compile.sweeping.result import OnPicture
from klora_compile.trying.words import schedule_words, text_of
from klora_runtime.artifact.replacing import replacing
from klora_runtime.errors import shown

_ENDING = ".klora.safetensors"


@dataclass(frozen=True)
class WrittenSearch:
    """A search, and the files of its sheets."""

    search: Search
    outputs: Sequence[Path]
    folder: Path
    command: str
    """The ``klora compile`` command with the settings to take, see :attr:`Search.winner`."""

    def text(self) -> str:
        """Return a few lines for people."""
        return "\n".join(
            [
                f"wrote {', '.join(shown(path) for path in self.outputs)}",
                self.search.text(),
                f"the pictures are in {shown(self.folder)}",
                self.command,
            ]
        )

    def json(self) -> Mapping[str, Any]:
        """Return the index, and where everything is, as JSON values."""
        files = {"outputs": list(map(str, self.outputs)), "folder": str(self.folder)}
        return {**files, "command": self.command, **self.search.json()}


def search_to_files(
    loras: MeasuredLoras,
    plan: Plan,
    outputs: Sequence[Path],
    desk: Desk,
    words: Sequence[str],
    on_layer: OnLayer | None = None,
    on_picture: OnPicture | None = None,
) -> WrittenSearch:
    """Search, and write the sheets.

    Args:
        loras: the LoRAs.
        plan: what to do.
        outputs: a file for each sheet.
        desk: model, folder and options.
        words: the words of ``klora compile`` that name the LoRAs, and how to read them.
        on_layer: see :class:`~klora_compile.sweeping.run.How`.
        on_picture: called before each picture that is made.

    Raises:
        KloraError: the model cannot be loaded; or a file cannot be written; or see
            :func:`~klora_compile.searching.run.searched`. The folder keeps what was made.
    """
    check_sheets(outputs)
    pipe, how = opened(desk, loras, on_layer)
    found = searched(pipe, loras, plan, how, on_picture)
    for number, path in enumerate(outputs):
        write_picture(found.sheet(number), path, overwrite=desk.overwrite)
    command = _command(found.winner.settings, words, outputs[0], overwrite=desk.overwrite)
    return WrittenSearch(found, outputs, desk.folder, command)


def _command(
    settings: Mapping[str, Any], words: Sequence[str], output: Path, *, overwrite: bool
) -> str:
    """Return the command that compiles the LoRAs with settings; tables become files beside it."""
    texts = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            table = output.with_suffix(f".{name}.json")
            with replacing(table, overwrite=overwrite) as temporary:
                temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
            value = table
        texts[name] = text_of(value)
    artifact = f"{output.stem}{_ENDING}"
    return f"klora compile {shlex.join([*words, *schedule_words(texts), '-o', artifact])}"
