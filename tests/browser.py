"""A real browser for pages, with the network cut; what it loaded, said and asked for."""

import contextlib
import dataclasses
import os
import time
from typing import Any

import pytest

from divergent_tokens.report.pictures import browser

NEEDED = "DTM_NEEDS_BROWSER"
"""Set by .ci/run: where a browser is missing, tests fail rather than skip."""
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@dataclasses.dataclass
class Opened:
    """A page in the browser."""

    page: Any
    said: list[str]
    """What the console and the page's errors said."""
    asked: list[str]
    """Every address that was asked for but the page's own."""

    def until(self, expression, seconds=60):
        """Wait for an expression; the page's own policy forbids it Playwright's way of waiting."""
        end = time.monotonic() + seconds
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, expression
            self.page.wait_for_timeout(50)


def missing(what):
    """Skip, with the reason; fail where a browser must be there."""
    if os.environ.get(NEEDED):
        pytest.fail(f"{what}, and {NEEDED} is set")
    pytest.skip(what)


@contextlib.contextmanager
def running():
    """The browser."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("playwright is not installed")
    path = browser()
    if path is None:
        missing("no Chromium is installed")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        yield started
        started.close()


@contextlib.contextmanager
def opened(started, path, *, width=1400, scheme="light"):
    """A page from disk."""
    context = started.new_context(
        viewport={"width": width, "height": 900}, color_scheme=scheme, reduced_motion="reduce"
    )
    context.set_offline(True)
    context.set_default_timeout(60_000)
    found = Opened(context.new_page(), [], [])
    own = path.resolve().as_uri()

    def request(route):
        if route.request.url == own:
            route.continue_()
        else:
            found.asked.append(route.request.url)
            route.abort()

    context.route("**/*", request)
    found.page.on("console", lambda message: found.said.append(message.text))
    found.page.on("pageerror", lambda error: found.said.append(str(error)))
    found.page.on("dialog", lambda dialog: found.said.append(f"dialog: {dialog.message}"))
    found.page.goto(own)
    found.page.wait_for_selector("html[data-ready]")
    yield found
    context.close()
