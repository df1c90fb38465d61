"""What stands on the page, in which order: chapters of figures and tables, by topic."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from divergent_tokens.report import pruning, verification
from divergent_tokens.report.figures.budget import Measured, budget
from divergent_tokens.report.figures.curve import curve
from divergent_tokens.report.figures.figure import Figure
from divergent_tokens.report.figures.groups import groups
from divergent_tokens.report.figures.law import law, margins
from divergent_tokens.report.figures.model_map import model_map
from divergent_tokens.report.figures.rounds import allocation, rounds
from divergent_tokens.report.figures.sizes import sizes
from divergent_tokens.report.figures.survival import distributions, survival
from divergent_tokens.report.records import Source
from divergent_tokens.report.tables import Record, Section, harmless, on_one_line
from divergent_tokens.report.text import HEADERS, cells, notes, other_sections, title

_NARROWED = ("--include", "--exclude")
"""Options of `dtm compare` under which a scheme's candidate is not all of the sweep's."""


@dataclass(frozen=True)
class Part:
    """What one record adds to a chapter."""

    title: str
    """The record's file and what it is of."""
    tables: Sequence[Section] = ()
    figures: Sequence[Figure] = ()
    notes: Sequence[str] = ()
    slider: int | None = None
    """Which sweep's slider stands here, counted over the page."""


@dataclass(frozen=True)
class Chapter:
    """One topic."""

    name: str
    """Its place on the page."""
    title: str
    lead: str
    """What the reader finds here."""
    parts: Sequence[Part] = field(default=())


def chapters(sources: Sequence[Source]) -> list[Chapter]:
    """All chapters that the records have something for."""
    by_kind: dict[str, list[Source]] = {}
    for source in sources:
        by_kind.setdefault(source.kind, []).append(source)
    comparisons = by_kind.get("comparison", [])
    found = [
        Chapter(
            "agreement",
            "Agreement with the base",
            "How many tokens each candidate writes as the base does, and how close its "
            "distributions stay.",
            [_agreement(source, i) for i, source in enumerate(comparisons)],
        ),
        Chapter(
            "where",
            "Where they drift",
            "The same numbers by the prompts' domain and language.",
            list(_where(comparisons)),
        ),
        Chapter(
            "map",
            "Map of the model",
            "Which matrices can bear compression, and what was done to them.",
            list(_maps(by_kind)),
        ),
        Chapter(
            "curve",
            "The paper's curve",
            "More and more components compressed, in the order of each measure of harm.",
            list(_curves(by_kind)),
        ),
        Chapter(
            "budget",
            "Budget",
            "What any size may be expected to cost, computed on this page from the sweep.",
            list(_budgets(by_kind)),
        ),
        Chapter(
            "noise",
            "The flip law",
            "Where this model's damage is ordinary noise, and where it is something else.",
            list(_laws(comparisons)),
        ),
        Chapter(
            "pruning",
            "Pruning",
            "Round by round, and who lost how many weights.",
            [_pruning(source, i) for i, source in enumerate(by_kind.get("pruning", []))],
        ),
        Chapter(
            "verification",
            "Verification",
            "What plain transformers makes of the checkpoint, against its plan.",
            [_verification(source) for source in by_kind.get("verification", [])],
        ),
    ]
    return [chapter for chapter in found if chapter.parts]


def _name(word: str, i: int) -> str:
    return word if i == 0 else f"{word}-{i + 1}"


# --- comparisons ---


def _agreement(source: Source, i: int) -> Part:
    record = harmless(source.record)
    names = {c["name"]: c["name"] for c in record["candidates"]}
    rows = [[on_one_line(cell) for cell in row] for row in cells(record, names)]
    return Part(
        f"{source.name}: {title(record)}",
        [(HEADERS, rows, "All candidates"), *_on_one_line(other_sections(record, names))],
        [survival(record, _name("survival", i)), distributions(record, _name("fdt", i))],
        list(notes(record)),
    )


def _on_one_line(sections: Iterable[Section]) -> Iterator[Section]:
    for columns, rows, heading in sections:
        yield columns, [[on_one_line(cell) for cell in row] for row in rows], heading


def _where(comparisons: Sequence[Source]) -> Iterator[Part]:
    for i, source in enumerate(comparisons):
        found = groups(harmless(source.record), _name("groups", i))
        if found is not None:
            yield Part(source.name, figures=[found])


def _laws(comparisons: Sequence[Source]) -> Iterator[Part]:
    for i, source in enumerate(comparisons):
        record = harmless(source.record)
        drawn = law(record, harmless(source.noise), _name("law", i))
        figures = [drawn] if drawn is not None else []
        yield Part(source.name, figures=[*figures, margins(record, _name("margins", i))])


# --- components ---


def _maps(by_kind: Mapping[str, Sequence[Source]]) -> Iterator[Part]:
    """One map of a sweep with all plans and prunings; each further sweep has its own."""
    sweeps = by_kind.get("sweep", [])
    plans = {source.name: source.record for source in by_kind.get("plan", [])}
    prunings = {source.name: source.record for source in by_kind.get("pruning", [])}
    first = sweeps[0] if sweeps else None
    found = model_map(
        "map", sweep=None if first is None else first.record, plans=plans, prunings=prunings
    )
    if found is not None:
        yield Part("" if first is None else first.name, figures=[found])
    for i, source in enumerate(sweeps[1:], 1):
        more = model_map(_name("map", i), sweep=source.record)
        assert more is not None, "a sweep has rows"
        yield Part(source.name, figures=[more])


def _curves(by_kind: Mapping[str, Sequence[Source]]) -> Iterator[Part]:
    for i, (name, points) in enumerate(_points(by_kind)):
        yield Part(name, figures=[curve(points, _name("curve", i))])


def _points(by_kind: Mapping[str, Sequence[Source]]) -> Iterator[tuple[str, Sequence[Record]]]:
    """The curves there are, in files of their own or in a plan's trail."""
    for source in by_kind.get("curve", []):
        yield source.name, source.record["points"]
    for source in by_kind.get("plan", []):
        for step in source.record["trail"]:
            if step["step"] == "curve" and step["points"]:
                yield source.name, step["points"]


def _budgets(by_kind: Mapping[str, Sequence[Source]]) -> Iterator[Part]:
    plans = {source.name: source.record for source in by_kind.get("plan", [])}
    for i, source in enumerate(by_kind.get("sweep", [])):
        measured = list(measured_points(by_kind, source.record))
        figures = [
            budget(source.record, measured, _name("budget", i)),
            sizes(source.record, plans, _name("sizes", i)),
        ]
        yield Part(source.name, figures=figures, slider=i)


def measured_points(by_kind: Mapping[str, Sequence[Source]], sweep: Record) -> Iterator[Measured]:
    """What was measured as a whole and has a size: plans, curves, and schemes on all components."""
    for source in by_kind.get("plan", []):
        record = source.record
        order = next((s["rank_by"] for s in record["trail"] if s["step"] == "search"), "kl")
        for step in record["trail"]:
            if step["step"] == "measured" and record["base_size_bytes"]:
                share = record["size_bytes"] / record["base_size_bytes"]
                yield Measured(source.name, share, step["metrics"], f"chosen by {order}")
    for _, points in _points(by_kind):
        for point in points:
            name = f"{point['n_components']} by {point['rank_by']}"
            order = f"chosen by {point['rank_by']}"
            yield Measured(name, point["share"], point["measured"]["metrics"], order)
    for source in by_kind.get("comparison", []):
        words = source.record["command"]
        if not any(word.startswith(_NARROWED) for word in (*words, *(sweep.get("command") or ()))):
            for candidate in source.record["candidates"]:
                share = _share(sweep, candidate["name"])
                if share is not None and _is_scheme(candidate["name"], words):
                    name = f"{candidate['name']} everywhere"
                    yield Measured(name, share, candidate["metrics"], "one scheme everywhere")


def _is_scheme(name: str, words: Sequence[str]) -> bool:
    """Whether a command names it after `--scheme`; a folder may be called like one."""
    return f"--scheme={name}" in words or ("--scheme", name) in pairwise(words)


def _share(sweep: Record, scheme: str) -> float | None:
    """Bytes under a scheme everywhere, of the base's; None unless every component has it."""
    options = [component["options"].get(scheme) for component in sweep["components"]]
    if any(option is None for option in options):
        return None
    base = sum(component["base_size_bytes"] for component in sweep["components"])
    return float(sum(option["size_bytes"] for option in options) / base)


# --- the rest ---


def _pruning(source: Source, i: int) -> Part:
    record = harmless(source.record)
    return Part(
        f"{source.name}: {pruning.title(record)}",
        list(pruning.sections(record))[1:],
        [rounds(record, _name("rounds", i)), allocation(record, _name("zeros", i))],
        list(pruning.notes(record)),
    )


def _verification(source: Source) -> Part:
    record = harmless(source.record)
    tables = list(_on_one_line(verification.sections(record)))
    return Part(
        f"{source.name}: {verification.title(record)}",
        tables,
        notes=list(verification.notes(record)),
    )
