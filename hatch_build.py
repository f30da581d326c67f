"""Metadata of the package that depends on the address of the repository: its links, and those of README.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)")


class RepositoryLinks(MetadataHookInterface):
    """Sets `project.urls` and `project.readme` by `repository` in pyproject.toml."""

    def update(self, metadata: dict[str, Any]) -> None:
        """Add both to the metadata; without an address, there are no URLs."""
        address = self.config["repository"]
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        metadata["readme"] = {"content-type": "text/markdown", "text": make_links_absolute(text, address)}
        metadata["urls"] = list_urls(address)


def list_urls(address: str) -> dict[str, str]:
    """Return the links of the package's page.

    >>> list_urls("https://github.com/me/slop-hf")["Changes"]
    'https://github.com/me/slop-hf/blob/main/CHANGELOG.md'
    """
    if not address:
        return {}
    return {
        "Repository": address,
        "Documentation": f"{address}/blob/main/docs/index.md",
        "Changes": f"{address}/blob/main/CHANGELOG.md",
        "Issues": f"{address}/issues",
    }


def make_links_absolute(text: str, address: str) -> str:
    """Return Markdown whose relative links and pictures lead to the repository, in GitHub's layout.

    Without an address, links become plain text and pictures go: on a page of a package index they would be dead.

    >>> make_links_absolute("![a plan](docs/plan.png) [more](docs/a.md#b)", "https://github.com/me/it")
    '![a plan](https://github.com/me/it/raw/main/docs/plan.png) [more](https://github.com/me/it/blob/main/docs/a.md#b)'
    >>> make_links_absolute("[more](docs/a.md#b), [here](#below)", "")
    'more, [here](#below)'
    """

    def replace(link: re.Match[str]) -> str:
        mark, words, path = link.groups()
        if not address:
            return "" if mark else words
        return f"{mark}[{words}]({address}/{'raw' if mark else 'blob'}/main/{path})"

    return _LINK.sub(replace, text)
