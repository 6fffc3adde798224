"""For mkdocs: what pages and docstrings say in ways of their own, in the site's way."""

from __future__ import annotations

import re
from typing import Any

# Pages link to files outside of docs/, which are no part of the site.
_LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(\.\./([^)]*)\)")
# Docstrings name code as Sphinx does: a role before it, a tilde for its last part alone.
_ROLE = re.compile(
    r":(?:attr|class|data|func|meth|mod):<code>(?:~[\w.]*\.|\.(?:\w+\.)*)?([^<]*)</code>"
)


def on_page_markdown(markdown: str, /, *, config: Any, **_: Any) -> str:
    """The page with links out of docs/ going to ``repo_url``, or as text if that is not set."""
    repository = (config.repo_url or "").rstrip("/")
    return _LINK.sub(rf"[\1]({repository}/blob/main/\2)" if repository else r"\1", markdown)


def on_page_content(html: str, /, **_: Any) -> str:
    """The page without the roles of docstrings."""
    return _ROLE.sub(r"<code>\1</code>", html)
