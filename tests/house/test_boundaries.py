"""Who may import whom, and what importing costs."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest
from support.every_form import fusion_of_every_form
from support.lora_files import GOLDEN, ROOT, run_python

from klora_runtime import save_fusion

COMPILE, RUNTIME = ROOT / "klora_compile", ROOT / "runtime" / "klora_runtime"
SOURCES = sorted([*COMPILE.rglob("*.py"), *RUNTIME.rglob("*.py")])
#: What the runtime may import besides the standard library and itself.
RUNTIME_NEEDS = {"torch", "safetensors"}
#: What it asks where that is installed, and does without where it is not; and what it asks for by
#: name when a name on the Hub needs it.
OPTIONAL = {"psutil", "huggingface_hub", "model_signing"}
HEAVY = ["torch", "numpy", "safetensors", "diffusers", "transformers", "peft", "matplotlib"]


def imported_modules(path: Path) -> set[str]:
    """Everything that a file imports, anywhere in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            names |= {str(arg.value) for arg in node.args if isinstance(arg, ast.Constant)}
    return names


def imports(path: Path) -> set[str]:
    """Top-level names of everything that a file imports, anywhere in it."""
    return {name.partition(".")[0] for name in imported_modules(path)}


def loaded_after(*codes: str) -> list[set[str]]:
    """Names of all modules in a new process after each piece of code in turn."""
    result = run_python("".join(f"{code}\nimport sys\nprint(*sys.modules)\n" for code in codes))
    assert result.returncode == 0, result.stderr
    return [set(line.split()) for line in result.stdout.splitlines()[-len(codes) :]]


def test_the_rooms_are_where_they_are_expected() -> None:
    assert len(SOURCES) > 25
    assert {"torch", "klora_runtime", "math"} <= imports(COMPILE / "measuring" / "measure.py")


@pytest.mark.parametrize(
    "path", sorted(RUNTIME.rglob("*.py")), ids=lambda path: str(path.relative_to(RUNTIME))
)
def test_the_runtime_imports_torch_safetensors_and_the_standard_library(path: Path) -> None:
    foreign = imports(path) - sys.stdlib_module_names - {"klora_runtime"} - OPTIONAL
    assert foreign <= RUNTIME_NEEDS, f"{path.name} imports {foreign - RUNTIME_NEEDS}"


PACK = ROOT / "examples" / "comfyui"
#: What the nodes may import besides the standard library, klora's runtime and their own modules:
#: what ComfyUI is, and what it brings.
NODES_NEED = {"torch", "PIL", "comfy", "comfy_api", "folder_paths"}


def foreign_of_nodes(source: str) -> set[str]:
    """What nodes import and should not: the compiler, the room of pipelines, other libraries."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module or "")
    known = NODES_NEED | sys.stdlib_module_names | {"klora_runtime"}
    pipelines = {name for name in names if name.startswith("klora_runtime.pipeline")}
    return pipelines | {name for name in names if name.partition(".")[0] not in known}


def test_nodes_for_comfyui_need_the_runtime_alone_and_no_pipeline() -> None:
    files = sorted(PACK.glob("*.py"))
    assert len(files) > 5
    assert {path.name: own for path in files if (own := foreign_of_nodes(path.read_text()))} == {}
    wrong = "import diffusers\nfrom klora_compile import x\nfrom klora_runtime.pipeline import y"
    assert foreign_of_nodes(wrong) == {"diffusers", "klora_compile", "klora_runtime.pipeline"}


def test_each_room_loads_what_it_needs_and_no_more(tmp_path: Path) -> None:
    """Layers, a plain artifact, a compressed one, the pipeline's room, the compiler: in turn."""
    path = tmp_path / "small.klora.safetensors"
    save_fusion(fusion_of_every_form(), path)
    layers, plain, compressed, pipeline, compiler = loaded_after(
        "import klora_runtime.layers.live_fusion, klora_runtime.layers.claim\n"
        "import klora_runtime.layers.choice",
        "from klora_runtime import load_fusion, save_fusion\n"
        f"save_fusion(load_fusion({str(GOLDEN)!r}, check='full'), {str(tmp_path / 'a')!r})",
        f"save_fusion(load_fusion({str(path)!r}, check='full'), {str(tmp_path / 'b')!r})",
        "import klora_runtime.pipeline.handle",
        "import klora_compile.compiler",
    )
    codec = {f"klora_runtime.artifact.q.{name}" for name in ("codec", "bitstream", "values")}
    assert "torch" in layers
    assert not [name for name in layers if name.startswith("klora_runtime.pipeline")]
    assert not codec & plain
    assert codec <= compressed
    assert not pipeline & {"diffusers", "transformers", "peft", "klora_compile", "click"}
    assert "klora_runtime" in compiler
    assert not compiler & {"diffusers", "transformers", "peft", "matplotlib"}


@pytest.mark.parametrize(
    "code",
    [
        "import klora_compile, klora_runtime",
        "import klora_compile.cli",
        "from klora_compile.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "import sys\nsys.stdout.flush()",
    ],
    ids=["packages", "cli", "help"],
)
def test_importing_is_cheap(code: str) -> None:
    assert not loaded_after(code)[0] & set(HEAVY)


#: Of the artifact's room: what needs no numbers, and so no torch.
WITHOUT_NUMBERS = [
    "blocks", "canonical", "checks", "digests", "document", "dtypes", "factors", "numbers",
    "palette", "q.form", "replacing", "safetensors_file", "schedule", "schedule_html", "timeline",
]  # fmt: skip


def test_an_artifact_is_read_and_checked_where_there_is_no_torch() -> None:
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['torch', 'numpy', 'safetensors'])  # None: not there\n"
        "from importlib import import_module\n"
        "from klora_runtime.artifact.document import document_text\n"
        "from klora_runtime.artifact.whole_document import load_whole_document\n"
        f"for name in {WITHOUT_NUMBERS}:\n"
        "    import_module(f'klora_runtime.artifact.{name}')\n"
        "document = load_whole_document(sys.argv[1])\n"
        "assert document_text(document)\n"
        "print(repr(document), document._repr_html_())\n"
    )
    result = run_python(code, GOLDEN)
    assert result.returncode == 0, result.stderr
    assert "switching" in result.stdout


def test_the_codec_of_compressed_numbers_has_one_door() -> None:
    others = [path for path in RUNTIME.rglob("*.py") if path.parent.name != "q"]
    doors = {name for path in others for name in imported_modules(path) if ".artifact.q" in name}
    assert doors == {"klora_runtime.artifact.q.codec", "klora_runtime.artifact.q.form"}


def test_no_package_of_the_name_runtime_is_importable() -> None:
    """It would collide with any other wheel's."""
    assert not (ROOT / "runtime" / "__init__.py").exists()


#: The files that may load a pickle, as weights only: a user's, and an installed package's.
PICKLE_READER = ROOT / "klora_compile" / "reading" / "files" / "torch_file.py"
WEIGHTS_READER = ROOT / "klora_compile" / "judging" / "networks.py"


def risky_names(source: str) -> set[str]:
    """What in ``source`` could run code that a file brings along."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {ast.unparse(node) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
    return names & {"torch.load", "pickle", "marshal", "shelve", "dill", "eval", "exec"}


def test_nothing_unpickles_or_evaluates() -> None:
    found = {path: names for path in SOURCES if (names := risky_names(path.read_text()))}
    assert found == {PICKLE_READER: {"torch.load", "pickle"}, WEIGHTS_READER: {"torch.load"}}


@pytest.mark.parametrize("path", [PICKLE_READER, WEIGHTS_READER], ids=lambda path: path.stem)
def test_pickles_are_only_read_as_weights(path: Path) -> None:
    nodes = list(ast.walk(ast.parse(path.read_text())))
    loads = [n for n in nodes if isinstance(n, ast.Call) and ast.unparse(n.func) == "torch.load"]
    assert len(loads) == 1
    settings = {word.arg: ast.unparse(word.value) for word in loads[0].keywords}
    assert settings["weights_only"] == "True"
    uses = {ast.unparse(node) for node in nodes if isinstance(node, ast.Attribute)}
    assert {use for use in uses if use.startswith("pickle.")} <= {"pickle.UnpicklingError"}


def test_the_search_for_risky_names_finds_them() -> None:
    assert risky_names("import torch\ntorch.load('a')") == {"torch.load"}
    assert risky_names("from pickle import loads") == {"pickle"}
    assert risky_names("import numpy, pickle") == {"pickle"}
    assert risky_names("load = eval") == {"eval"}
