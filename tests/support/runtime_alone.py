"""Applies an artifact with torch alone; prints what the process imported.

Run as ``python -I runtime_alone.py GOLDEN`` where `klora_runtime` is installed and nothing else of
klora. It imports no test module: everything it needs is here.
"""

from __future__ import annotations

import sys
from typing import Any

#: What people's machines may lack. The finder raises before any of it can be found.
BLOCKED = {
    "numpy",
    "click",
    "tqdm",
    "diffusers",
    "transformers",
    "peft",
    "safetensors",
    "klora_compile",
}


class _Refusing:
    """A finder of modules, the first one, that refuses some."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)


if __name__ == "__main__":  # a test that imports this for its path may import the rest
    sys.meta_path.insert(0, _Refusing)  # type: ignore[arg-type]

import torch  # noqa: E402
from torch import nn  # noqa: E402

from klora_runtime import apply_fusion  # noqa: E402

STEPS = 4


class Attention(nn.Module):
    """Projections of the golden artifact's widths."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(4, 3) for _ in range(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        weights = torch.softmax(self.to_q(tokens) @ self.to_k(tokens).mT, dim=-1)
        return weights @ self.to_v(tokens)


def tree(path: str, leaf: nn.Module) -> nn.Module:
    """Modules inside each other, named by a dotted path, around a leaf."""
    for name in reversed(path.split(".")):
        outer = nn.Module()
        outer.add_module(name, leaf)
        leaf = outer
    return leaf


class Denoiser(nn.Module):
    """A convolution, then attention over its four positions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(2, 2, 3, padding=1)
        self.down_blocks = tree("0.attentions.0.transformer_blocks.0.attn1", Attention())

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        attention = self.down_blocks.get_submodule("0.attentions.0.transformer_blocks.0.attn1")
        tokens = self.conv_in(sample).flatten(2)
        return nn.functional.pad(attention(tokens), (0, 1)).reshape(sample.shape)


class Scheduler:
    """Steps of equal size."""

    order = 1

    def set_timesteps(self, count: int) -> None:
        self.timesteps = torch.linspace(1.0, 1.0 / count, count)

    def scale_model_input(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return sample

    def step(
        self, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor
    ) -> torch.Tensor:
        return sample - output / len(self.timesteps)


class Pipeline:
    """A denoiser, a text encoder and a scheduler, in the roles that diffusers gives them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.unet, self.scheduler = Denoiser(), Scheduler()
        self.text_encoder = tree("encoder.layers.0.mlp.fc1", nn.Linear(4, 3))

    def __call__(self, sample: torch.Tensor, steps: int) -> list[torch.Tensor]:
        """The denoiser's output at each step."""
        self.scheduler.set_timesteps(steps)
        outputs = []
        for timestep in self.scheduler.timesteps:
            scaled = self.scheduler.scale_model_input(sample, timestep)
            outputs.append(self.unet(scaled, timestep))
            sample = self.scheduler.step(outputs[-1], timestep, sample)
        return outputs


def outputs_under(pipe: Pipeline, sample: torch.Tensor, artifact: str, mode: str) -> Any:
    """The pipeline's outputs with an artifact on it; after them it is bare again."""
    with apply_fusion(pipe, artifact, mode=mode) as handle:
        assert handle.report().mode == mode
        return pipe(sample, STEPS)


@torch.no_grad()
def main(artifact: str) -> None:
    pipe = Pipeline()
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    sample = torch.randn(1, 2, 2, 2)
    bare = pipe(sample, STEPS)
    merged = outputs_under(pipe, sample, artifact, "merge")
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(map(torch.equal, pipe(sample, STEPS), bare))
    torch.testing.assert_close(outputs_under(pipe, sample, artifact, "branch"), merged)
    assert not any(map(torch.allclose, merged, bare))
    print(*sorted({name.partition(".")[0] for name in sys.modules}))


if __name__ == "__main__":
    main(sys.argv[1])
