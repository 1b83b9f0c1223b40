"""What docs/libraries.md tells of each library, as code: the tests run it, and pipelines take their recipes from it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[2] / "docs" / "libraries.md"


def snippets(library: str) -> list[str]:
    """The code of a library's section, block by block.  KeyError where there is none."""
    sections = re.split(r"^## (.+)$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    texts = dict(zip(sections[1::2], sections[2::2], strict=True))
    return re.findall(r"^```python\n(.*?)^```", texts[library], re.MULTILINE | re.DOTALL)


def run(library: str) -> dict[str, Any]:
    """The names that a library's section leaves behind, as a reader would run it from top to bottom."""
    found: dict[str, Any] = {"__name__": library}
    for number, text in enumerate(snippets(library)):
        exec(compile(text, f"{PAGE.name}, {library}, block {number}", "exec"), found)
    return found
