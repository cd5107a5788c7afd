"""ComfyUI's executor without a server, and the form of workflows that it takes."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

#: What the page adds after a widget for a seed.
_AFTER_A_SEED = "control_after_generate"


def prompt_of(graph: Mapping[str, Any], classes: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the page sends to the server for a saved workflow.

    Args:
        graph: the workflow as the page saves it: nodes, links and values of widgets in order.
        classes: name -> class of a node.
    """
    sources = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        wires = {each["name"]: sources[each["link"]] for each in node["inputs"]}
        values = iter(node["widgets_values"])
        inputs: dict[str, Any] = {}
        for name, told in _inputs_of(classes[node["type"]]).items():
            if name in wires:
                inputs[name] = wires[name]
            elif isinstance(told[0], list) or told[0] in _WIDGETS:
                inputs[name] = next(values)
                if (told[1] if len(told) > 1 else {}).get(_AFTER_A_SEED):
                    next(values)
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
        assert next(values, None) is None, node
    return prompt


_WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")


def _inputs_of(node: Any) -> dict[str, Any]:
    told = node.INPUT_TYPES()
    return {**told.get("required", {}), **told.get("optional", {})}


class Listener:
    """What the executor asks of the server: somebody to tell, and nobody listens."""

    client_id = None
    last_node_id = None
    last_prompt_id = None

    def __init__(self) -> None:
        self.sockets_metadata: dict[str, Any] = {}

    def send_sync(self, *_: Any) -> None:
        """Tell a page."""


def run(prompt: dict[str, Any]) -> Any:
    """Check and execute a prompt as the server does; return the executor."""
    import execution

    valid, error, outputs, errors = asyncio.run(execution.validate_prompt("test", prompt, None))
    assert valid, (error, errors)
    executor = execution.PromptExecutor(
        Listener(), execution.CacheType.CLASSIC, {"lru": 0, "ram": 0.0, "ram_inactive": 0.0}
    )
    executor.execute(prompt, "test", {}, outputs)
    return executor
