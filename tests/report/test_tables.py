"""Tables of text cells."""

from rich.console import Console

from divergent_tokens.report.tables import escaped, harmless, markdown_table, on_one_line, table


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
