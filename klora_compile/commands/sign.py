"""``klora sign``: sign an artifact with a key or a certificate."""

from __future__ import annotations

import os
from pathlib import Path

import click

from klora_compile.commands.output import check_output
from klora_compile.commands.result import json_option, print_json
from klora_runtime.signature import signature_of

_PASSWORD = "KLORA_KEY_PASSWORD"
_PEM = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command("sign")
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--key",
    type=_PEM,
    required=True,
    help="Your private key, of the curve P-256, P-384 or P-521, in PEM. The password of an "
    f"encrypted key is asked for, or taken from {_PASSWORD}.",
)
@click.option(
    "--certificate",
    type=_PEM,
    help="Your certificate for this key, in PEM: recipients then name it, or the certificate that "
    "it is from, instead of a key.",
)
@click.option(
    "--chain",
    type=_PEM,
    multiple=True,
    help="A certificate that yours is from. Repeat it up to the root.",
)
@click.option("--force", is_flag=True, help="Overwrite an existing signature.")
@json_option
def sign_command(
    file: Path,
    key: Path,
    certificate: Path | None,
    chain: tuple[Path, ...],
    force: bool,
    as_json: bool,
) -> None:
    """Check the artifact FILE, sign it, and write the signature to FILE.sig beside it.

    Recipients check it with 'klora verify FILE --signed-by KEY', or with signed_by= of
    apply_fusion. The extra 'sign' installs what this needs.
    """
    if chain and certificate is None:
        raise click.UsageError("--chain is of a certificate; name yours with --certificate.")
    check_output(signature_of(file), force, inputs=())

    from klora_compile.signing import sign
    from klora_runtime.artifact.whole_document import load_whole_document
    from klora_runtime.errors import shown

    load_whole_document(file)
    password = _password(key, certificate)
    made = sign(file, key, certificate=certificate, chain=chain, password=password, overwrite=force)
    if as_json:
        print_json("signature", {"file": str(file), "signature": str(made)})
        return
    click.echo(f"wrote {shown(made)}; ship it beside {shown(file.name)}")


def _password(key: Path, certificate: Path | None) -> str | None:
    """Return the password of an encrypted key; None if it is not encrypted."""
    if b"ENCRYPTED" not in key.read_bytes():
        return None
    if certificate is not None:
        raise click.UsageError(
            f"{key} is encrypted, which model-signing does not take together with a certificate; "
            "decrypt it."
        )
    known = os.environ.get(_PASSWORD)
    return known if known is not None else str(click.prompt("Password of the key", hide_input=True))
