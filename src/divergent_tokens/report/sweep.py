"""What a sweep found, for a terminal and as Markdown; records in, runs no model."""

from collections.abc import Iterator

from rich.console import RenderableType

from divergent_tokens.report.numbers import number, percent
from divergent_tokens.report.tables import (
    Record,
    Section,
    harmless,
    markdown_page,
    on_prompts,
    text_page,
)


def sweep_text(record: Record) -> RenderableType:
    """The sweep for a terminal: title, schemes, the components with the most KL, notes."""
    record = harmless(record)
    return text_page(title(record), _sections(record), notes(record))


def sweep_markdown(record: Record) -> str:
    """The same as Markdown."""
    record = harmless(record)
    return markdown_page(title(record), _sections(record), notes(record))


def title(record: Record) -> str:
    """What was swept, on what."""
    n = record["n_draws"]
    how = f"probed with {n} draw{'' if n == 1 else 's'} a prompt"
    if record["method"] == "measure":
        how = "measured one by one"
    elif record["method"] == "auto":
        how += f", and measured where a plan for {record['settled']['budget']} hangs on it,"
    return (
        f"{record['base']['reference']} ({record['dtype']}, {record['device']}), components {how} "
        f"{on_prompts(record['prompts'], record['new_tokens'])}"
    )


def _sections(record: Record) -> Iterator[Section]:
    rows = [
        [
            scheme["scheme"],
            str(scheme["n_components"]),
            percent(scheme["size_bytes"] / scheme["base_size_bytes"]),
            number(scheme["kl_sum"]),
            number(scheme["seconds"]),
        ]
        for scheme in record["schemes"]
    ]
    yield ("scheme", "components", "bytes", "sum of KL", "seconds"), rows, "Schemes"
    for scheme in record["schemes"]:
        rows = [
            [
                worst["component"],
                ("≈ " if worst["below_rounding"] else "") + number(worst["kl"]),
                "" if worst["kl_se"] is None else f"± {number(worst['kl_se'], 2)}",
                percent(worst["kl"] / scheme["kl_sum"]) if scheme["kl_sum"] else "",
            ]
            for worst in scheme["worst"]
        ]
        yield ("component", "KL", "", "of the sum"), rows, f"Most KL under {scheme['scheme']}"


def notes(record: Record) -> Iterator[str]:
    """What a reader must know to read the numbers rightly."""
    yield "KL: nats per token, of one component on its own; ± its standard error over prompts."
    for scheme in record["schemes"]:
        if scheme["n_below_rounding"]:
            yield (
                f"≈ {scheme['n_below_rounding']} of {scheme['n_components']} KLs under "
                f"{scheme['scheme']} were measured below three times the rounding floor "
                f"({number(record['rounding_kl'])}) and are rounding rather than harm; the probe "
                "(--method probe) sees them."
            )
    if record["settled"]:
        yield _settled(record["settled"])
    if record["passes"] not in (None, "from the changed layer on"):
        yield f"Every row took a full pass: this network cannot start midway ({record['passes']})."
    yield f"Rows are kept in {record['file']}; dtm search reads it."


def _settled(settled: Record) -> str:
    """How a plan came to rest."""
    looks = settled["looks"]
    n_rows = sum(len(look["pairs"]) for look in looks)
    passes = settled["passes"]
    changed = " then ".join(str(look["n_changed"]) for look in looks[1:]) or "no"
    rest = "" if looks[-1]["n_changed"] in (0, None) else "; it has not come to rest"
    return (
        f"{n_rows} row{'' if n_rows == 1 else 's'} measured, which changed {changed} decisions of "
        f"the plan{rest}: {number(passes['probe'])} passes for the probe and "
        f"{number(passes['measure'])} for the measurements, {settled['forward_tokens']} forward "
        f"tokens. {percent(looks[-1]['sureness'])} of the decisions are made alike by resamples "
        f"over prompts ({percent(looks[0]['sureness'])} before)."
    )
