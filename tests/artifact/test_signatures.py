"""Signatures beside artifacts: made, checked, and what each wrong one is answered."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.every_form import fusion_of_every_form
from support.lora_files import GOLDEN
from support.shipped import Shipped
from tiny_pipeline import tiny_pipeline

from klora_compile import thin
from klora_compile.cli import main
from klora_compile.reading.adapter import read_adapter
from klora_runtime import (
    ArtifactError,
    ConfigError,
    FusionLibrary,
    KloraError,
    apply_fusion,
    load_fusion,
    save_fusion,
)
from klora_runtime.artifact import file as reading
from klora_runtime.artifact import references
from klora_runtime.signature import signature_of

model_signing = pytest.importorskip(
    "model_signing", reason="model-signing is not installed (extra sign)"
)
from support.keys import Signer  # noqa: E402  # its library comes with model-signing


def run(*arguments: object, **options: Any) -> Result:
    return CliRunner().invoke(main, [str(each) for each in arguments], **options)


@pytest.fixture(scope="module")
def me(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.into(tmp_path_factory.mktemp("keys"), "me")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Signer:
    return Signer.into(tmp_path_factory.mktemp("keys"), "other")


@pytest.fixture
def signed(tmp_path: Path, me: Signer) -> Path:
    """An artifact with a signature by my key."""
    path = Path(shutil.copy(GOLDEN, tmp_path / "fox.klora.safetensors"))
    result = run("sign", path, "--key", me.key)
    assert result.exit_code == 0, result.output
    return path


def refusal(path: Path, key: Path) -> str:
    """Why a file is not accepted; the same in every place that opens it."""
    with pytest.raises(ArtifactError) as error:
        load_fusion(path, signed_by=key)
    said = str(error.value)
    result = run("verify", path, "--signed-by", key)
    assert result.exit_code == 1
    assert said in result.output
    return said


def test_a_signed_artifact_is_accepted(signed: Path, me: Signer) -> None:
    save_fusion(load_fusion(signed, signed_by=me.public), signed.with_name("again.safetensors"))
    assert signed.with_name("again.safetensors").read_bytes() == signed.read_bytes()
    result = run("verify", signed, "--signed-by", me.public)
    assert result.exit_code == 0
    assert f"signed by {me.public}" in result.output
    facts = json.loads(run("verify", signed, "--signed-by", me.public, "--json").output)
    assert facts["signed_by"] == str(me.public)


def test_the_file_may_be_renamed_with_its_signature(
    signed: Path, me: Signer, tmp_path: Path
) -> None:
    renamed = signed.rename(tmp_path / "mine.klora.safetensors")
    signature_of(signed).rename(signature_of(renamed))
    load_fusion(renamed, signed_by=me.public)


@pytest.mark.parametrize("place", [3, 40, 200, -1], ids=["length", "header", "document", "numbers"])
def test_a_changed_byte(signed: Path, me: Signer, place: int) -> None:
    data = bytearray(signed.read_bytes())
    data[place] ^= 1
    signed.write_bytes(data)
    assert "was changed after it was signed by" in refusal(signed, me.public)


def test_another_key(signed: Path, other: Signer) -> None:
    said = refusal(signed, other.public)
    assert f"is not signed by {other.public}: its signature was made with another key" in said


def test_no_signature(signed: Path, me: Signer) -> None:
    signature_of(signed).unlink()
    assert "has no signature: there is no file" in refusal(signed, me.public)


def test_the_signature_of_another_file(signed: Path, me: Signer, tmp_path: Path) -> None:
    path = tmp_path / "ink.klora.safetensors"
    save_fusion(fusion_of_every_form(), path)
    shutil.copy(signature_of(signed), signature_of(path))
    assert "signs another file, fox.klora.safetensors" in refusal(path, me.public)


def test_an_altered_signature(signed: Path, me: Signer) -> None:
    bundle = json.loads(signature_of(signed).read_text())
    envelope = bundle["dsseEnvelope"]
    first = envelope["signatures"][0]
    first["sig"] = first["sig"][:20] + ("A" if first["sig"][20] != "A" else "B") + first["sig"][21:]
    signature_of(signed).write_text(json.dumps(bundle))
    assert "was made with another key, or altered" in refusal(signed, me.public)


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"dsseEnvelope": {"payload": "e30="}, "verificationMaterial": {}}', "[" * 100_000],
)
def test_what_is_no_signature(signed: Path, me: Signer, text: str) -> None:
    signature_of(signed).write_text(text)
    assert "is no signature by model-signing 1.0 or newer" in refusal(signed, me.public)


def test_a_signature_without_the_keys_name_prints_nothing(
    signed: Path, me: Signer, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = json.loads(signature_of(signed).read_text())
    bundle["verificationMaterial"]["publicKey"] = {}
    signature_of(signed).write_text(json.dumps(bundle))
    with pytest.raises(ArtifactError, match="is no signature by model-signing"):
        load_fusion(signed, signed_by=me.public)
    assert capsys.readouterr().out == ""


def test_another_digest_is_signed(signed: Path, me: Signer) -> None:
    hashing = model_signing.hashing.Config().use_file_serialization(hashing_algorithm="blake3")
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=me.key)
    config.set_hashing_config(hashing).sign(signed, signature_of(signed))
    assert "signs no SHA-256 of one file" in refusal(signed, me.public)


def test_the_library_takes_our_signature_and_we_take_its(signed: Path, me: Signer) -> None:
    verifier = model_signing.verifying.Config().use_elliptic_key_verifier(public_key=me.public)
    verifier.verify(signed, signature_of(signed))
    signer = model_signing.signing.Config().use_elliptic_key_signer(private_key=me.key)
    signer.sign(signed, signature_of(signed))
    load_fusion(signed, signed_by=me.public)


def test_a_certificate_of_ones_own(signed: Path, me: Signer, other: Signer) -> None:
    words = ("sign", signed, "--key", me.key, "--certificate", me.certificate)
    assert run(*words, "--force").exit_code == 0
    load_fusion(signed, signed_by=me.certificate)
    assert "another key, or altered" in refusal(signed, other.certificate)
    assert "another key, or altered" in refusal(signed, me.public)


def test_a_certificate_that_an_authority_gave(
    signed: Path, me: Signer, other: Signer, tmp_path: Path
) -> None:
    mine = Signer.into(tmp_path, "leaf", issuer=me)
    words = ("sign", signed, "--key", mine.key, "--certificate", mine.certificate, "--force")
    result = run(*words)
    assert result.exit_code == 2
    assert "name the certificates that it is from with --chain" in result.output
    assert run(*words, "--chain", me.certificate).exit_code == 0
    load_fusion(signed, signed_by=me.certificate)
    assert "another key, or altered" in refusal(signed, other.certificate)


def test_a_certificate_that_is_not_for_signing(signed: Path, tmp_path: Path) -> None:
    before = signature_of(signed).read_bytes()
    idle = Signer.into(tmp_path, "idle", signs=False)
    result = run(*("sign", signed, "--key", idle.key, "--certificate", idle.certificate, "--force"))
    assert result.exit_code == 2
    assert "Make one with keyUsage digitalSignature" in result.output
    assert signature_of(signed).read_bytes() == before


def test_an_encrypted_key(signed: Path, tmp_path: Path) -> None:
    locked = Signer.into(tmp_path, "locked", password="geheim")
    words = ("sign", signed, "--key", locked.key, "--force")
    assert run(*words, input="geheim\n").exit_code == 0
    load_fusion(signed, signed_by=locked.public)
    assert run(*words, env={"KLORA_KEY_PASSWORD": "geheim"}).exit_code == 0
    result = run(*words, env={"KLORA_KEY_PASSWORD": "falsch"})
    assert result.exit_code == 2
    assert "or its password is wrong" in result.output
    assert "falsch" not in result.output
    result = run(*words, "--certificate", locked.certificate)
    assert "is encrypted, which model-signing does not take together" in result.output


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("me.pem", "is a private key; name the public one"),
        ("none.pub", "cannot be read: No such file or directory"),
        ("fox.klora.safetensors", "is no certificate, and no public key of the curves"),
    ],
)
def test_what_is_no_public_key(signed: Path, me: Signer, name: str, sentence: str) -> None:
    folder = signed.parent if name.startswith("fox") else me.key.parent
    with pytest.raises(ConfigError, match=sentence):
        load_fusion(signed, signed_by=folder / name)


def test_signing_checks_the_artifact_and_keeps_an_old_signature(
    signed: Path, me: Signer, other: Signer
) -> None:
    before = signature_of(signed).read_bytes()
    assert "exists" in run("sign", signed, "--key", me.key).output
    assert "private key of the curves" in run("sign", signed, "--key", me.public, "--force").output
    words = ("sign", signed, "--key", me.key, "--force")
    assert "is not of this key" in run(*words, "--certificate", other.certificate).output
    assert "--chain is of a certificate" in run(*words, "--chain", me.certificate).output
    data = bytearray(signed.read_bytes())
    data[-1] ^= 1
    signed.write_bytes(data)
    assert "tensors are damaged" in run(*words).output
    assert signature_of(signed).read_bytes() == before


def test_a_link_is_not_signed(signed: Path, me: Signer, tmp_path: Path) -> None:
    link = tmp_path / "link.klora.safetensors"
    link.symlink_to(signed)
    assert "is a link; name the file itself" in run("sign", link, "--key", me.key).output


def test_without_the_library(signed: Path, me: Signer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "model_signing", None)
    with pytest.raises(KloraError, match="pip install model-signing pyopenssl"):
        load_fusion(signed, signed_by=me.public)
    assert "signing needs model-signing" in run("sign", signed, "--key", me.key, "--force").output


def changes_after(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str, change: Callable[[], object]
) -> None:
    """Change a file right after a function of a module checked it."""
    check = getattr(module, name)

    def checked(*args: Any) -> Any:
        result = check(*args)
        change()
        return result

    monkeypatch.setattr(module, name, checked)


def test_the_bytes_that_are_read_are_the_bytes_that_are_signed(
    signed: Path, me: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change() -> None:
        save_fusion(fusion_of_every_form(), signed, overwrite=True)

    changes_after(monkeypatch, reading, "signed_digest", change)
    with pytest.raises(ArtifactError, match="it changed while it was read"):
        load_fusion(signed, signed_by=me.public)


def test_verify_compares_the_bytes_too(
    signed: Path, me: Signer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from klora_runtime.artifact import whole_document

    def change() -> None:
        save_fusion(fusion_of_every_form(), signed, overwrite=True)

    changes_after(monkeypatch, whole_document, "signed_digest", change)
    result = run("verify", signed, "--signed-by", me.public)
    assert result.exit_code == 1
    assert "it changed while it was read" in result.output


def test_a_source_of_a_thin_artifact_that_changes(
    shipped: Shipped, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        slot: shutil.copy(shipped.artifact.with_name(f"{name}.safetensors"), tmp_path)
        for slot, name in (("content", "fox"), ("style", "ink"))
    }
    adapters = {slot: read_adapter(path) for slot, path in files.items()}
    path = tmp_path / "thin.klora.safetensors"
    save_fusion(thin(load_fusion(shipped.artifact), adapters), path)
    data = bytearray(Path(files["style"]).read_bytes())
    data[-1] ^= 1
    changes_after(
        *(monkeypatch, references, "_refuse_other_files"),
        lambda: Path(files["style"]).write_bytes(data),
    )
    with pytest.raises(ArtifactError, match="it changed while it was read"):
        load_fusion(path, sources=files)


def test_nothing_changes_on_the_pipeline_before_the_signature_is_right(
    shipped: Shipped, tmp_path: Path, me: Signer, other: Signer
) -> None:
    path = Path(shutil.copy(shipped.artifact, tmp_path))
    assert run("sign", path, "--key", me.key).exit_code == 0
    pipe = tiny_pipeline("sd1")
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with pytest.raises(ArtifactError, match="is not signed by"):
        apply_fusion(pipe, path, signed_by=other.public)
    assert all(torch.equal(value, before[n]) for n, value in pipe.unet.state_dict().items())
    with apply_fusion(pipe, path, signed_by=me.public) as handle:
        applied = dict(pipe.unet.named_parameters())
        assert any(not torch.equal(value, before[name]) for name, value in applied.items())
        with pytest.raises(ArtifactError, match="has no signature"):
            handle.swap(shipped.artifact, signed_by=me.public)
        handle.swap(path, signed_by=me.public)
        with pytest.raises(ConfigError, match=r"signed_by=.* is for a path"):
            handle.swap(handle.fusion, signed_by=me.public)
        with pytest.raises(ArtifactError, match="has no signature"):
            apply_fusion(pipe, path, signed_by=me.public, always={"turbo": shipped.artifact})


def test_a_library_takes_signed_artifacts_alone(signed: Path, me: Signer, tmp_path: Path) -> None:
    library = FusionLibrary(10**9, signed_by=me.public)
    assert library.get(signed) is library.get(signed)
    path = shutil.copy(GOLDEN, tmp_path / "unsigned.klora.safetensors")
    with pytest.raises(ArtifactError, match="has no signature"):
        library.get(path)


def test_sampling_asks_for_a_signature(
    shipped: Shipped, tmp_path: Path, me: Signer, other: Signer
) -> None:
    path = Path(shutil.copy(shipped.artifact, tmp_path))
    assert run("sign", path, "--key", me.key).exit_code == 0
    words = ("sample", path, "--model", shipped.model, "--prompt", "a fox", "--steps", 1)
    words += ("--device", "cpu", "-o", tmp_path / "fox.png", "--signed-by")
    assert "is not signed by" in run(*words, other.public).output
    assert not (tmp_path / "fox.png").exists()
    result = run(*words, me.public)
    assert result.exit_code == 0, result.output
