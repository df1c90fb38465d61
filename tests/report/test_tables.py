"""Tables of text cells."""

from rich.console import Console

from divergent_tokens.report.tables import (
    escaped,
    harmless,
    markdown_page,
    markdown_table,
    on_one_line,
    on_prompts,
    table,
)


def test_harmless_keeps_everything_but_commands():
    assert harmless("naïve 日本 😀") == "naïve 日本 😀"
    assert harmless({"a\x1b": ["b\n", 1, None, 2.5, True]}) == {"a ": ["b⏎", 1, None, 2.5, True]}


def test_a_table_for_a_terminal():
    console = Console(width=40)
    with console.capture() as captured:
        console.print(table(["", "FDT"], [["[red]int8", "52.3"]], "Title"))
    assert captured.get().split() == ["Title", "FDT", "[red]int8", "52.3"]


def test_a_table_in_markdown():
    assert markdown_table(["", "a|b"], [["x_y", "1"]]) == [
        "|  | a\\|b |",
        "| --- | --- |",
        "| x\\_y | 1 |",
    ]
    assert escaped("2*3") == "2\\*3"


def test_a_value_and_its_interval():
    assert on_one_line("5\n4–6") == "5 (4–6)"
    assert on_one_line("5") == "5"


def test_what_was_measured_on_by_number_and_kind():
    prompts = {"n_prompts": 1, "prefix": 32, "source": "my.txt"}
    assert on_prompts(prompts, 64) == "on 1 prompt of 32 tokens from my.txt, 64 new tokens"
    turns = {"n_prompts": 2, "prefix": None, "source": "my.jsonl"}
    assert on_prompts(turns, 8) == "on 2 prompts of whole chat turns from my.jsonl, 8 new tokens"


def test_a_page_without_notes_ends_with_its_last_table():
    section = (["a"], [["1"]], "Heading")
    page = markdown_page("Title", [section], [])
    assert page == "Title\n\n**Heading**\n\n| a |\n| --- |\n| 1 |\n"
    assert markdown_page("Title", [section], ["one", "two"]) == page + "\n- one\n- two\n"
