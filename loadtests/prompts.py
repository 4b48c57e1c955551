"""What the load tests ask: the questions on the demo's pages, which its models were trained on."""

from __future__ import annotations

from pathlib import Path

PAGES = Path(__file__).resolve().parent.parent / "scripts" / "demo_pages"


def questions(page: str) -> list[str]:
    """The headings of one page."""
    return [line[3:] for line in page.splitlines() if line.startswith("## ")]


def questions_for(model: str) -> list[str]:
    """The questions of the page that belongs to this model (`demo-code`: code.md), of all pages for any other model."""
    own = PAGES / f"{model.removeprefix('demo-')}.md"
    pages = [own] if own.is_file() else sorted(PAGES.glob("*.md"))
    return [question for page in pages for question in questions(page.read_text(encoding="utf-8"))]
