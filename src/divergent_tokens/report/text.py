"""Tables for a terminal and for a model card, from comparison.json's content; runs no model."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from divergent_tokens.report.numbers import MISSING, estimate, number, percent, sparkline

ROUNDING_FACTOR = 3
"""A candidate whose KL is under so many times the rounding floor cannot be told from rounding."""
REPEATED_WARNING = 0.3
"""Above this share of repeated tokens a warning says that loops hide divergence."""

_HEADERS = ("", "FDT", "SDT", "KL", "DPPL", "survival", "acceptance", "identical")
_NARROW = 6
"""How many of the columns fit a terminal of 80 characters."""
_WIDE = 100

Record = Mapping[str, Any]


def ordered(record: Record) -> list[Record]:
    """The candidates, best first: longest agreement, then least KL, then fewest divergent tokens."""

    def badness(candidate: Record) -> tuple[float, float, float]:
        m = candidate["metrics"]
        kl = m["kl"]["value"] if m["kl"] else float("inf")
        return -m["fdt"]["value"], kl, m["sdt"]["value"]

    return sorted(record["candidates"], key=badness)


def indistinguishable(metrics: Record, rounding: Record) -> bool:
    """Whether a candidate lies under three times the rounding floor: by KL, by SDT where KL is null."""
    name = "kl" if metrics["kl"] else "sdt"
    return bool(metrics[name]["value"] <= ROUNDING_FACTOR * rounding[name]["value"])


def comparison_text(record: Record, *, width: int = 80) -> RenderableType:
    """The comparison for a terminal: the table, the breakdown, the pairs, the examples, the notes."""
    parts: list[RenderableType] = [Text(title(record) + "\n"), _main_table(record, width)]
    for name, header in (("by_domain", "domain"), ("by_language", "language")):
        if len(record["noise_floor"][name]) > 1:
            parts.append(_breakdown(record, name, header))
    if record["pairs"]:
        parts.append(_pairs_table(record))
    parts += [_examples(candidate) for candidate in ordered(record) if candidate["examples"]]
    parts += [Text(f"• {note}") for note in notes(record)]
    return Group(*parts)


def comparison_markdown(record: Record) -> str:
    """The comparison's table and notes as Markdown, for a model card."""
    rows = [
        [_escaped(cell.replace("\n", " ")) for cell in cells] for cells in _cells(record)
    ]
    lines = [title(record), "", _markdown_row(_HEADERS), _markdown_row(["---"] * len(_HEADERS))]
    lines += [_markdown_row(row) for row in rows]
    lines += ["", *(f"- {note}" for note in notes(record))]
    return "\n".join(lines) + "\n"


def title(record: Record) -> str:
    """What was compared, on what."""
    base, prompts = record["base"], record["prompts"]
    start = "whole chat turns" if prompts["prefix"] is None else f"{prompts['prefix']} tokens"
    return (
        f"{base['reference']} ({base['dtype']}, {base['device']}) on {prompts['n_prompts']} prompts of {start} "
        f"from {prompts['source']}, {prompts['new_tokens']} new tokens"
    )


def notes(record: Record) -> Iterator[str]:
    """What a reader must know to read the numbers rightly."""
    floor, prompts = record["noise_floor"], record["prompts"]
    level = floor["fdt"]["level"]
    yield (
        f"FDT: tokens until the first divergence, at most {number(floor['mean_length'])} here. "
        f""
        f"SDT: share of divergent tokens. KL: nats per token. Ranges: {level:.0%} intervals over prompts."
    )
    for candidate in ordered(record):
        if indistinguishable(candidate["metrics"], record["rounding"]):
            yield (
                f"{candidate['name']} cannot be told from rounding: it lies under "
                f"{ROUNDING_FACTOR} times the rounding floor."
            )
        ties = candidate["metrics"]["near_ties"]
        if ties is not None and ties >= 0.25:
            yield f"{percent(ties)} of the first divergences of {candidate['name']} are near ties (margin under 0.1)."
    if floor["repeated"] > REPEATED_WARNING:
        yield (
            f"{percent(floor['repeated'])} of the base's tokens lie in repeated passages. Loops hardly diverge: "
            "SDT and KL shrink with --new-tokens, so compare only at equal length."
        )
    if prompts["left_out"]:
        yield f"{prompts['left_out']} documents did not fit (too short for the prefix) and were left out."
    names = [candidate["name"] for candidate in record["candidates"]]
    if record["base"]["reference"].startswith("demo:") and any("int4" in name for name in names):
        yield (
            "This demo model's weights were themselves stored in 4 bits (Q4_1, groups of 32) before: "
            "4-bit results on it are particular to it."
        )


def _main_table(record: Record, width: int) -> Table:
    n_columns = len(_HEADERS) if width >= _WIDE else _NARROW
    table = _table(_HEADERS[:n_columns])
    for i, cells in enumerate(_cells(record)):
        table.add_row(*map(Text, cells[:n_columns]), style="dim" if i < 2 else "")
    return table


def _table(columns: Sequence[str], title: str | None = None) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    if title is not None:
        table.title, table.title_justify, table.title_style = Text(f"\n{title}"), "left", "bold"
    for column in columns:
        table.add_column(Text(column), overflow="fold")
    return table


def _cells(record: Record) -> Iterator[list[str]]:
    yield _row("noise floor", record["noise_floor"])
    yield _row("rounding", record["rounding"])
    for candidate in ordered(record):
        mark = " ≈" if indistinguishable(candidate["metrics"], record["rounding"]) else ""
        yield _row(candidate["name"] + mark, candidate["metrics"])


def _row(name: str, m: Record) -> list[str]:
    return [
        name,
        "\n".join(estimate(m["fdt"])),
        "\n".join(estimate(m["sdt"], as_percent=True)),
        "\n".join(estimate(m["kl"])),
        "\n".join(estimate(m["dppl"])),
        sparkline(m["survival"], m["mean_length"]),
        "\n".join(estimate(m["acceptance"], as_percent=True)),
        percent(m["identical"]),
    ]


def _breakdown(record: Record, name: str, header: str) -> Table:
    """SDT of each candidate within each group: where a model drifts."""
    candidates = ordered(record)
    columns = (header, "prompts", *(candidate["name"] for candidate in candidates))
    table = _table(columns, f"SDT by {header}")
    for group, floor in record["noise_floor"][name].items():
        shares = [percent(c["metrics"][name][group]["sdt"]["value"]) for c in candidates]
        table.add_row(Text(group), str(floor["fdt"]["n_prompts"]), *shares)
    return table


def _pairs_table(record: Record) -> Table:
    columns = ("pair", "FDT difference", "p", "p, Holm")
    table = _table(columns, "Differences on the same prompts")
    for pair in record["pairs"]:
        table.add_row(
            Text(f"{pair['a']} − {pair['b']}"),
            " ".join(estimate(pair["fdt_difference"])).strip(),
            number(pair["p_value"], 2),
            number(pair["p_holm"], 2),
        )
    return table


def _examples(candidate: Record) -> RenderableType:
    parts = [Text(f"\nWhere {candidate['name']} parts from the base", style="bold")]
    for example in candidate["examples"]:
        kind = "a near tie" if example["margin"] < 0.1 else "a real change of mind"
        parts.append(
            Text(
                f"prompt {example['prompt']}, after {example['fdt']} tokens; the base's margin there is "
                f"{number(example['margin'])} logits: {kind}",
                style="italic",
            )
        )
        parts.append(Text.assemble(("prompt     ", "dim"), _one_line(example["prompt_text"][-200:])))
        parts.append(Text.assemble(("both       ", "dim"), _one_line(example["shared_text"][-200:])))
        parts.append(Text.assemble(("base       ", "dim"), (_one_line(example["base_text"][:300]), "green")))
        parts.append(Text.assemble(("candidate  ", "dim"), (_one_line(example["candidate_text"][:300]), "red")))
    return Group(*parts)


def _one_line(text: str) -> str:
    """Text on one line, its line breaks shown, control characters (which terminals obey) taken out."""
    return "".join(c if c.isprintable() else "⏎" if c == "\n" else " " for c in text)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escaped(cell: str) -> str:
    return cell.replace("\\", "\\\\").replace("|", "\\|") or MISSING
