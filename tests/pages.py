"""The command blocks of README and docs: which commands they hold, and what is shown after each.

A command block is fenced as `console`; a command starts with `$ `, goes on in lines that start
with `> `, and what it prints follows. Comments say the rest:

`<!-- not run: why -->` before a block that cannot run here;
`<!-- differs: why -->` before one that prints something else when others were made smaller;
`<!-- goes on after: commands/sweep.md -->` anywhere in a page that uses the files of another.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md")), *sorted(DOCS.glob("*/*.md"))]

_FENCE = re.compile(
    r"(?:^<!-- (?P<mark>not run|differs): (?P<reason>[^\n]+?) -->\n+)?"
    r"^```(?P<language>[^\n]*)\n(?P<body>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_AFTER = re.compile(r"^<!-- goes on after: (\S+) -->$", re.MULTILINE)

SMALLER = {
    "--n-prompts": 4,
    "--new-tokens": 8,
    "--n-sequences": 8,
    "--length": 32,
}
"""What is made smaller when commands are tested; all else runs as it is written."""
LARGE = {
    "compare": ("--n-prompts", "--new-tokens"),
    "complete": ("--n-prompts", "--new-tokens"),
    "pilot": ("--n-prompts", "--new-tokens"),
    "sweep": ("--n-prompts", "--new-tokens"),
    "verify": ("--n-prompts", "--new-tokens"),
    "prune": ("--n-prompts", "--new-tokens", "--n-sequences", "--length"),
}
"""Where the defaults are larger than that, so that the option is added if it is not there."""


@dataclass(frozen=True)
class Command:
    """One command of a page."""

    line: str
    """Continuation lines joined; several lines where it holds a text."""
    shown: str
    """What the page shows of its output."""
    not_run: str | None
    """Why it cannot run here."""
    differs: str | None
    """Why a test may see other output."""


@dataclass(frozen=True)
class Fence:
    """A fenced block."""

    language: str
    body: str
    not_run: str | None
    differs: str | None


def name_of(page: Path) -> str:
    """How tests and comments call it."""
    return str(page.relative_to(DOCS) if page.is_relative_to(DOCS) else page.relative_to(ROOT))


def fences(page: Path) -> list[Fence]:
    """Every fenced block, in order."""
    found = _FENCE.finditer(page.read_text("utf-8"))
    return [
        Fence(
            m["language"].strip(),
            m["body"],
            *(m["reason"] if m["mark"] == mark else None for mark in ("not run", "differs")),
        )
        for m in found
    ]


def commands(page: Path) -> list[Command]:
    """Every command of its console blocks, in order."""
    return [
        command
        for fence in fences(page)
        if fence.language == "console"
        for command in _commands(fence)
    ]


def synopses(page: Path) -> list[str]:
    """Lines with placeholders, of blocks that are no console's: what a command takes."""
    return [
        line
        for fence in fences(page)
        if fence.language != "console" and fence.not_run
        for line in fence.body.splitlines()
        if line.startswith("dtm ")
    ]


def _commands(fence: Fence) -> list[Command]:
    found: list[tuple[list[str], list[str]]] = []
    for line in fence.body.splitlines():
        if line.startswith("$ "):
            found.append(([line[2:]], []))
        elif found and line[:2] in ("> ", ">") and not found[-1][1]:
            found[-1][0].append(line[2:])
        elif found:
            found[-1][1].append(line)
    return [
        Command(
            "\n".join(parts).replace("\\\n", ""),
            "\n".join(shown).strip("\n"),
            fence.not_run,
            fence.differs,
        )
        for parts, shown in found
    ]


def chapters() -> dict[str, list[Path]]:
    """Pages that run in one folder one after the other, by the name of the first."""
    pages = {name_of(page): page for page in PAGES if any(not c.not_run for c in commands(page))}
    found = {name: _AFTER.search(page.read_text("utf-8")) for name, page in pages.items()}
    after = {name: match[1] for name, match in found.items() if match}
    return {
        first: [pages[name] for name in _followers(first, after)]
        for first in pages
        if first not in after
    }


def _followers(name: str, after: dict[str, str]) -> list[str]:
    """The page, and those that go on after it, each followed by its own."""
    next_ones = [page for page, before in after.items() if before == name]
    return [name, *(follower for page in next_ones for follower in _followers(page, after))]


def made_smaller(line: str) -> str:
    """The same command with fewer prompts and tokens; other commands stay as they are."""
    words = line.split(" ")
    if words[0] != "dtm" or len(words) < 2:
        return line
    for option in SMALLER:
        if option in words:
            at = words.index(option) + 1
            words[at] = str(min(int(words[at]), SMALLER[option]))
        elif option in LARGE.get(words[1], ()):
            smaller = SMALLER[option]
            if words[1] == "pilot" and option == "--n-prompts":
                smaller *= 2  # of fewer it refuses to say anything
            words[2:2] = [option, str(smaller)]
    return " ".join(words)


def options_of(line: str) -> set[str]:
    """The long options that a line names, in brackets too."""
    text = line.replace("[", " ").replace("]", " ").replace("|", " ")
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        words = text.split()
    return {word.partition("=")[0] for word in words if word.startswith("--")}
