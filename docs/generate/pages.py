"""Which file of the repository is which page of the site, and links between them."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2]

# How-to pages in the order in which a reader needs them; a page of docs/ that is not named here or
# below comes after them.
HOW_TO = (
    *("data", "training", "checkpoints", "convert", "plan", "launch", "reinforcement", "rewards"),
    *("evaluation", "scaling", "vision", "engine", "serve"),
)
_START = ("install", "concepts", "coming_from")
_ELSEWHERE = {*_START, "troubleshooting"}
_LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\]]*\])*\])\(([^)\s]+)\)")


def included() -> dict[str, str]:
    """Markdown files outside docs/ that are pages: path in the repository → page."""
    found = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
    found["CHANGELOG.md"] = "changelog.md"
    for file in sorted((ROOT / "benchmarks" / "results").glob("*.md")):
        found[f"benchmarks/results/{file.name}"] = f"results/{file.name}"
    found["kernels_pallas/README.md"] = "kernels/index.md"
    for file in sorted((ROOT / "kernels_pallas").glob("*/README.md")):
        found[f"kernels_pallas/{file.parent.name}/README.md"] = f"kernels/{file.parent.name}.md"
    return found


def colabs() -> list[str]:
    """Names of the Colabs."""
    return [file.stem for file in sorted((ROOT / "colabs").glob("*.py"))]


def targets() -> dict[str, str]:
    """Every file of the repository that a page is made of → that page, with its anchor."""
    found = included()
    found |= {f"docs/{file.name}": file.name for file in sorted((ROOT / "docs").glob("*.md"))}
    found |= {f"docs/images/{f.name}": f"images/{f.name}" for f in (ROOT / "docs/images").iterdir()}
    for name in colabs():
        found[f"colabs/{name}.py"] = found[f"colabs/{name}.ipynb"] = f"colabs/{name}.md"
    for file in (ROOT / "configs").glob("[a-z]*.py"):
        found[f"configs/{file.name}"] = f"gallery.md#{file.stem}"
    return found


def navigation(reference: list[str]) -> list[dict[str, object]]:
    """The site's sections; every page of docs/ is in one of them."""
    names = [file.stem for file in sorted((ROOT / "docs").glob("*.md"))]
    how_to = [n for n in HOW_TO if n in names]
    how_to += [n for n in names if n not in {*HOW_TO, *_ELSEWHERE}]
    pages = list(included().values())
    return [
        {"Start": ["index.md", *(f"{n}.md" for n in _START if n in names)]},
        {"How to": [f"{n}.md" for n in how_to]},
        {"Colabs": [f"colabs/{name}.md" for name in colabs()]},
        {"Examples": ["gallery.md"]},
        {"Results": [p for p in pages if p.startswith("results/")]},
        {"Reference": [*reference, "reference/errors.md"]},
        {"Kernels": [p for p in pages if p.startswith("kernels/")]},
        {"Project": ["troubleshooting.md", "contributing.md", "changelog.md"]},
    ]


def relink(markdown: str, source: str, page: str, known: Mapping[str, str]) -> str:
    """Links between files of the repository as links between pages.

    What is in the repository but no page (source files) loses its link and keeps its text; what
    is in neither stays, for the build to complain about.

    Args:
      markdown: Of the page.
      source: Path of its file in the repository.
      page: Its path on the site.
      known: From `targets`.
    """

    def rewrite(match: re.Match[str]) -> str:
        text, target = match.groups()
        path, mark, anchor = target.partition("#")
        if not path or re.match(r"[a-z]+:", target):
            return match[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if file in known:
            uri, _, own = known[file].partition("#")
            relative = posixpath.relpath(uri, posixpath.dirname(page) or ".")
            anchor = anchor or own
            return f"{text}({relative}{'#' + anchor if anchor else ''})"
        return text.strip("[]") if mark == "" and (ROOT / file).exists() else match[0]

    parts = re.split(r"(^```.*?^```\n?)", markdown, flags=re.M | re.S)
    return "".join(p if p.startswith("```") else _LINK.sub(rewrite, p) for p in parts)
