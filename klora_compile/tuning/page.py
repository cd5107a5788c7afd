"""The page as a whole: built of its parts, and served."""

from __future__ import annotations

import socket
from importlib.resources import files
from pathlib import Path
from typing import Any

import gradio as gr

from klora_compile.tuning.events import Events
from klora_compile.tuning.layout import lay_out
from klora_compile.tuning.repeating import ENDING
from klora_runtime.errors import KloraError, shown

_CSS = (files(__package__) / "page.css").read_text(encoding="utf-8")
#: Nothing is fetched from elsewhere, so the fonts are the reader's own.
_THEME = gr.themes.Default(
    primary_hue="blue",
    spacing_size="sm",
    font=("system-ui", "sans-serif"),
    font_mono=("ui-monospace", "monospace"),
)
#: Seconds between looks for old pictures among Gradio's temporary files, and their greatest age.
_CLEANED = (600, 3600)


def built(events: Events) -> Any:
    """Return the page with these events."""
    names = [Path(file).stem for file in events.desk.files]
    title = f"klora tune: {' × '.join(names)}"
    with gr.Blocks(
        title=title, analytics_enabled=False, fill_width=True, delete_cache=_CLEANED
    ) as page:
        at = lay_out(events.controls, events.first, title, f"{'-'.join(names)}{ENDING}")
        events.connect(page, at)
    return page


def serve(page: Any, host: str, port: int | None, *, opened: bool) -> str:
    """Serve a page from a thread of its own.

    Args:
        page: the page.
        host: the address to listen at.
        port: the port; None for the first free one from 7860 on.
        opened: whether to open it in the user's browser.

    Returns:
        Its address.

    Raises:
        KloraError: the address or the port cannot be used.
    """
    try:
        socket.create_server((host, port or 0)).close()
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            inbrowser=opened,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            show_error=False,
            run_history=False,
            mcp_server=False,
            ssr_mode=False,
            footer_links=[],
            theme=_THEME,
            css=_CSS,
        )
    except OSError as error:
        where = host if port is None else f"{host}:{port}"
        raise KloraError(
            f"no page can be served at {shown(where)}. Name another --host or --port."
        ) from error
    return str(address)
