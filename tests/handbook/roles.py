"""A hook of mkdocs: references of docstrings, ``:func:`place.name```, become the name that is meant."""

from __future__ import annotations

import re
from typing import Any

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):<code>(?:[\w.]*\.)?(\w+)</code>")


def on_page_content(html: str, **_: Any) -> str:
    """What mkdocs calls with the HTML of every page."""
    return ROLE.sub(r"<code>\1</code>", html)
