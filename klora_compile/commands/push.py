"""``klora push``: upload an artifact to the Hugging Face Hub, with its card and pictures."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from klora_compile.commands.parameters import HubId, samples_option
from klora_compile.commands.result import json_option, print_json
from klora_runtime.hub.address import Address, address_of
from klora_runtime.signature import signature_of

_MAP = "schedule.png"


@click.command("push")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("repo", type=HubId(owned=True), metavar="OWNER/NAME")
@click.option("--base-model", type=HubId(), help="The base model's id on the Hub.")
@click.option(
    "--license",
    "licence",
    metavar="LICENCE",
    help="Licence of the fused file.  [default: as its sources state]",
)
@samples_option
@click.option("--map", "with_map", is_flag=True, help="Draw the schedule as a heat map too.")
@click.option("--private", is_flag=True, help="Make a new repository private.")
@click.option("--dry-run", is_flag=True, help="Print the card and the files, and upload nothing.")
@click.option("--force", is_flag=True, help="Replace a card that the repository has.")
@json_option
def push_command(
    file: Path,
    repo: str,
    base_model: str | None,
    licence: str | None,
    samples: tuple[tuple[Path, str], ...],
    with_map: bool,
    private: bool,
    dry_run: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Upload the artifact FILE to OWNER/NAME on the Hugging Face Hub, in one commit.

    The card says how to load the file, where its LoRAs come from and what their licences say. A
    repository that is missing is made. A signature beside FILE goes with it. Log in with 'hf auth
    login', or set HF_TOKEN.
    """
    from klora_compile.hub_upload import CARD, Upload, upload
    from klora_compile.report.card import model_card
    from klora_compile.report.card_facts import CardFacts, Sample
    from klora_runtime.artifact.whole_document import load_whole_document

    _refuse_odd_name(repo, file.name)
    places = _places([picture for picture, _ in samples])
    fusion = load_whole_document(file)
    prompts = [prompt for _, prompt in samples]
    facts = CardFacts.of(
        file,
        base_model=base_model,
        licence=licence,
        picture=_MAP if with_map else None,
        samples=tuple(map(Sample, places, prompts)),
        repo=repo,
    )
    card = model_card(fusion, facts)
    with TemporaryDirectory() as folder:
        files: dict[str, Path | bytes] = {file.name: file, CARD: card.encode(), **places}
        if (signature := signature_of(file)).is_file():
            files[signature.name] = signature
        if with_map:
            from klora_compile.report.plot import plot_schedule

            files[_MAP] = Path(folder) / _MAP
            plot_schedule(fusion, Path(folder) / _MAP, overwrite=False)
        what = Upload(repo, files)
        sizes = what.sizes()
        url = None if dry_run else upload(what, private=private, replace_card=force)
    if as_json:
        print_json("push", {"repo": repo, "files": sizes, "commit": url, "card": card})
        return
    if dry_run:
        click.echo(card)
    for name, size in sizes.items():
        click.echo(f"{name}, {size:,} bytes")
    click.echo("nothing was uploaded" if url is None else f"uploaded: {url}")


def _refuse_odd_name(repo: str, name: str) -> None:
    """Refuse a file that nobody could name on the Hub.

    Raises:
        click.UsageError: the name is none that klora takes.
    """
    if address_of(f"{repo}/{name}") != Address(repo, name) or not name.endswith(".safetensors"):
        raise click.UsageError(
            f"{name} is no name for an artifact on the Hub; rename it to NAME.klora.safetensors, "
            "without '@'."
        )


def _places(pictures: list[Path]) -> dict[str, Path]:
    """Return path in the repository -> picture."""
    places = {f"pictures/{picture.name}": picture for picture in pictures}
    if len(places) != len(pictures):
        raise click.UsageError("--picture: two pictures have one name; rename one of them.")
    return places
