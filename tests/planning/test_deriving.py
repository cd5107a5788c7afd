"""What a rule derives does not depend on the number of threads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from support.lora_files import random_pair

from klora_compile.planning.deriving import Derivation, derive
from klora_compile.reading.layers import Layer
from klora_compile.rules.rule import Derived


def test_a_rule_derives_on_one_thread() -> None:
    layer = Layer.lora("unet", "a", *random_pair(4, 4, 2), alpha=2.0)
    layers = {layer.name: layer}
    threads = []

    def one(slot: str, layers: dict[str, Layer]) -> Derived:
        threads.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return Derived(layers["content"].delta)

    rule: Any = SimpleNamespace(derive=one)
    job = Derivation("style", layer.name, {"content": layer, "style": layer})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        derive({"content": layers, "style": layers}, [job], rule)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert threads == [(1, False)]
