"""``klora pull``: get an artifact from the Hugging Face Hub, and check it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import click

from klora_compile.commands.names import weight_name_option
from klora_compile.commands.output import check_output
from klora_compile.commands.parameters import signed_by_option
from klora_compile.commands.result import json_option, print_json


class Digest(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.2 on
    """The SHA-256 of a file: 64 hexadecimal digits."""

    name = "SHA256"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        text = str(value).lower()
        if not re.fullmatch(r"[0-9a-f]{64}", text):
            self.fail(f"{value!r} is no SHA-256, 64 hexadecimal digits.", param, ctx)
        return text

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        return self.name


@click.command("pull")
@click.argument("name", metavar="OWNER/NAME")
@weight_name_option
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write.  [default: its name on the Hub, in this folder]",
)
@click.option(
    "--sha256",
    type=Digest(),
    help="The digest that the file must have, as its author states it elsewhere.",
)
@signed_by_option
@click.option("--force", is_flag=True, help="Overwrite existing files.")
@json_option
def pull_command(
    name: str,
    weight_name: str | None,
    output: Path | None,
    sha256: str | None,
    signed_by: Path | None,
    force: bool,
    as_json: bool,
) -> None:
    """Get an artifact from the Hugging Face Hub, check every digest in it, and write it here.

    If the repository has its signature, FILE.sig, this is written beside it.

    OWNER/NAME is a repository; OWNER/NAME/FILE, hf://OWNER/NAME@REVISION/FILE and an https address
    of the Hub are understood too.
    """
    from klora_runtime.artifact.digests import file_digest
    from klora_runtime.artifact.replacing import replacing
    from klora_runtime.artifact.whole_document import load_whole_document
    from klora_runtime.errors import ArtifactError, shown
    from klora_runtime.hub.address import address_of
    from klora_runtime.hub.choosing import ARTIFACT
    from klora_runtime.hub.fetching import located, origin_of
    from klora_runtime.signature import signature_of, signed_digest

    if address_of(name) is None:
        raise click.UsageError(f"{name} is not a name on the Hub; write OWNER/NAME.")
    if output is not None:
        check_output(output, force, inputs=())  # before the download
    kept = Path(located(name, ARTIFACT, weight_name))
    place = Path(kept.name) if output is None else output
    check_output(place, force, inputs=(kept,))
    signature = signature_of(kept)
    if signature.is_file():
        check_output(signature_of(place), force, inputs=(signature,))
    signed = None if signed_by is None else signed_digest(kept, signed_by)
    load_whole_document(kept)
    with replacing(place, overwrite=force) as new:
        shutil.copyfile(kept, new)
        found = file_digest(new)
        if sha256 is not None and found != sha256:
            raise ArtifactError(
                f"{shown(name)}: expected the SHA-256 {sha256}, found {found}. Ask its author "
                "which one is right."
            )
        if signed is not None and found != signed:
            raise ArtifactError(f"{shown(kept)} changed while it was copied. Pull it again.")
    if signature.is_file():
        with replacing(signature_of(place), overwrite=force) as new:
            shutil.copyfile(signature, new)
    origin = origin_of(kept)
    size = place.stat().st_size
    if as_json:
        where = None if origin is None else origin.notes()
        print_json("pull", {"output": str(place), "bytes_out": size, "sha256": found, "hub": where})
        return
    from klora_compile.report.summary import bytes_text

    click.echo(f"wrote {shown(place)}, {bytes_text(size)}, sha256 {found}")
    if origin is not None:
        click.echo(f"from {shown(origin)}")
