"""A signature goes with its artifact to the Hub and back."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from support.hub import TOKEN, Hub
from support.shipped import Shipped, klora

from klora_compile.commands import pull
from klora_runtime import ArtifactError, load_fusion
from klora_runtime.signature import signature_of

pytest.importorskip("model_signing", reason="model-signing is not installed (extra sign)")
from support.keys import Signer  # its library comes with model-signing

REPO = "me/fox-in-ink"


@pytest.fixture
def me(tmp_path: Path) -> Signer:
    return Signer.into(tmp_path, "me")


@pytest.fixture
def pushed(
    hub: Hub, shipped: Shipped, tmp_path: Path, me: Signer, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A signed artifact that is on the Hub too."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    path = Path(shutil.copy(shipped.artifact, tmp_path))
    assert klora("sign", path, "--key", me.key).exit_code == 0
    assert klora("push", path, REPO).exit_code == 0
    return path


def test_the_signature_goes_and_comes(pushed: Path, me: Signer, tmp_path: Path) -> None:
    back = tmp_path / "back.klora.safetensors"
    assert klora("pull", REPO, "-o", back, "--signed-by", me.public).exit_code == 0
    assert back.read_bytes() == pushed.read_bytes()
    assert signature_of(back).read_bytes() == signature_of(pushed).read_bytes()
    assert load_fusion(REPO, signed_by=me.public).entries
    assert klora("verify", REPO, "--signed-by", me.public).exit_code == 0


def test_pull_refuses_another_key_and_writes_nothing(pushed: Path, tmp_path: Path) -> None:
    other = Signer.into(tmp_path, "other")
    back = tmp_path / "back.klora.safetensors"
    result = klora("pull", REPO, "-o", back, "--signed-by", other.public)
    assert result.exit_code == 1
    assert "is not signed by" in result.output
    assert not back.exists()
    assert not signature_of(back).exists()
    with pytest.raises(ArtifactError, match="is not signed by"):
        load_fusion(REPO, signed_by=other.public)


def test_pull_keeps_a_signature_that_is_there(pushed: Path, tmp_path: Path) -> None:
    back = tmp_path / "back.klora.safetensors"
    signature_of(back).write_text("mine")
    assert "exists" in klora("pull", REPO, "-o", back).output
    assert not back.exists()
    assert signature_of(back).read_text() == "mine"
    assert klora("pull", REPO, "-o", back, "--force").exit_code == 0
    assert signature_of(back).read_bytes() == signature_of(pushed).read_bytes()


def test_pull_compares_the_bytes_that_it_writes(
    pushed: Path, me: Signer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = shutil.copyfile
    monkeypatch.setattr(
        pull.shutil, "copyfile", lambda _, new: copy(Path(__file__), new), raising=True
    )
    back = tmp_path / "back.klora.safetensors"
    result = klora("pull", REPO, "-o", back, "--signed-by", me.public)
    assert result.exit_code == 1
    assert "changed while it was copied" in result.output
    assert not back.exists()
