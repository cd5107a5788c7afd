"""Build hook of both distributions: fills in metadata from `klora_runtime/__about__.py`.

Both source distributions carry the two files, so each builds alone.
"""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ABOUT = Path(__file__).parent / "klora_runtime" / "__about__.py"

#: A picture or a link of Markdown to a file of the repository: neither an address nor an anchor.
_LOCAL = re.compile(r"(?P<picture>!?)\[(?P<text>[^]]*)\]\((?P<path>(?![a-z]+:|#)[^)]+)\)")


class Metadata(MetadataHookInterface):
    """Fills the dynamic fields of ``[project]``."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add the links; for the compiler also the requirements and the README.

        Args:
            metadata: the table ``[project]``, with the version; changed in place.
        """
        repository = runpy.run_path(str(ABOUT))["REPOSITORY"]
        metadata["urls"] = {} if repository is None else {"Repository": repository}
        if "requires" in self.config:
            metadata["dependencies"] = [
                line.format(version=metadata["version"]) for line in self.config["requires"]
            ]
        if "readme" in self.config:
            text = Path(self.root, self.config["readme"]).read_text(encoding="utf-8")
            metadata["readme"] = {
                "content-type": "text/markdown",
                "text": readable_anywhere(text, repository),
            }


def readable_anywhere(text: str, repository: str | None) -> str:
    """Return a README whose links and pictures also work outside the repository.

    Args:
        text: Markdown.
        repository: the address of the repository's page. Without one, links become plain text and
            pictures are left out.
    """

    def replaced(match: re.Match[str]) -> str:
        if repository is None:
            return "" if match["picture"] else match["text"]
        kind = "raw" if match["picture"] else "blob"
        return f"{match['picture']}[{match['text']}]({repository}/{kind}/HEAD/{match['path']})"

    return _LOCAL.sub(replaced, text)
