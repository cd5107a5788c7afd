"""What is timed in both trees. A new case is a new row of :data:`CASES`.

Snippets and commands see only what both trees have: the command line and the public names of
``klora_compile`` and ``klora_runtime``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmark.loras import write_kohya, write_pair


@dataclass(frozen=True)
class Case:
    """A row of the table. It has either ``timed`` or ``command``.

    Snippets of Python see two paths, ``inputs`` (folder of :attr:`inputs`) and ``own`` (folder of
    their tree, the same for all cases), and the names of earlier snippets of the case.
    """

    name: str
    what: str
    """Description for people."""
    aim: float
    """How many times faster than before it should be."""
    inputs: Callable[[Path], object] = lambda folder: None
    """Writes files into a folder, once for both trees; cases may share them."""
    setup: str = ""
    """Python that each tree runs once, untimed."""
    timed: str = ""
    """Python that each tree runs once a round, in the process of the setup."""
    command: str = ""
    """Arguments of ``klora`` that each tree runs once a round, in a process of its own.
    ``{inputs}`` and ``{own}`` are replaced."""
    facts: str = "{}"
    """Python expression, after the last round: name -> number, printed beside the times."""


def _sdxl_fifth(folder: Path) -> None:
    """Write ``content.safetensors`` and ``style.safetensors``: 144 layers of SDXL, rank 32."""
    if not (folder / "style.safetensors").exists():
        write_pair("sdxl", 0.2, 32, folder)


def _small(folder: Path) -> None:
    """Write a pair of rank 4 into the folder ``small``."""
    if not (folder / "small").exists():
        (folder / "small").mkdir()
        write_pair("sdxl", 0.2, 4, folder / "small")


def _kohya(folder: Path) -> None:
    """Write ``kohya.safetensors``: all 722 layers of SDXL, rank 4, with an alpha each."""
    if not (folder / "kohya.safetensors").exists():
        write_kohya("sdxl", 1.0, 4, folder / "kohya.safetensors")


_PAIR = "{inputs}/small/content.safetensors {inputs}/small/style.safetensors"
_ARTIFACT = "{own}/small.klora.safetensors"
_COMPILE = f"compile {_PAIR} --device cpu --force -o {_ARTIFACT}"
_RUN_ONCE = f"""
from contextlib import redirect_stdout
from io import StringIO
from klora_compile.cli import main
with redirect_stdout(StringIO()):
    main({_COMPILE!r}.format(inputs=inputs, own=own).split(), standalone_mode=False)
"""

_OPEN = "from klora_compile.reading.adapter import open_adapter"
_OPEN_TWENTY = """
for _ in range(20):
    with open_adapter(inputs / {name!r}):
        pass
"""

_COMPILED = """
from klora_compile import compile_fusion, compress
from klora_runtime import load_fusion, save_fusion
plain, small = own / "sdxl-fifth.klora.safetensors", own / "sdxl-fifth-0.01.klora.safetensors"
if not plain.exists():
    pair = (inputs / "content.safetensors", inputs / "style.safetensors")
    save_fusion(compile_fusion(*pair), plain)
"""
_COMPRESSED = """
if not small.exists():
    save_fusion(compress(load_fusion(plain), 0.01), small)
"""
_ERRORS = """{
    "bytes": small.stat().st_size,
    "largest error": max(
        stored.quantised.error
        for entry in load_fusion(small).entries
        for stored in entry.factors.values()
    ),
}"""

#: Name -> case, in the order of the table.
CASES: Mapping[str, Case] = {
    case.name: case
    for case in (
        Case(
            "compress",
            "compress a fifth of an SDXL pair, 0.01",
            5.0,
            inputs=_sdxl_fifth,
            setup=_COMPILED + "fusion = load_fusion(plain)",
            timed="save_fusion(compress(fusion, 0.01), small, overwrite=True)",
            facts=_ERRORS,
        ),
        Case(
            "load-compressed",
            "load_fusion of its artifact",
            10.0,
            inputs=_sdxl_fifth,
            setup=_COMPILED + _COMPRESSED,
            timed="load_fusion(small)",
            facts=_ERRORS,
        ),
        Case(
            "load",
            "load_fusion of an artifact of rank 4 that is not compressed",
            2.7,
            inputs=_small,
            setup=_RUN_ONCE + "from klora_runtime import load_fusion",
            timed=f"for _ in range(20): load_fusion({_ARTIFACT!r}.format(own=own))",
        ),
        Case(
            "open",
            "open and check a LoRA of 144 layers, 288 keys",
            3.0,
            inputs=_small,
            setup=_OPEN,
            timed=_OPEN_TWENTY.format(name="small/content.safetensors"),
        ),
        Case(
            "open-kohya",
            "open and check a LoRA of 722 layers, 2,166 keys",
            3.0,
            inputs=_kohya,
            setup=_OPEN,
            timed=_OPEN_TWENTY.format(name="kohya.safetensors"),
        ),
        *(
            Case(name, what, aim, inputs=_small, setup=_RUN_ONCE, command=command)
            for name, what, aim, command in (
                ("inspect", "klora inspect of an artifact", 5.0, f"inspect {_ARTIFACT}"),
                ("inspect-lora", "klora inspect of a LoRA", 5.0, f"inspect {_PAIR.split()[0]}"),
                ("verify", "klora verify of an artifact alone", 5.0, f"verify {_ARTIFACT}"),
                ("card", "klora card", 5.0, f"card {_ARTIFACT} -o -"),
                ("compile", "klora compile of a measured pair of rank 4", 2.0, _COMPILE),
            )
        ),
    )
}
