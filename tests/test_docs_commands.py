"""Every command of README and docs runs, in order, on the real model, and ends as the page says.

What is made smaller for that, and how a block is left out, is in pages.py.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from divergent_tokens.cli.entry import app
from pages import (
    LARGE,
    PAGES,
    ROOT,
    SMALLER,
    chapters,
    commands,
    fences,
    made_smaller,
    name_of,
    options_of,
    synopses,
)

CHAPTERS = chapters()
COMMANDS = get_command(app).commands
ELLIPSIS = re.compile(r"^\s*(\[?\.\.\.|…|\[\.\.\.).*$")
"""A line that stands for lines left out."""


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Shared by all processes of a test run, so that the model is made ready once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "docs-cache"


@pytest.mark.demo
@pytest.mark.parametrize("first", CHAPTERS)
def test_the_commands_run_as_the_page_says(first, tmp_path, cache):
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for page in CHAPTERS[first]:
        last = 0
        found = [command for command in commands(page) if not command.not_run]
        for command, after in zip(found, [*found[1:], None], strict=True):
            states_code = after is not None and after.line == "echo $?"
            line = made_smaller(command.line)
            left = in_shell(line, tmp_path, cache, last=last)
            last = left.returncode
            where = f"{name_of(page)}: $ {line}\n{left.stdout}"
            if not states_code:
                assert last == 0, where
            if command.shown and (is_same(command, line) or line == "echo $?"):
                assert shows(command.shown, left.stdout), (
                    f"{where}\nthe page shows\n{command.shown}"
                )


def is_same(command, line):
    """Whether it prints what the page shows: it is not made smaller, and reads nothing that was."""
    return line == command.line and not command.differs


def in_shell(line, folder, cache, *, last):
    """Run a line in a folder, `$?` as the last command left it; both streams as one text."""
    beside = str(Path(sys.executable).parent)
    return subprocess.run(
        ["bash", "-c", f"(exit {last})\n{line}"],
        cwd=folder,
        env=os.environ
        | {
            "PATH": f"{beside}{os.pathsep}{os.environ['PATH']}",
            "XDG_CACHE_HOME": str(cache),
            "COLUMNS": "80",
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        encoding="utf-8",
        check=False,
    )


def shows(shown, printed):
    """Whether a page shows what was printed, parts left out where it has a line of dots."""
    parts, part = [], []
    for line in shown.splitlines():
        if ELLIPSIS.match(line):
            parts.append(part)
            part = []
        else:
            part.append(line.rstrip())
    parts.append(part)
    rest = "\n" + "\n".join(line.rstrip() for line in printed.splitlines()).strip("\n") + "\n"
    for i, part in enumerate(parts):
        text = "\n" + "\n".join(part).strip("\n") + "\n"
        at = rest.find(text) if text.strip() else 0
        if at < 0 or (i == 0 and at > 0 and part):
            return False
        rest = rest[at + len(text) - 1 :] if text.strip() else rest
    return bool(not parts[-1]) or rest == "\n"


def test_output_is_compared_line_by_line():
    printed = "a\nb\nc\nd\n"
    assert shows("a\nb\nc\nd", printed)
    assert shows("a\n[...]\nd", printed)
    assert shows("a\nb\n[...]", printed)
    assert not shows("a\nb", printed)
    assert not shows("b\n[...]", printed)
    assert not shows("a\n[...]\nx", printed)
    assert not shows("a\n[...]\nc", printed)


def test_what_is_made_smaller():
    assert made_smaller("dtm verify DIR --n-prompts 32") == (
        "dtm verify --new-tokens 8 DIR --n-prompts 4"
    )
    assert made_smaller("dtm search sweep.db --n-prompts 2") == "dtm search sweep.db --n-prompts 2"
    assert made_smaller("cat x --n-prompts 32") == "cat x --n-prompts 32"


def test_what_is_made_smaller_is_an_option():
    for name, options in LARGE.items():
        defaults = {p.opts[0]: p.default for p in COMMANDS[name].params}
        for option in options:
            several = defaults[option] is None  # its default is a list, of larger numbers
            assert several or defaults[option] > SMALLER[option]


def test_every_page_with_commands_runs_once():
    """One that goes on after a page that is not there would never run."""
    run = [name_of(page) for chapter in CHAPTERS.values() for page in chapter]
    assert sorted(run) == sorted(
        name_of(page) for page in PAGES if any(not c.not_run for c in commands(page))
    )


def test_lines_are_joined(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```console\n$ a \\\n> --b\nout\n> more\n$ cat <<E\n> x\n>\n> E\n```\n")
    first, second = commands(page)
    assert (first.line, first.shown) == ("a --b", "out\n> more")
    assert second.line == "cat <<E\nx\n\nE"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_stand_in_console_blocks(page):
    """Else no test would run them."""
    for fence in fences(page):
        if fence.language != "console" and not fence.not_run:
            stray = [x for x in fence.body.splitlines() if re.match(r"(\$ )?dtm [a-z]+ ", x)]
            assert not stray, stray


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_exist(page):
    """Of the commands that cannot run here too."""
    for text in (*(command.line for command in commands(page)), *synopses(page)):
        for line in text.splitlines():
            words = line.split()
            if words[:1] != ["dtm"] or len(words) < 2 or words[1].startswith("-"):
                continue
            assert words[1] in COMMANDS, f"{name_of(page)}: dtm has no command {words[1]}"
            known = {o for p in COMMANDS[words[1]].params for o in (*p.opts, *p.secondary_opts)}
            unknown = options_of(line) - known - {"--help"}
            assert not unknown, f"{name_of(page)}: dtm {words[1]} has no {unknown}"


def test_a_reason_is_given_for_each_block_that_is_not_run():
    marked = [command for page in PAGES for command in commands(page)]
    reasons = {c.not_run or c.differs for c in marked if c.not_run or c.differs}
    assert reasons
    assert all(len(reason) > 10 for reason in reasons)


def test_an_exit_code_that_is_asked_for_is_shown():
    """Else any would do."""
    asked = [c for page in PAGES for c in commands(page) if c.line == "echo $?"]
    assert asked
    assert all(command.shown.isdigit() for command in asked)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_its_page_and_runs_in_it(name):
    (page,) = [page for page in PAGES if f"```{{dtm-command}} {name}\n" in page.read_text("utf-8")]
    assert page.name == f"{name}.md"
    assert any(c.line.startswith(f"dtm {name} ") and not c.not_run for c in commands(page))
