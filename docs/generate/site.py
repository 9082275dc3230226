"""MkDocs hooks: adds the generated pages, and checks the built site for links and names."""

from __future__ import annotations

import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parents[2]))

from docs.generate import errors, gallery, reference
from docs.generate.pages import ROOT, included, navigation, relink, targets

_SOURCES = {page: source for source, page in included().items()}


def _generated() -> dict[str, str]:
    """Page → markdown of all that is made from the source."""
    return {
        **reference.api_pages(),
        "reference/config.md": reference.config_page(),
        "reference/commands.md": reference.commands_page(),
        "reference/errors.md": errors.page(),
        "gallery.md": gallery.page(),
        **gallery.colab_pages(),
        **{page: (ROOT / source).read_text() for source, page in included().items()},
    }


def on_config(config: Any) -> Any:
    """Sets the navigation: a new page of docs/ or benchmarks/results/ is in it by itself."""
    config.nav = navigation(
        ["reference/config.md", "reference/commands.md", *reference.api_pages()]
    )
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the generated pages."""
    for page, markdown in _generated().items():
        files.append(File.generated(config, page, content=markdown))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turns links between files of the repository into links between pages."""
    uri = page.file.src_uri
    if uri in _SOURCES:
        return relink(markdown, _SOURCES[uri], uri, targets())
    if (ROOT / "docs" / uri).exists():
        return relink(markdown, f"docs/{uri}", uri, targets())
    return markdown


class _Links(HTMLParser):
    """ids: anchors of a page; links: what it links to or shows."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: set[str] = set()
        self.feed(text)

    def has(self, fragment: str) -> bool:
        """Whether the page has an anchor."""
        return unquote(fragment) in self.ids

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Notes ids, hrefs and srcs."""
        for name, value in attrs:
            if value and name == "id":
                self.ids.add(value)
            elif value and name in ("href", "src"):
                self.links.add(value)


def dead_links(site: Path) -> list[str]:
    """Links of the built pages to files or anchors that are not there."""
    pages = {f: _Links(f.read_text()) for f in site.rglob("*.html") if f.name != "404.html"}
    dead = []
    for file, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            target = target / "index.html" if target.is_dir() else target
            if not target.exists():
                dead.append(f"{file.relative_to(site)}: {link}")
            elif parts.fragment and target in pages and not pages[target].has(parts.fragment):
                dead.append(f"{file.relative_to(site)}: {link} (no such anchor)")
    return sorted(dead)


def on_post_build(config: Any) -> None:
    """Refuses a site with a dead link, or without a public name.

    Raises:
      PluginError: there is one.
    """
    site = Path(config.site_dir)
    wrong = dead_links(site)
    ids = set().union(*(_Links(f.read_text()).ids for f in (site / "reference").rglob("*.html")))
    names = [f"{module}.{n}" for module, all_ in reference.entries().items() for n in all_]
    wrong += [f"{name} is in no page of the reference" for name in names if name not in ids]
    if wrong:
        raise PluginError("the built site has faults:\n  " + "\n  ".join(wrong))
