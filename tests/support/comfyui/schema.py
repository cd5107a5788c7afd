"""The double of ``comfy_api.latest``: enough of the V3 schema to describe and to run a node."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any


@dataclass
class Input:
    io_type: str
    id: str
    optional: bool = False
    default: Any = None
    options: list[str] | None = None
    min: float | None = None
    max: float | None = None
    step: float | None = None
    tooltip: str | None = None


@dataclass
class Output:
    io_type: str
    display_name: str | None = None


@dataclass
class Schema:
    node_id: str
    display_name: str
    category: str
    description: str = ""
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)


class NodeOutput:
    def __init__(self, *args: Any) -> None:
        self.args = args

    @property
    def result(self) -> tuple[Any, ...]:
        return self.args


class ComfyNode:
    """The base of nodes."""

    @classmethod
    def GET_SCHEMA(cls) -> Schema:
        found: Schema = cls.define_schema()  # type: ignore[attr-defined]
        return found


class ComfyExtension:
    """The base of extensions."""

    async def on_load(self) -> None:
        """Called when the extension is loaded."""


def custom(io_type: str) -> Any:
    """Return a type of wire, with its inputs and outputs."""

    def input_(id: str, **settings: Any) -> Input:
        return Input(io_type, id, **settings)

    def output(**settings: Any) -> Output:
        return Output(io_type, **settings)

    return SimpleNamespace(Input=input_, Output=output)


_TYPES = {
    "Boolean": "BOOLEAN",
    "Clip": "CLIP",
    "Combo": "COMBO",
    "Float": "FLOAT",
    "Image": "IMAGE",
    "Int": "INT",
    "Model": "MODEL",
    "String": "STRING",
}

io = SimpleNamespace(
    ComfyNode=ComfyNode,
    Custom=custom,
    NodeOutput=NodeOutput,
    Schema=Schema,
    **{name: custom(io_type) for name, io_type in _TYPES.items()},
)
