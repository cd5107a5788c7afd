"""A device of a type that only torch knows, built in C++: what klora does runs there.

Torch's dispatcher sends every operation on its tensors to it, refuses tensors of two places, and
refuses float64 where the device has none.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from support.lora_files import run_python
from support.other_backend import build, compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    command = compiler()
    if command is None:
        pytest.skip("no C++ compiler here, or no headers of torch")
    path = tmp_path_factory.mktemp("device") / "other.so"
    build(command, path)
    return path


def test_pairs_are_compiled_and_both_modes_act_there(library: Path, tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module('support.on_other_backend', run_name='__main__')"
    found = run_python(code, library, tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]


@pytest.mark.slow  # imports diffusers anew
@pytest.mark.parametrize(
    "command",
    [
        "race --steps 2 --model sd1-tiny --row merge --row branch",
        "attach --model sd1-tiny",
        "measuring --share 0.001",
    ],
)
def test_the_scripts_that_measure_run_there(command: str, library: Path) -> None:
    """As they are, so that they run on a GPU too on the day when one is there."""
    code = (
        "import sys; from pathlib import Path; from support.other_backend import install; "
        "from benchmark.__main__ import main; install(Path(sys.argv[1])); main(sys.argv[2].split())"
    )
    found = run_python(code, library, f"{command} --device other --rounds 1 --rank 2")
    assert found.returncode == 0, found.stderr[-3000:]
    assert "OTHER 0" in found.stdout
