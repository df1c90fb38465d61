"""After a build: no page asks anybody for anything when it is opened, which a warning would say."""

import re
from html.parser import HTMLParser
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src"}
"""What a browser fetches by itself; a link that a reader follows is none of it."""
UNREAD = {"canonical", "alternate", "author", "license"}
"""Kinds of <link> that a browser does not fetch."""


ELSEWHERE = re.compile(r"(url\(|@import)\s*['\"]?\s*(https?:|//)", re.IGNORECASE)
"""What a style sheet would load from another place."""


class Fetches(HTMLParser):
    """The addresses outside of the site that a page loads."""

    def __init__(self) -> None:
        """For one page."""
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep the address of what is fetched from elsewhere."""
        given = dict(attrs)
        address = given.get(LOADED.get(tag, "")) or ""
        if given.get("rel") not in UNREAD and address.lower().startswith(("http:", "https:", "//")):
            self.found.append(address)


def check(app: Sphinx, error: Exception | None) -> None:
    """Warn of each request that a page, or a style sheet, would make."""
    if error is not None or app.builder.format != "html":
        return
    logger = logging.getLogger(__name__)
    for page in Path(app.outdir).rglob("*.html"):
        parser = Fetches()
        parser.feed(page.read_text("utf-8"))
        for address in parser.found:
            logger.warning("%s would load %s", page.name, address)
    for sheet in Path(app.outdir).rglob("*.css"):
        if ELSEWHERE.search(sheet.read_text("utf-8")):
            logger.warning("%s would load something from elsewhere", sheet.name)


def setup(app: Sphinx) -> dict[str, bool]:
    """Have every build checked."""
    app.connect("build-finished", check)
    return {"parallel_read_safe": True}
