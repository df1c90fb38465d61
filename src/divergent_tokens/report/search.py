"""What a search found, for a terminal and as Markdown; records in, runs no model."""

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from divergent_tokens.report.numbers import MISSING, estimate, number, percent
from divergent_tokens.report.tables import (
    Record,
    Section,
    harmless,
    markdown_page,
    on_prompts,
    table,
)

UNSURE = 0.75
"""A pick that fewer resamples make is said to be unsure."""
MOST_NAMES = 3


def search_text(record: Record) -> RenderableType:
    """The search for a terminal: title, tables, notes."""
    record = harmless(record)
    parts: list[RenderableType] = [Text(title(record))]
    for columns, rows, heading in _sections(record):
        parts += [Text(f"\n{heading}", style="bold"), table(columns, rows)]
    parts.append(Text())
    parts += [Text(f"• {note}") for note in notes(record)]
    return Group(*parts)


def search_markdown(record: Record) -> str:
    """The same as Markdown."""
    record = harmless(record)
    return markdown_page(title(record), _sections(record), notes(record))


def title(record: Record) -> str:
    """What was chosen, by what, and what it takes."""
    offer = _chosen(record)
    if offer is None:
        return f"{record['base']['reference']}: no plan was asked for"
    counts = sorted(offer["schemes"].items(), key=lambda item: (-item[1], item[0]))
    schemes = ", ".join(f"{count} x {scheme}" for scheme, count in counts) or "nothing"
    return (
        f"{record['base']['reference']}: {schemes}; {percent(offer['share'])} of the bytes, "
        f"{number(offer['bits'])} bits a weight; chosen by {record['rank_by']}"
    )


def _chosen(record: Record) -> Record | None:
    """The offer that became the plan."""
    found = [offer for offer in record["around"] if offer["budget"] == record["budget"]]
    return found[0] if found else None


def _sections(record: Record) -> Iterator[Section]:
    if record["around"]:
        rows = [_offer(offer, record["budget"]) for offer in record["around"]]
        columns = ("budget", "changed", "bytes", "bits", "KL", "SDT", "FDT")
        yield columns, rows, "What may be expected on other prompts"
    if record["measured"]:
        offer, measured = _chosen(record), record["measured"]
        assert offer is not None, "only a plan is measured"
        predicted, metrics = offer["predicted"], measured["metrics"]
        rows = [
            [name, before, _measured(metrics, key)]
            for (name, key), before in zip(_METRICS, _predicted(predicted), strict=True)
        ]
        yield ("", "predicted", "measured"), rows, "The plan, " + _on(measured["prompts"])
    if record["curve"]:
        yield _curve(record["curve"])


_METRICS = (("KL", "kl"), ("SDT", "sdt"), ("FDT", "fdt"))


def _offer(offer: Record, chosen: Record) -> list[str]:
    budget = offer["budget"]
    value = percent(budget["value"]) if budget["unit"] == "budget" else f"{budget['value']:g}"
    mark = "▸ " if budget == chosen else "  "
    return [
        mark + value + {"budget": "", "bits": " bits", "count": " components"}[budget["unit"]],
        str(offer["n_components"]),
        percent(offer["share"]),
        number(offer["bits"]),
        *_predicted(offer["predicted"]),
    ]


def _predicted(predicted: Record) -> list[str]:
    """KL, SDT and FDT with their errors, or what is known instead."""
    if predicted["kl"] is None:
        return [f"> {_LIMIT}", MISSING, MISSING]
    error = predicted["kl_se"]
    kl = number(predicted["kl"]) + ("" if error is None else f"\n± {number(error, 2)}")
    return [
        kl,
        "\n".join(estimate(predicted["sdt"], as_percent=True)),
        "\n".join(estimate(predicted["fdt"])),
    ]


_LIMIT = 0.3
"""As in measure/flips.py, which this lane does not import."""


def _measured(metrics: Record, name: str) -> str:
    return "\n".join(estimate(metrics[name], as_percent=name == "sdt"))


def _on(prompts: Record) -> str:
    return f"predicted and measured {on_prompts(prompts, prompts['new_tokens'])}"


def _curve(points: Sequence[Record]) -> Section:
    rows = []
    for point in points:
        metrics = point["measured"]["metrics"]
        cells = [point["rank_by"], str(point["n_components"]), percent(point["share"])]
        for (_, key), before in zip(_METRICS, _predicted(point["predicted"]), strict=True):
            after = _measured(metrics, key)
            cells.append(" → ".join(text.partition("\n")[0] for text in (before, after)))
        rows.append(cells)
    columns = ("order", "changed", "bytes", *(name for name, _ in _METRICS))
    return columns, rows, "The curve, " + _on(points[0]["measured"]["prompts"])


def notes(record: Record) -> Iterator[str]:
    """What a reader must know to read the numbers rightly."""
    if record["around"]:
        yield from _notes_on_predictions(record)
    if record["picks"]:
        yield _note_on_picks(record["picks"])
    if record["gap"]:
        yield (
            f"This choice was not proven to be the best: no other of its size does less harm by "
            f"more than {number(record['gap'], 2)}."
        )
    if record["n_below_rounding"]:
        yield (
            f"{record['n_below_rounding']} KLs were measured below three times the rounding floor "
            "and are rounding rather than harm; the probe (dtm sweep --method probe) sees them."
        )
    steps = [record["measured"]] if record["measured"] else []
    steps += [point["measured"] for point in record["curve"] or ()]
    if steps and steps[0]["overlap"]:
        yield (
            f"{steps[0]['overlap']} of the {steps[0]['prompts']['n_prompts']} prompts measured on "
            "chose the plan too, which flatters it: leave them out with --skip-prompts."
        )
    elif steps:
        yield "None of the prompts measured on was among those that the sweep used."
    if record["refit"]:
        yield f"With these measurements the flip law has {_law(record['refit'])}."


def _notes_on_predictions(record: Record) -> Iterator[str]:
    law = record["law"]
    if law["sdt"]["n_measured"]:
        yield f"FDT and SDT by the flip law: {_law(law)}."
    else:
        yield (
            f"FDT and SDT by the flip law, not fitted on this base: {_law(law)}, as other bases "
            "have it. Fit it by a measured sweep, or by --fit-on plans that were measured."
        )
    if any(offer["predicted"]["kl"] is None for offer in record["around"]):
        yield (
            f"Above a KL of {_LIMIT} single components' KLs add up to less than the joint one, by "
            "up to half, so there is no number: measure, with --prompts."
        )
    predicted = record["around"][0]["predicted"]
    if predicted["cross_fitted"]:
        yield "KL is cross-fitted: prompts judge only what the others chose."
    else:
        yield "KL is summed over the prompts that the sweep used."


def _law(law: Record) -> str:
    parts = [
        f"σ/√KL = {number(law[name]['value'])} for {name.upper()} "
        f"(spread {percent(law[name]['spread'], 2)}, {law[name]['n_measured']} measured)"
        for name in ("sdt", "fdt")
    ]
    return " and ".join(parts)


def _note_on_picks(picks: Mapping[str, float]) -> str:
    unsure = sorted((share, name) for name, share in picks.items() if share < UNSURE)
    if not unsure:
        return f"All {len(picks)} decisions are made alike by {UNSURE:.0%} or more of resamples."
    named = ", ".join(f"{name} ({share:.0%})" for share, name in unsure[:MOST_NAMES])
    more = "" if len(unsure) <= MOST_NAMES else f" and {len(unsure) - MOST_NAMES} more"
    return (
        f"{len(unsure)} of {len(picks)} decisions are made alike by less than {UNSURE:.0%} of "
        f"resamples over prompts: {named}{more}."
    )
