"""A hook of MkDocs: pages that lie outside of docs/, so that nothing stands twice.

README.md is the front page, CONTRIBUTING.md, CHANGELOG.md and SECURITY.md are pages, and so is the benchmark's report,
which is made from its rows.  Links are written as they work in the repository; here they become those of the site.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")  # the path of [text](path#anchor), neither an address nor an anchor


def on_files(files: Files, config: Any) -> Files:
    """Adds what lies elsewhere in the repository."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, "LICENSE", abs_src_path=str(ROOT / "LICENSE")))
    sys.path.insert(0, str(ROOT))  # the benchmark is not installed
    from bench.report import web_page

    files.append(File.generated(config, "report.html", content=web_page()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of a file of the repository become links of the page."""
    source = Path(page.file.abs_src_path).resolve().relative_to(ROOT)
    here = Path(page.file.src_uri)

    def moved(match: re.Match[str]) -> str:
        target = (ROOT / source.parent / match[1]).resolve().relative_to(ROOT).as_posix()
        target = PAGES.get(target, target.removeprefix("docs/"))
        return "../" * (len(here.parts) - 1) + target

    return LINK.sub(moved, markdown)
