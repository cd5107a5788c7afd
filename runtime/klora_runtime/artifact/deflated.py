"""JSON in the metadata of a file, compressed: ``deflate:`` and the stream in base64."""

from __future__ import annotations

import base64
import binascii
import zlib

from klora_runtime.artifact.safetensors_file import MAX_HEADER_BYTES

_DEFLATED = "deflate:"


def deflated(text: str) -> str:
    """Return a text compressed."""
    return _DEFLATED + base64.b64encode(zlib.compress(text.encode(), 9)).decode()


def inflated(text: str, limit: int = MAX_HEADER_BYTES) -> str:
    """Return a text of a file's metadata, decompressed if necessary.

    Args:
        limit: greatest number of bytes of the decompressed text.

    Raises:
        ValueError: the text is damaged, or longer than the limit.
    """
    if not text.startswith(_DEFLATED):
        return text
    try:
        stream = zlib.decompressobj()
        raw = base64.b64decode(text.removeprefix(_DEFLATED), validate=True)
        found = stream.decompress(raw, limit)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"its compressed text is damaged: {error}") from error
    if not stream.eof or stream.unused_data:
        raise ValueError(f"its compressed text is cut, or longer than {limit} bytes")
    return found.decode("ascii")
