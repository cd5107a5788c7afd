"""Both distributions, built and installed without a network: whole, and apart."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_string
from email.message import Message
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement
from support import recipient, runtime_alone
from support.hub import TOKEN, Hub
from support.lora_files import GOLDEN, ROOT
from support.shipped import Shipped, klora

from klora_runtime import __version__
from klora_runtime.__about__ import REPOSITORY

#: Distribution -> the folder of its pyproject.toml.
PROJECTS = {"klora_compile": ROOT, "klora_runtime": ROOT / "runtime"}


def run(*words: object, cwd: Path | None = None) -> str:
    """What a command prints, once it ended well."""
    result = subprocess.run(
        [*map(str, words)], cwd=cwd, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(project: Path, folder: Path, *targets: str) -> None:
    """Build distributions with the hatchling that is installed, as no-build-isolation does."""
    options = [word for target in targets for word in ("-t", target)]
    run(sys.executable, "-m", "hatchling", "build", "-d", folder, *options, cwd=project)


def wheel(folder: Path, name: str) -> Path:
    return folder / f"{name}-{__version__}-py3-none-any.whl"


def names(path: Path) -> set[str]:
    """The files of a wheel."""
    with zipfile.ZipFile(path) as archive:
        return {info.filename for info in archive.infolist() if not info.is_dir()}


def metadata(path: Path) -> Message:
    (name,) = [n for n in names(path) if n.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(path) as archive:
        return message_from_string(archive.read(name).decode())


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels and both source distributions."""
    folder = tmp_path_factory.mktemp("dist")
    for project in PROJECTS.values():
        build(project, folder, "sdist", "wheel")
    return folder


class Environment:
    """A fresh virtual environment that is lent what the tests run with."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, with_pip=False, symlinks=os.name != "nt")
        paths = sysconfig.get_paths("venv", vars={"base": str(folder), "platbase": str(folder)})
        self.scripts, site = Path(paths["scripts"]), Path(paths["purelib"])
        (site / "lent.pth").write_text(str(Path(torch.__file__).parents[1]))

    def python(self, *words: object) -> str:
        """What Python prints; neither this folder nor PYTHONPATH is where it looks."""
        return run(self.scripts / "python", "-I", *words)

    def install(self, *words: object) -> None:
        offline = ["--no-index", "--no-deps", "--no-build-isolation", "--quiet"]
        python = self.scripts / "python"
        run(sys.executable, "-m", "pip", "--python", python, "install", *offline, *words)


def test_every_distribution_is_built_and_passes_the_check_of_the_index(built: Path) -> None:
    files = {path.name for path in built.iterdir()}
    wheels = {wheel(built, name).name for name in PROJECTS}
    assert files == wheels | {f"{name}-{__version__}.tar.gz" for name in PROJECTS}
    assert "PASSED" in run(sys.executable, "-m", "twine", "check", "--strict", *built.iterdir())


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_holds_its_package_and_the_licence(name: str, built: Path) -> None:
    package = PROJECTS[name] / name
    sources = {
        path.relative_to(package.parent).as_posix()
        for path in package.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert {f"{name}/__init__.py", f"{name}/py.typed"} <= sources
    about = f"{name}-{__version__}.dist-info"
    ours = {path for path in names(wheel(built, name)) if not path.startswith(f"{about}/")}
    assert ours == sources
    with zipfile.ZipFile(wheel(built, name)) as archive:
        assert archive.read(f"{about}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


@pytest.mark.parametrize("name", PROJECTS)
def test_a_source_distribution_builds_the_same_wheel_alone(
    name: str, built: Path, tmp_path: Path
) -> None:
    with tarfile.open(built / f"{name}-{__version__}.tar.gz") as archive:
        archive.extractall(tmp_path, filter="data")
    build(tmp_path / f"{name}-{__version__}", tmp_path / "dist", "wheel")
    again = wheel(tmp_path / "dist", name)
    assert again.read_bytes() == wheel(built, name).read_bytes()


def test_the_compiler_requires_the_runtime_of_its_version_and_that_requires_torch(
    built: Path,
) -> None:
    compiler, runtime = (metadata(wheel(built, name)) for name in PROJECTS)
    assert (compiler["Name"], runtime["Name"]) == ("klora-compile", "klora-runtime")
    assert compiler["Version"] == runtime["Version"] == __version__
    assert compiler["Requires-Python"] == runtime["Requires-Python"] == ">=3.11"
    assert f"klora-runtime=={__version__}" in compiler.get_all("Requires-Dist")
    needs = [Requirement(line) for line in runtime.get_all("Requires-Dist")]
    assert {need.name for need in needs if need.marker is None} == {"torch"}
    extras = {"huggingface-hub", "model-signing", "pyopenssl"}
    assert {need.name for need in needs if need.marker} == extras


def test_the_runtime_alone_applies_an_artifact(built: Path, tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install(wheel(built, "klora_runtime"))
    imported = set(environment.python(runtime_alone.__file__, GOLDEN).split())
    assert {"torch", "klora_runtime"} <= imported
    assert not imported & runtime_alone.BLOCKED


def test_a_recipient_needs_the_runtime_and_diffusers_alone(
    built: Path,
    tmp_path: Path,
    shipped: Shipped,
    hub: Hub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The guide on shipping an artifact: pushed, named on the Hub, applied, removed."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    assert klora("push", shipped.artifact, "me/fox-in-ink", "--private").exit_code == 0
    environment = Environment(tmp_path / "venv")
    environment.install(wheel(built, "klora_runtime"))
    printed = environment.python(recipient.__file__, "me/fox-in-ink", shipped.model)
    picture = shipped.picture()
    assert printed.split()[-1] == hashlib.sha256(picture.tobytes()).hexdigest()


@pytest.mark.slow
def test_both_install_editable_with_their_commands(tmp_path: Path) -> None:
    environment = Environment(tmp_path / "venv")
    environment.install("--editable", ROOT / "runtime", "--editable", ROOT)
    version = f"klora, version {__version__}\n"
    assert run(environment.scripts / "klora", "--version") == version
    assert environment.python("-m", "klora_compile", "--version").endswith(version[5:])
    where = "import klora_runtime, klora_compile; print(klora_runtime.__file__)"
    assert Path(environment.python("-c", where).strip()).is_relative_to(ROOT / "runtime")


def test_addresses_come_from_the_one_constant(built: Path) -> None:
    compiler, runtime = (metadata(wheel(built, name)) for name in PROJECTS)
    expected = None if REPOSITORY is None else [f"Repository, {REPOSITORY}"]
    assert compiler.get_all("Project-URL") == runtime.get_all("Project-URL") == expected
    description = compiler.get_payload()
    assert "# klora" in description
    for address in re.findall(r"\]\(([^)]+)\)", description):
        assert re.match("https?://|#", address), address
