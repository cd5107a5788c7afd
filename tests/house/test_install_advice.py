"""Whatever tells how to get klora names the one command that works: no package index has it."""

from __future__ import annotations

import re
import runpy
import tomllib

from support.lora_files import ROOT

from klora_runtime.__about__ import INSTALL, install_command

#: What is in these folders is no part of the project, or states other commands on purpose.
_LEFT_OUT = {".venv", "out", "dist", "build", "site", "tests", "__about__.py"}
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
_FILES = [
    path
    for pattern in ("*.md", "*.py", "Makefile", "*.toml")
    for path in sorted(ROOT.rglob(pattern))
    if not _LEFT_OUT & set(path.relative_to(ROOT).parts)
]


def advices(text: str) -> list[str]:
    """The commands in a text that install klora: not those of another library."""
    commands = re.findall(r"pip install (?!\{)[^\n`\"]*", text)
    return [command for command in commands if re.search(r"klora|'|\./|\s\.", command)]


def test_every_advice_installs_both_distributions() -> None:
    found = [(file, command) for file in _FILES for command in advices(file.read_text("utf-8"))]
    assert len(found) > 2
    for file, command in found:
        if command.startswith("pip install './runtime[hub]'"):
            continue  # what the recipient of an artifact needs
        match = re.match(r"pip install \./runtime '\.\[([a-z,]+)\]'", command)
        assert match, f"{file}: {command}"
        extras = match[1].split(",")
        assert match[0] == install_command(*extras)
        assert set(extras) <= set(_PROJECT["optional-dependencies"])


def test_the_readme_names_the_command() -> None:
    assert INSTALL in (ROOT / "README.md").read_text()
    assert INSTALL == "pip install ./runtime '.[plot,sample]'"


def test_the_search_finds_advice() -> None:
    assert advices("run pip install 'klora[plot]'") == ["pip install 'klora[plot]'"]
    assert advices("pip install klora\npip install .") == ["pip install klora", "pip install ."]
    assert advices("pip install transformers, or pip install {libraries}") == []


def test_a_readme_elsewhere_links_to_the_repository_or_not_at_all() -> None:
    readable = runpy.run_path(str(ROOT / "runtime" / "hatch_build.py"))["readable_anywhere"]
    text = "![A map](docs/map.png) [form](a.md#b), [paper](https://arxiv.org/abs/1), [up](#top)"
    assert readable(text, None) == " form, [paper](https://arxiv.org/abs/1), [up](#top)"
    assert readable(text, "https://example.org/klora") == (
        "![A map](https://example.org/klora/raw/HEAD/docs/map.png) "
        "[form](https://example.org/klora/blob/HEAD/a.md#b), "
        "[paper](https://arxiv.org/abs/1), [up](#top)"
    )
