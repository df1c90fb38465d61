"""The pages under docs: their examples run, and print what they say."""

import doctest
import re
from urllib.parse import urlsplit

import pytest

from pages import DOCS, PAGES, ROOT, name_of

BLOCK = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def pages_with_examples():
    return [page for page in sorted(DOCS.glob("*.md")) if ">>> " in page.read_text("utf-8")]


@pytest.mark.parametrize("page", pages_with_examples(), ids=lambda page: page.name)
def test_the_examples_print_what_they_say(page):
    text = page.read_text("utf-8")
    parser, runner = doctest.DocTestParser(), doctest.DocTestRunner()
    names = {}  # a page is one session: its blocks build on each other
    n_examples = 0
    report = []
    for block in BLOCK.finditer(text):
        line = text.count("\n", 0, block.start(1))
        test = parser.get_doctest(block[1], names, page.name, str(page), line)
        n_examples += len(test.examples)
        runner.run(test, out=report.append, clear_globs=False)
        names = test.globs
    assert not runner.failures, "".join(report)
    assert n_examples == len(re.findall("^>>> ", text, re.MULTILINE))  # none outside the blocks


def test_the_metrics_page_is_one_of_them():
    assert DOCS / "metrics.md" in pages_with_examples()


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=name_of
)
def test_links_lead_somewhere(page):
    """To a file and a heading that are there; those to the outside have the form of an address."""
    for target in links(page):
        if "://" in target:
            address = urlsplit(target)
            assert address.scheme == "https", target
            assert "." in address.netloc, target
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.is_relative_to(ROOT), target
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), target


def test_bad_links_are_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A title: one, two\n\n[a](#b) ![c](d.svg) `[e](f)`\n\n```\n# [g](h)\n```\n")
    assert links(page) == ["#b", "d.svg"]
    assert anchors(page) == {"a-title-one-two"}


def prose(page):
    """A page without its fences and what stands as code in its lines."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]+`(?!\])", "", text)


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def anchors(page):
    """As GitHub and MyST make them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
