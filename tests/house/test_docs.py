"""README and docs say what is true: their code runs, and what they name exists."""

from __future__ import annotations

import functools
import re
import shlex
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from support.hub import Hub
from support.lora_files import ROOT
from support.shipped import Shipped, klora
from tiny_pipeline import tiny_lora

from klora_compile.cli import main
from klora_compile.judging.networks import available
from klora_compile.rules.lookup import RULES
from klora_runtime import load_fusion

FLAGS = re.DOTALL | re.MULTILINE
README = ROOT / "README.md"
PAGES = sorted([README, *ROOT.glob("CONTRIBUTING.md"), *(ROOT / "docs").rglob("*.md")])
ARTIFACT = "fox-in-ink.klora.safetensors"
#: Few steps, and keys that need no base model of a known family.
FOR_A_TINY_MODEL = {
    "sample": ("--steps", "2", "--device", "cpu"),
    "sweep": ("--steps", "2", "--device", "cpu"),
    "export": ("--keys", "peft"),
}
WITH_CODE = [page for page in PAGES if "contributing" not in page.parts]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[list[str]]:
    """The arguments of each ``klora`` command of a page."""
    lines = "\n".join(blocks(page, "sh")).splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line[:6] == "klora "]


@pytest.fixture
def short_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of ``klora tune`` that ends as soon as it is there."""
    try:
        import gradio
    except ModuleNotFoundError:
        return
    monkeypatch.setattr(gradio.Blocks, "block_thread", lambda self: None)


def named(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def skip_without_its_library(page: Path) -> None:
    if page.stem == "sign":
        pytest.importorskip("model_signing", reason="model-signing is not installed (extra sign)")
    if page.stem == "tune":
        pytest.importorskip("gradio", reason="Gradio is not installed (extra tune)")


@pytest.fixture
def desk(
    shipped: Shipped,
    tmp_path: Path,
    hub: Hub,
    modules_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A folder with the files that the pages speak of, and a hub with their names."""
    for name in ("fox", "ink"):
        shutil.copy(shipped.artifact.with_name(f"{name}.safetensors"), tmp_path)
    pipe = DiffusionPipeline.from_pretrained(shipped.model)
    lightning = tiny_lora(pipe, tmp_path / "lightning.safetensors", seed=9)
    for folder, name in (("subjects", "fox"), ("styles", "ink")):
        (tmp_path / folder).mkdir()
        shutil.copy(tmp_path / f"{name}.safetensors", tmp_path / folder)
    (tmp_path / "FOLDER").symlink_to(shipped.model)
    drawings = ROOT / "examples" / "drawings"
    for path in (drawings / "loras" / "weights").iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "base").symlink_to(drawings / "base" / "weights")
    monkeypatch.chdir(tmp_path)
    pair = ("compile", "fox.safetensors", "ink.safetensors", "-o")
    assert klora(*pair, ARTIFACT).exit_code == 0
    assert klora(*pair, "thin.klora.safetensors", "--thin").exit_code == 0
    assert klora("compile", lightning, "-o", "lightning.klora.safetensors").exit_code == 0
    data = {name: Path(f"{name}.safetensors").read_bytes() for name in ("fox", "ink", "lightning")}
    hub.add("OWNER/FOX", {"fox.safetensors": data["fox"]})
    hub.add("OWNER/STYLES", {f"{name}.safetensors": data[name] for name in ("ink", "lightning")})
    hub.add("OWNER/FUSED", {ARTIFACT: Path(ARTIFACT).read_bytes()})
    if find_spec("model_signing") is not None:
        _sign(tmp_path)
    return tmp_path


def _sign(folder: Path) -> None:
    """Write an author's key and certificate, and what the key signed."""
    from support.keys import Signer

    author = Signer.into(folder, "author")
    assert klora("sign", ARTIFACT, "--key", author.key).exit_code == 0


def test_the_readme_uses_the_weights_of_the_repository() -> None:
    """What `desk` has beside the files of other pages."""
    (block,) = (block for block in blocks(README, "sh") if "klora compile" in block)
    loras, base, *rest = block.splitlines()
    assert loras == "cp -r examples/drawings/loras/weights try"
    assert base == "cp -r examples/drawings/base/weights try/base && cd try"
    assert all(line.startswith("klora ") for line in rest)


def test_the_readme_fits_on_a_page() -> None:
    assert len(README.read_bytes()) <= 9000


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a page asks for no number of steps, two."""
    sample = StableDiffusionPipeline.__call__

    @functools.wraps(sample)
    def sample_in_two(*args: Any, num_inference_steps: int = 2, **kwargs: Any) -> Any:
        return sample(*args, num_inference_steps=num_inference_steps, **kwargs)

    monkeypatch.setattr(StableDiffusionPipeline, "__call__", sample_in_two)


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("page", [p for p in WITH_CODE if blocks(p, "python")], ids=named)
def test_python_blocks_run_one_after_the_other(page: Path, desk: Path) -> None:
    skip_without_its_library(page)
    pipe = DiffusionPipeline.from_pretrained("FOLDER")
    pipe.set_progress_bar_config(disable=True)
    before = {name: value.clone() for name, value in pipe.unet.named_parameters()}
    known: dict[str, Any] = {
        "folder": desk / "new",
        "fusion": load_fusion(ARTIFACT),
        "pipe": pipe,
        "requests": [(ARTIFACT, "a fox"), (ARTIFACT, "a fox asleep")],
    }
    known["folder"].mkdir()
    for name in ("fox", "ink"):
        shutil.copy(f"{name}.safetensors", known["folder"])
    for arguments in commands(page):
        if arguments[0] in ("profile", "catalogue"):  # what the blocks of Python open
            assert klora(*arguments).exit_code == 0
    for block in blocks(page, "python"):
        exec(compile(block, named(page), "exec"), known)
    if "handle" in known:
        known["handle"].remove()
    assert all(torch.equal(value, before[n]) for n, value in pipe.unet.named_parameters())


@pytest.mark.usefixtures("short_page")
@pytest.mark.parametrize("page", [p for p in WITH_CODE if commands(p)], ids=named)
def test_commands_run_as_printed(page: Path, desk: Path) -> None:
    skip_without_its_library(page)
    for name, table in re.findall(r"^```csv title=\"(.*?)\"\n(.*?)^```", page.read_text(), FLAGS):
        (desk / name).write_text(table)
    for arguments in commands(page):
        if arguments[0] == "compile":
            (desk / arguments[arguments.index("-o") + 1]).unlink(missing_ok=True)
        if arguments[0] == "sign":
            (desk / f"{ARTIFACT}.sig").unlink(missing_ok=True)
        if "--search" in arguments and available() is not None:
            continue  # its judge needs the extra evaluate
        result = klora(*arguments, *FOR_A_TINY_MODEL.get(arguments[0], ()))
        assert result.exit_code == 0, (arguments, result.output)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_linked_file_exists(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", page.read_text())
    assert [link for link in links if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_file_named_in_code_style_exists(page: Path) -> None:
    """Paths such as `klora_compile/reading`."""
    folders = ("", "klora_compile", "runtime", "runtime/klora_runtime")
    names = re.findall(r"`((?:[a-z_]+/)+[\w.-]*)`", page.read_text())
    names = [name for name in names if not name.startswith("out/")]
    assert [n for n in names if not any((ROOT / f / n).exists() for f in folders)] == []


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_test_named_as_proof_exists(page: Path) -> None:
    for module, function in re.findall(r"`(test_\w+)(?:::(test_\w+))?`", page.read_text()):
        (path,) = (ROOT / "tests").rglob(f"{module}.py")
        assert not function or f"def {function}(" in path.read_text()


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_option_named_exists(page: Path) -> None:
    """Of commands in blocks, and of `--option` in code style beside a command's name."""
    for command, rest in re.findall(r"`klora (\w+) ([^`]*)`", page.read_text()):
        rule = re.search(r"--rule (\S+)", rest)
        asked = [command, *(["--rule", rule[1]] if rule and rule[1] in RULES else []), "--help"]
        text = CliRunner().invoke(main, asked).output
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in text, (command, option)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_make_target_exists(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for prefix, parts in re.findall(r"addprefix ([a-z-]+),([a-z ]+)", makefile):
        targets |= {prefix + part for part in parts.split()}
    text = "\n".join([*re.findall(r"`(make [^`]*)`", page.read_text()), *blocks(page, "sh")])
    for line in re.findall(r"^make ([a-z -]+)", text, re.MULTILINE):
        assert set(line.split()) <= targets, line


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_code_with_a_title_is_in_that_file(page: Path) -> None:
    for file, code in re.findall(r"^```python title=\"(.*?)\"\n(.*?)^```", page.read_text(), FLAGS):
        assert code in (ROOT / file).read_text()


def test_commits_that_pages_name_are_in_the_history() -> None:
    told = re.compile(r"^The commit `(\w+)`,\s\*(.*?)\*,", FLAGS)
    commits = [pair for page in PAGES for pair in told.findall(page.read_text())]
    assert len(commits) == 5
    for commit, subject in commits:
        command = ["git", "-C", str(ROOT), "log", "-1", "--format=%s", commit]
        try:
            found = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            pytest.skip("the history of the repository is absent")
        assert found.stdout.strip() == subject


def test_every_rule_has_its_lines() -> None:
    page = (ROOT / "docs" / "reference" / "rules.md").read_text()
    assert set(re.findall(r"^\| `([a-z+-]+)[^`]*` \|", page, re.MULTILINE)) >= set(RULES)


def test_the_search_finds_what_is_wrong() -> None:
    """Each search above meets something in the pages at hand."""
    text = "\n".join(page.read_text() for page in PAGES)
    for pattern in (r"^```python", r"^klora \w+", r"`test_\w+", r"`make \w+", r"\]\([a-z./-]+\)"):
        assert re.search(pattern, text, re.MULTILINE), pattern
