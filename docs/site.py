"""What mkdocs adds to the pages: CONTRIBUTING.md as one of them, and links where pages name each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any  # mkdocs' own nouns; only the site has it

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
NAMED = re.compile(r"(?<!\[)`(?:docs/([\w-]+)\.md|(CONTRIBUTING)\.md)`(?!\])")


def on_files(files: Any, config: Any) -> Any:
    """Adds the page `contributing.md`."""
    files.append(File.generated(config, "contributing.md", abs_src_path=str(ROOT / "CONTRIBUTING.md")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`docs/export.md` in a page, as code, becomes a link to that page, which the strict build then checks."""
    return NAMED.sub(lambda found: f"[{found[0]}]({(found[1] or found[2]).lower()}.md)", markdown)
