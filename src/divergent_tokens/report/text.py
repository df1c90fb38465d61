"""Tables for a terminal and for a model card, from comparison.json's content; runs no model."""

from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from divergent_tokens.report.answers import task_notes, task_sections
from divergent_tokens.report.numbers import estimate, number, percent, sparkline
from divergent_tokens.report.tables import (
    GAP,
    Record,
    Section,
    escaped,
    harmless,
    markdown_table,
    on_one_line,
    on_prompts,
    table,
)

ROUNDING_FACTOR = 3
"""A candidate whose KL is under so many times the rounding floor cannot be told from rounding."""
NEAR_TIE_LOGITS = 0.1
"""As in measure/metrics.py, which this lane does not import."""
NEAR_TIES_WORTH_A_NOTE = 0.25
REPEATED_WARNING = 0.3
"""Above this share of repeated tokens a warning says that loops hide divergence."""
LONGEST_NAME = 28
"""Longer names are shortened in a terminal's tables; they may fold onto a row's second line."""

HEADERS = ("", "FDT", "SDT", "KL", "DPPL", "survival", "acceptance", "identical")
_GROUPS = (("by_domain", "domain"), ("by_language", "language"))


def ordered(record: Record) -> list[Record]:
    """The candidates, best first: longest agreement, then least KL, then least SDT."""

    def badness(candidate: Record) -> tuple[float, float, float]:
        m = candidate["metrics"]
        kl = m["kl"]["value"] if m["kl"] else float("inf")
        return -m["fdt"]["value"], kl, m["sdt"]["value"]

    return sorted(record["candidates"], key=badness)


def indistinguishable(metrics: Record, rounding: Record) -> bool:
    """Whether it lies under three times the rounding floor: by KL, or by SDT where that is null."""
    name = "kl" if metrics["kl"] else "sdt"
    return bool(metrics[name]["value"] <= ROUNDING_FACTOR * rounding[name]["value"])


def comparison_text(record: Record, *, width: int = 80) -> RenderableType:
    """The comparison for a terminal: table, breakdowns, pairs, examples, notes."""
    record = harmless(record)
    labels = _labels(record)
    parts: list[RenderableType] = [Text(title(record) + "\n")]
    parts.append(_main_table(list(cells(record, labels)), width))
    parts += [table(*section) for section in _sections(record, labels, (width - 24) // 14)]
    for candidate in ordered(record):
        if candidate["examples"]:
            parts.append(Text(f"\nWhere {candidate['name']} parts from the base", style="bold"))
            parts += [_example(example) for example in candidate["examples"]]
    parts.append(Text())
    parts += [Text(f"• {note}") for note in notes(record)]
    return Group(*parts)


def comparison_markdown(record: Record) -> str:
    """The same as Markdown, for a model card."""
    record = harmless(record)
    names = {candidate["name"]: candidate["name"] for candidate in record["candidates"]}
    on_lines = [[on_one_line(cell) for cell in row] for row in cells(record, names)]
    lines = [escaped(title(record)), "", *markdown_table(HEADERS, on_lines)]
    for columns, rows, heading in _sections(record, names, len(names)):
        on_lines = [[on_one_line(cell) for cell in row] for row in rows]
        lines += ["", f"**{escaped(heading)}**", "", *markdown_table(columns, on_lines)]
    for candidate in ordered(record):
        if candidate["examples"]:
            lines += ["", f"**Where {escaped(candidate['name'])} parts from the base**"]
        for example in candidate["examples"]:
            # No line of the block can end it: each begins with a word of ours.
            block = [f"{word:<11}{text}" for word, text, _ in _example_lines(example)]
            lines += ["", escaped(_example_heading(example)), "", "~~~text", *block, "~~~"]
    lines += ["", *(f"- {escaped(note)}" for note in notes(record))]
    return "\n".join(lines) + "\n"


def title(record: Record) -> str:
    """What was compared, on what."""
    base, prompts = record["base"], record["prompts"]
    on = on_prompts(prompts, prompts["new_tokens"])
    return f"{base['reference']} ({base['dtype']}, {base['device']}) {on}"


def notes(record: Record) -> Iterator[str]:
    """What a reader must know to read the numbers rightly."""
    floor, prompts = record["noise_floor"], record["prompts"]
    level = floor["fdt"]["level"]
    yield (
        f"FDT: tokens until the first divergence, at most {number(floor['mean_length'])} here. "
        "SDT: share of divergent tokens. KL: nats per token. "
        f"Ranges: {100 * level:g}% intervals over prompts."
    )
    for candidate in ordered(record):
        if indistinguishable(candidate["metrics"], record["rounding"]):
            yield (
                f"≈ {candidate['name']} cannot be told from rounding: it lies under "
                f"{ROUNDING_FACTOR} times the rounding floor."
            )
        ties = candidate["metrics"]["near_ties"]
        if ties is not None and ties >= NEAR_TIES_WORTH_A_NOTE:
            yield (
                f"{percent(ties)} of the first divergences of {candidate['name']} are near ties "
                f"(margin under {NEAR_TIE_LOGITS})."
            )
    yield from task_notes(record)
    if floor["repeated"] > REPEATED_WARNING:
        yield (
            f"{percent(floor['repeated'])} of the base's tokens lie in repeated passages. Loops "
            "hardly diverge: SDT and KL shrink with --new-tokens, so compare only at equal length."
        )
    if prompts.get("wanted"):
        yield (
            f"{prompts['wanted']} prompts were asked for; the source has {prompts['n_prompts']} "
            "that fit."
        )
    same = len(prompts["texts"]) - len(set(prompts["texts"]))
    if same:
        yield (
            f"{same} of the prompts are the same as another one, and count as if they were not: "
            "the ranges are too narrow."
        )
    if prompts["left_out"]:
        why = (
            "longer than the positions" if prompts["prefix"] is None else "too short for the prefix"
        )
        yield f"Left out as not fitting: {prompts['left_out']} of the documents read ({why})."
    names = [candidate["name"] for candidate in record["candidates"]]
    if record["base"]["reference"].startswith("demo:") and any("int4" in name for name in names):
        yield (
            "This demo model's weights were themselves stored in 4 bits (Q4_1, groups of 32) "
            "before: 4-bit results on it are particular to it."
        )


def _main_table(rows: Sequence[Sequence[str]], width: int) -> Table:
    """As many of the columns as fit, from the left; two at least."""
    widths = [
        GAP + max(cell_len(line) for row in (HEADERS, *rows) for line in row[i].split("\n"))
        for i in range(len(HEADERS))
    ]
    widths[0] = min(widths[0], GAP + LONGEST_NAME // 2)  # a name has two lines
    n_columns = max(n for n in range(1, len(widths) + 1) if n <= 2 or sum(widths[:n]) <= width)
    built = table(HEADERS[:n_columns], ())
    built.columns[0].max_width = max(widths[0] - GAP, width - sum(widths[1:n_columns]) - GAP)
    for i, cells in enumerate(rows):
        built.add_row(*map(Text, cells[:n_columns]), style="dim" if i < 2 else "")
    return built


def cells(record: Record, labels: Mapping[str, str]) -> Iterator[list[str]]:
    """The rows under `HEADERS`: the two floors, then the candidates, best first."""
    yield _row("noise floor", record["noise_floor"])
    yield _row("rounding", record["rounding"])
    for candidate in ordered(record):
        mark = " ≈" if indistinguishable(candidate["metrics"], record["rounding"]) else ""
        yield _row(labels[candidate["name"]] + mark, candidate["metrics"])


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


def _labels(record: Record) -> dict[str, str]:
    """Each candidate's name, shortened where that leaves all of them distinct."""
    names = [candidate["name"] for candidate in record["candidates"]]
    short = {name: _shortened(name) for name in names}
    return short if len(set(short.values())) == len(names) else {name: name for name in names}


def _shortened(name: str) -> str:
    """The end of a long path, from a folder's name on if that fits; a long word's both ends.

    >>> _shortened("/home/someone/models/compressed/llama-7b-gptq/checkpoint-100")
    '…/llama-7b-gptq/checkpoint-100'
    """
    if len(name) <= LONGEST_NAME + 2:
        return name
    parts = name.rstrip("/").split("/")
    for i in range(1, len(parts)):
        end = "/".join(parts[i:])
        if len(end) <= LONGEST_NAME:
            return f"…/{end}"
    half = LONGEST_NAME // 2
    return f"{parts[-1][:half]}…{parts[-1][-half:]}"


def _sections(record: Record, labels: Mapping[str, str], n_beside: int) -> Iterator[Section]:
    """Perplexities, tasks, breakdowns with so many candidates beside each other, and pairs."""
    yield from _perplexities(record, labels)
    yield from task_sections(record, ordered(record), labels)
    candidates, step = ordered(record), max(1, n_beside)
    for name, header in _GROUPS:
        if len(record["noise_floor"][name]) > 1:
            for i in range(0, len(candidates), step):
                yield _breakdown(record, candidates[i : i + step], name, header, labels)
    yield from _pairs(record, labels)


def other_sections(record: Record, labels: Mapping[str, str]) -> Iterator[Section]:
    """Perplexities, tasks and pairs, for a page that shows groups otherwise."""
    yield from _perplexities(record, labels)
    yield from task_sections(record, ordered(record), labels)
    yield from _pairs(record, labels)


def _perplexities(record: Record, labels: Mapping[str, str]) -> Iterator[Section]:
    if not record["noise_floor"]["ppl"]:
        return
    named = [("base", record["noise_floor"])]
    named += [(labels[c["name"]], c["metrics"]) for c in ordered(record) if c["metrics"]["ppl"]]
    ways = ("conventional", "context_aware")
    rows = [[name, *("  ".join(estimate(m["ppl"][way])) for way in ways)] for name, m in named]
    yield ("", "conventional", "context-aware"), rows, "Perplexity of the text"


def _pairs(record: Record, labels: Mapping[str, str]) -> Iterator[Section]:
    if not record["pairs"]:
        return
    rows = [
        [
            f"{labels[pair['a']]} − {labels[pair['b']]}",
            "  ".join(estimate(pair["fdt_difference"])).strip(),
            number(pair["p_value"], 2),
            number(pair["p_holm"], 2),
        ]
        for pair in record["pairs"]
    ]
    yield ("pair", "FDT difference", "p", "p, Holm"), rows, "Differences on the same prompts"


def _breakdown(
    record: Record, candidates: Sequence[Record], name: str, header: str, labels: Mapping[str, str]
) -> Section:
    """SDT of candidates within each group: where a model drifts."""
    columns = (header, "prompts", *(labels[candidate["name"]] for candidate in candidates))
    rows = [
        [
            group,
            str(floor["fdt"]["n_prompts"]),
            *(percent(c["metrics"][name][group]["sdt"]["value"]) for c in candidates),
        ]
        for group, floor in record["noise_floor"][name].items()
    ]
    return columns, rows, f"SDT by {header}"


def _example(example: Record) -> RenderableType:
    parts = [Text(_example_heading(example), style="italic")]
    parts += [
        Text.assemble((f"{word:<11}", "dim"), (text, style))
        for word, text, style in _example_lines(example)
    ]
    return Group(*parts)


def _example_heading(example: Record) -> str:
    kind = "a near tie" if example["margin"] < NEAR_TIE_LOGITS else "no near tie"
    return (
        f"prompt {example['prompt']}, after {example['fdt']} tokens; the base's margin there is "
        f"{number(example['margin'])} logits: {kind}"
    )


def _example_lines(example: Record) -> Iterator[tuple[str, str, str]]:
    """A word, the text, and its style: the end of what is shared, the start of what is not."""
    yield "prompt", example["prompt_text"][-200:], ""
    if example["shared_text"]:
        yield "both", example["shared_text"][-200:], ""
    yield "base", example["base_text"][:300], "green"
    yield "candidate", example["candidate_text"][:300], "red"
