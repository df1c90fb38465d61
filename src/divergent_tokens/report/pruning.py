"""What a pruning did, for a terminal and as Markdown; records in, runs no model."""

from collections import defaultdict
from collections.abc import Iterator

from rich.console import RenderableType

from divergent_tokens.report.numbers import in_words, number, percent
from divergent_tokens.report.tables import (
    Record,
    Section,
    harmless,
    markdown_page,
    on_prompts,
    text_page,
)

MORE = 0.01
"""So much more than was asked for is said."""
BEYOND = 0.9
"""The paper counts attention matrices that end sparser than this."""


def pruning_text(record: Record) -> RenderableType:
    """The pruning for a terminal: title, rounds, kinds of matrices, notes."""
    record = harmless(record)
    return text_page(title(record), sections(record), notes(record))


def pruning_markdown(record: Record) -> str:
    """The same as Markdown."""
    record = harmless(record)
    return markdown_page(title(record), sections(record), notes(record))


def title(record: Record) -> str:
    """What was pruned, how, and on what it is reported."""
    settings = record["settings"]
    pattern = settings["pattern"]
    how = f"{pattern[0]}:{pattern[1]}" if pattern else percent(settings["sparsity"])
    criterion = (
        settings["criterion"] if pattern else f"{settings['criterion']}, {settings['allocate']}"
    )
    prompts = on_prompts(record["prompts"], record["prompts"]["new_tokens"])
    return f"{record['base']['reference']} pruned to {how} by {criterion}; reported {prompts}"


def sections(record: Record) -> Iterator[Section]:
    """Rounds, the end with intervals, and zeros by kind."""
    rows = []
    for one in record["rounds"]:
        after = one["after"]
        rows.append(
            [
                str(one["round"]),
                percent(one["sparsity"]),
                number(one["loss"]),
                number(one["before"]["fdt"]),
                number(after["fdt"]),
                percent(after["sdt"]),
                number(after["kl"]),
                number(after["ppl"]),
            ]
        )
    columns = ("round", "zeros", "loss", "FDT cut", "FDT", "SDT", "KL", "PPL")
    yield columns, rows, "Rounds, before and after training"
    found = {"pruned": record["metrics"]}
    if record.get("plan"):
        found = {"pruned": record["metrics_without_plan"], "under the plan": record["metrics"]}
    rows = [[name, *_estimates(metrics)] for name, metrics in found.items()]
    yield ("", "FDT", "SDT", "KL"), rows, "At the end, with intervals"
    yield (
        ("kind", "matrices", "zeros", f"beyond {percent(BEYOND)}"),
        _kinds(record),
        "Zeros by kind",
    )


def _estimates(metrics: Record) -> list[str]:
    return [in_words(metrics[name], as_percent=name == "sdt") for name in ("fdt", "sdt", "kl")]


def _kinds(record: Record) -> list[list[str]]:
    groups: dict[str, list[Record]] = defaultdict(list)
    for component in record["components"]:
        groups[component["kind"]].append(component)
    rows = []
    for kind, members in groups.items():
        shares = [m["n_zero"] / m["n_parameters"] for m in members]
        zeros = sum(m["n_zero"] for m in members) / sum(m["n_parameters"] for m in members)
        beyond = sum(share > BEYOND for share in shares)
        rows.append([kind, str(len(members)), percent(zeros), str(beyond)])
    return rows


def _seen(record: Record) -> str:
    """What was seen, and trained on."""
    data = record["data"]
    n, trained_on = data.get("n_saliency", data["n_sequences"]), data["n_sequences"]
    where = f"sequences of {data['length']} tokens from {data['source']}"
    if all(one["loss"] is None for one in record["rounds"]):
        return f"Seen on {n} {where}"
    if n == trained_on:
        return f"Seen and trained on {n} {where}"
    return f"Trained on {trained_on} {where}, and seen on {n} of them in each round"


def _overlap(record: Record) -> Iterator[str]:
    for name, share in record["data"].get("overlap", {}).items():
        if share:
            yield (
                f"Of the {name}, {percent(share)} stand in these sequences: the more, the better "
                "results look than they are."
            )


def notes(record: Record) -> Iterator[str]:
    """What a reader must know to read the numbers rightly."""
    if record["base_ppl"] is not None:
        yield f"The base has a perplexity of {number(record['base_ppl'])} on the text."
    if record.get("plan"):
        yield (
            "Rounds are measured under the plan; plan.json in the folder is the same plan for what "
            "was written: dtm compress packs both."
        )
    last = record["rounds"][-1]
    if last["sparsity"] > last["target"] + MORE:
        yield (
            f"{percent(last['sparsity'])} of the weights are zero where {percent(last['target'])} "
            "were asked for: what was zero before stays zero, and some matrices had more than "
            "their share."
        )
    others = record.get("n_not_pruned")
    if others:
        yield (
            f"The share is of the {len(record['components'])} matrices that were chosen; {others} "
            "others of the layers were not pruned."
        )
    yield f"{_seen(record)}; keep the prompts and the text apart from them."
    yield from _overlap(record)
    looks = record["settings"].get("corrections")
    if looks:
        times = "once" if looks == 1 else f"{looks} times"
        yield f"Each cut was made again {times} by what it costs each matrix (--correct)."
    left = [str(one["round"]) for one in record["rounds"] if one.get("repaired") is False]
    if left:
        yield (
            f"The repair was not kept in {len(left)} of {len(record['rounds'])} rounds "
            f"({', '.join(left)}): on other sequences the model was closer without it."
        )
    unseen = record["rounds"][-1].get("unseen")
    if unseen:
        yield (
            f"No token of the sequences was sent to {len(unseen)} matrices of experts (such as "
            f"{unseen[0]}); they count as the average of their layer's others."
        )
    yield (
        "Zeros alone make nothing faster: weights are stored dense, and no common server skips "
        "them."
    )
    if "folder" in record:  # not in the file, which may have been moved
        yield f"Written to {record['folder']}, the record as pruning.json in it."
