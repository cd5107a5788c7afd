"""klora's nodes for ComfyUI: load an artifact, apply it to a model, look at its schedule."""

from __future__ import annotations

from typing import Any


async def comfy_entrypoint() -> Any:
    """Return the extension; ComfyUI calls this when it loads the folder."""
    from .nodes import KloraExtension

    return KloraExtension()
