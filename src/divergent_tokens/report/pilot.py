"""What a trial found, for a terminal and as Markdown; records in, runs no model."""

import math
import shlex
from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from divergent_tokens.report.numbers import MISSING, UNKNOWN, estimate, number, percent
from divergent_tokens.report.tables import (
    Record,
    Section,
    harmless,
    markdown_page,
    text_page,
)
from divergent_tokens.report.text import ROUNDING_FACTOR

METRICS = ("fdt", "sdt", "kl")
WORTH_A_NOTE = 1.25
"""Where one prefix or length gives so many times the value of another, it is said."""
SPOILT = {
    "censored": "more than half of the prompts never part, so that FDT measures the length",
    "loops": "much of the base's text is loops, which hardly diverge",
}


def pilot_text(record: Record) -> RenderableType:
    """The trial for a terminal: what each cell needs, what it measures, notes, the next command."""
    record = harmless(record)
    parts = [text_page(title(record), _sections(record), notes(record))]
    if record["recommended"]:
        parts.append(Text(f"\n{next_command(record)}"))
    return Group(*parts)


def pilot_markdown(record: Record) -> str:
    """The same as Markdown."""
    record = harmless(record)
    page = markdown_page(title(record), _sections(record), notes(record))
    if not record["recommended"]:
        return page
    return f"{page}\n~~~\n{next_command(record)}\n~~~\n"


def title(record: Record) -> str:
    """What was tried, on what."""
    base, trial = record["base"], record["trial"]
    names = ", ".join(_names(record))
    return (
        f"{base['reference']} ({base['dtype']}, {base['device']}) and {names}: a trial of "
        f"{trial['n_prompts']} prompts from {trial['source']}"
    )


def next_command(record: Record, width: int = 80) -> str:
    """The comparison to run, for a shell, on lines that go on."""
    lines = [""]
    for word in map(shlex.quote, record["recommended"]["command"]):
        if lines[-1] and len(lines[-1]) + len(word) + 3 > width:  # with " \\" after it
            lines.append(f"  {word}")
        else:
            lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _names(record: Record) -> list[str]:
    return [candidate["name"] for candidate in record["cells"][0]["candidates"]]


def _sections(record: Record) -> Iterator[Section]:
    wanted = [_asked(width) for width in record["widths"]]
    columns = ("prefix", "new", *wanted, "prompts", "censored", "loops", "tokens")
    rows = [_needed_row(record, cell) for cell in record["cells"]]
    yield columns, rows, "Prompts needed for intervals as narrow as wanted"
    for i, name in enumerate(_names(record)):
        rows = [
            [
                *_place(cell),
                *(
                    "\n".join(estimate(cell["candidates"][i][m], as_percent=m == "sdt"))
                    for m in METRICS
                ),
                percent(cell["candidates"][i]["censored"]),
                percent(cell["candidates"][i]["near_ties"]),
            ]
            for cell in record["cells"]
        ]
        columns = ("prefix", "new", "FDT", "SDT", "KL", "censored", "near ties")
        yield columns, rows, f"{name} on the trial's prompts"
    for i, pair in enumerate(record["cells"][0]["pairs"]):
        rows = [
            [*_place(cell), *(_told_apart(one) for one in cell["pairs"][i]["contrasts"])]
            for cell in record["cells"]
        ]
        heading = f"Prompts that tell {pair['a']} from {pair['b']}"
        yield ("prefix", "new", "by FDT", "by SDT", "by KL"), rows, heading


def _needed_row(record: Record, cell: Record) -> list[str]:
    tokens = cell["forward_tokens"]
    chosen = record["recommended"]
    here = chosen is not None and all(cell[key] == chosen[key] for key in ("prefix", "new_tokens"))
    prefix, new = _place(cell)
    return [
        ("▸ " if here else "  ") + prefix,
        new,
        *(_needed(_worst(cell, width["metric"])) for width in record["widths"]),
        MISSING if cell["n_prompts"] is None else f"{cell['n_prompts']:,}",
        percent(max(c["censored"] for c in cell["candidates"]))
        + (" ✗" if "censored" in cell["spoiled_by"] else ""),
        percent(cell["repeated"]) + (" ✗" if "loops" in cell["spoiled_by"] else ""),
        MISSING if tokens is None else f"{number(tokens['all'] / 1000)}k",
    ]


def _place(cell: Record) -> tuple[str, str]:
    return "turns" if cell["prefix"] is None else str(cell["prefix"]), str(cell["new_tokens"])


def _asked(width: Record) -> str:
    """A wanted width as it was typed."""
    size = f"{100 * width['size']:g}%" if width["relative"] else f"{width['size']:g}"
    return f"{width['metric']}={size}"


def _worst(cell: Record, metric: str) -> Record:
    """What the candidate that needs the most prompts needs; first of all one that cannot tell."""
    found: Sequence[Record] = [c["needed"][metric] for c in cell["candidates"]]
    return max(found, key=lambda n: math.inf if n["n_prompts"] is None else n["n_prompts"])


def _needed(needed: Record) -> str:
    """A number of prompts, and under it the range that the trial knows it in."""
    if needed["n_prompts"] is None:
        return MISSING
    if needed["low"] is None and needed["high"] is None:
        return _count(needed["n_prompts"])
    low, high = (UNKNOWN if needed[end] is None else _count(needed[end]) for end in ("low", "high"))
    return f"{_count(needed['n_prompts'])}\n{low}–{high}"


def _count(n_prompts: float) -> str:
    """Prompts, rounded up to two digits: no trial knows more.

    >>> [_count(n) for n in (7.2, 99.1, 234, 1201)]
    ['8', '100', '240', '1,300']
    """
    step = 10 ** max(0, math.floor(math.log10(max(n_prompts, 1))) - 1)
    return f"{math.ceil(n_prompts / step) * step:,}"


def _told_apart(contrast: Record) -> str:
    if contrast["paired"]["n_prompts"] is None:
        return MISSING
    own = contrast["unpaired"]
    beside = "" if own is None else f" ({_count(own)})"
    first, _, ends = _needed(contrast["paired"]).partition("\n")
    return "\n".join(filter(None, (first + beside, ends)))


def notes(record: Record) -> Iterator[str]:
    """What a reader must know to read the numbers rightly."""
    trial, chosen = record["trial"], record["recommended"]
    level = f"{100 * record['level']:g}%"
    yield (
        "Prompts needed: for every candidate, the trial's number at least. Widths: of the "
        f"{level} interval, from end to end. Tokens: through the model, to complete and to score "
        "the base, the rounding floor and each candidate."
    )
    yield (
        f"The ranges are what {trial['n_prompts']} prompts can say of how much prompts differ: the "
        "number needed is known within such a factor only."
    )
    if chosen:
        yield _recommendation(record)
    else:
        yield (
            "No number of prompts can be given: in every cell a candidate does not differ from the "
            "base in what is asked for, or not from prompt to prompt. Try more --n-prompts or "
            "--new-tokens."
        )
    for spoilt, why in SPOILT.items():
        n = sum(spoilt in cell["spoiled_by"] for cell in record["cells"])
        if n:
            yield f"✗ {spoilt}, {n} of {len(record['cells'])} rows: {why}."
    yield from _notes_on_places(record)
    if record["cells"][0]["pairs"]:
        yield (
            "Telling apart: 8 of 10 such runs would, both candidates on the same prompts (in "
            "brackets: each on prompts of its own). A range without an end: the trial does not "
            "show that they differ."
        )
    yield from _notes_on_prompts(record)


def _recommendation(record: Record) -> str:
    chosen = record["recommended"]
    (cell,) = (
        cell
        for cell in record["cells"]
        if all(cell[key] == chosen[key] for key in ("prefix", "new_tokens"))
    )
    where = f"prefix {chosen['prefix']}, " if chosen["prefix"] is not None else ""
    found = f"{where}{chosen['new_tokens']} new tokens, {chosen['n_prompts']:,} prompts"
    most = cell["n_prompts_high"]
    doubt = f" (up to {most:,} by the ranges)" if most and most > chosen["n_prompts"] else ""
    if cell["spoiled_by"]:
        spoilt = " and ".join(cell["spoiled_by"])
        return (
            f"▸ No row is unspoiled; the cheapest of the least spoiled ({spoilt}): {found}{doubt}."
        )
    return f"▸ The cheapest row that nothing spoils: {found}{doubt}."


def _notes_on_places(record: Record) -> Iterator[str]:
    """How far the metrics themselves differ between prefixes and lengths."""
    for i, name in enumerate(_names(record)):
        apart = []
        for metric in METRICS:
            values = [cell["candidates"][i][metric]["value"] for cell in record["cells"]]
            if min(values) > 0 and max(values) >= WORTH_A_NOTE * min(values):
                form = percent if metric == "sdt" else number
                apart.append(f"{metric.upper()} {form(min(values))} to {form(max(values))}")
        if apart:
            yield (
                f"{name} has {', '.join(apart)} from row to row: each prefix and length makes "
                "another quantity, so compare only within one."
            )
    last = record["cells"][-1]
    for candidate in last["candidates"]:
        if candidate["kl"]["value"] <= ROUNDING_FACTOR * last["rounding_kl"]:
            yield (
                f"≈ {candidate['name']} cannot be told from rounding, with however many prompts: "
                f"it lies under {ROUNDING_FACTOR} times the rounding floor."
            )


def _notes_on_prompts(record: Record) -> Iterator[str]:
    trial, chosen = record["trial"], record["recommended"]
    if trial["left_out"] and trial["prefix"] is not None:
        yield (
            f"Left out as too short for the longest prefix, {trial['prefix']} tokens: "
            f"{trial['left_out']} of the documents read. All prefixes are of the same documents."
        )
    if trial["wanted"]:
        yield (
            f"{trial['wanted']} prompts were asked for; the source has {trial['n_prompts']} that "
            "fit."
        )
    if chosen and trial["available"] is not None and chosen["n_prompts"] > trial["available"]:
        which = "" if trial["prefix"] is None else " of the longest prefix"
        yield (
            f"{trial['source']} has {trial['available']} prompts{which}: for more use --prompts "
            "self, a file or a dataset (hf:)."
        )
