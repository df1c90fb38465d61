"""The verdict in words with numbers: which candidates drift, how far, and where."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from divergent_tokens.report import verification
from divergent_tokens.report.figures.law import verdict as noise_verdict
from divergent_tokens.report.numbers import in_words, number, percent
from divergent_tokens.report.records import Source
from divergent_tokens.report.tables import Record, harmless
from divergent_tokens.report.text import (
    NEAR_TIES_WORTH_A_NOTE,
    ROUNDING_FACTOR,
    indistinguishable,
    ordered,
)

SAME, DRIFTS, GOOD, BAD, PLAIN = "same", "drifts", "good", "bad", "plain"
WORDS = {
    SAME: "as good as the base",
    DRIFTS: "drifts",
    GOOD: "as planned",
    BAD: "not as planned",
    PLAIN: "",
}
HALF = 0.5
FAR = 1000
"""Times the rounding floor beyond which the number of times says nothing more."""


@dataclass(frozen=True)
class Verdict:
    """What is to be said of one thing."""

    status: str
    """One of the five above: it chooses a colour and a word."""
    name: str
    sentence: str
    """The numbers."""
    details: Sequence[str] = ()
    """Where, and of what kind."""
    share: float | None = None
    """FDT of the most there could be, for a bar; None where there is no such number."""

    @property
    def word(self) -> str:
        """The status, said."""
        return WORDS[self.status]


def headline(sources: Sequence[Source]) -> str:
    """The verdict on all in one sentence."""
    parts = []
    for source in sources:
        record = harmless(source.record)
        if source.kind == "comparison":
            parts.append(_of_candidates(record))
        if source.kind == "verification":
            parts.append(f"{verification.title(record)}.")
        if source.kind == "pruning":
            parts.append(_pruned(record))
    if parts:
        return " ".join(parts)
    return " ".join(one.sentence for one in verdicts(sources)[:2])


def verdicts(sources: Sequence[Source]) -> list[Verdict]:
    """The verdict on each candidate, plan, sweep, pruning and checkpoint."""
    found: list[Verdict] = []
    for source in sources:
        record = harmless(source.record)
        if source.kind == "comparison":
            found += _candidates(record, harmless(source.noise))
        elif source.kind == "plan":
            found.append(_plan(record, source.name))
        elif source.kind == "sweep":
            found.append(_sweep(record, source.name))
        elif source.kind == "curve":
            found.append(_curve(record, source.name))
        elif source.kind == "pruning":
            found.append(_pruning(record, source.name))
        elif source.kind == "verification":
            found.append(_verification(record, source.name))
    return found


# --- candidates ---


def _of_candidates(record: Record) -> str:
    candidates = ordered(record)
    same = [c["name"] for c in candidates if indistinguishable(c["metrics"], record["rounding"])]
    apart = [c for c in candidates if c["name"] not in same]
    parts = []
    if same:
        verb = "is" if len(same) == 1 else "are"
        parts.append(f"{_listed(same)} {verb} indistinguishable from rounding")
    if apart:
        closest, farthest = apart[0], apart[-1]
        stays = "parts" if len(apart) == 1 else "stays closest, parting"
        parts.append(f"{closest['name']} {stays} {_parting(closest['metrics'])}")
    if len(apart) > 1:
        parts.append(f"{farthest['name']} drifts most, parting {_parting(farthest['metrics'])}")
    return "; ".join(parts) + "."


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _parting(metrics: Record) -> str:
    fdt, length = number(metrics["fdt"]["value"]), metrics["mean_length"]
    if metrics["identical"] == 1:
        return f"on no prompt within {length:.3g} tokens"
    return f"after {fdt} of {length:.3g} tokens on average"


def _candidates(record: Record, noise: Record) -> Iterator[Verdict]:
    judged = {one["name"]: one for one in noise.get("candidates", ())}
    for candidate in ordered(record):
        metrics, name = candidate["metrics"], candidate["name"]
        same = indistinguishable(metrics, record["rounding"])
        details = [] if same else list(_details(record, candidate, judged.get(name)))
        yield Verdict(
            SAME if same else DRIFTS,
            name,
            _sentence(metrics, record["rounding"], same=same),
            details,
            metrics["fdt"]["value"] / metrics["mean_length"],
        )


def _sentence(metrics: Record, rounding: Record, *, same: bool) -> str:
    fdt, sdt = (in_words(metrics[name], as_percent=name == "sdt") for name in ("fdt", "sdt"))
    said = (
        f"Writes {fdt} of {metrics['mean_length']:.3g} tokens as the base does before the first "
        f"other one; {sdt} of all tokens differ."
    )
    if same:
        return f"{said} That is under {ROUNDING_FACTOR} times what rounding alone does."
    if metrics["kl"] and rounding["kl"]["value"] > 0:
        times = metrics["kl"]["value"] / rounding["kl"]["value"]
        said += f" Its KL is {number(metrics['kl']['value'])} nats per token, "
        said += "far above rounding." if times > FAR else f"{number(times, 2)} times rounding's."
    return said


def _details(record: Record, candidate: Record, judged: Record | None) -> Iterator[str]:
    metrics = candidate["metrics"]
    for key, what in (("by_domain", "domain"), ("by_language", "language")):
        if len(metrics[key]) > 1:
            yield _where(metrics, key, what)
    if metrics["near_ties"] is not None and metrics["near_ties"] >= NEAR_TIES_WORTH_A_NOTE:
        yield f"{percent(metrics['near_ties'])} of its first divergences are near ties of the base."
    if judged is not None:
        said = noise_verdict(judged)
        yield f"{said[0].upper()}{said[1:]}."
        odd = [
            group
            for key in ("by_domain", "by_language")
            for group, one in judged[key].items()
            if False in (one["sdt"]["ordinary"], one["fdt"]["ordinary"])
        ]
        if odd and not judged["reason"]:
            yield f"By domain and language it is other than noise in {_listed(odd)}."


def _where(metrics: Record, key: str, what: str) -> str:
    """The groups whose whole interval lies above the candidate's own SDT, worst first."""
    own = metrics["sdt"]["value"]
    found = {group: part["sdt"] for group, part in metrics[key].items()}
    worse = [g for g, sdt in found.items() if sdt["low"] is not None and sdt["low"] > own]
    if not worse:
        return f"No {what} stands out beyond its interval."
    worse.sort(key=lambda group: -found[group]["value"])
    named = _listed([f"{group} ({percent(found[group]['value'])})" for group in worse])
    return f"More than elsewhere in {named}."


# --- the other records ---


def _plan(record: Record, name: str) -> Verdict:
    schemes = _counts(record["components"])
    share = record["size_bytes"] / record["base_size_bytes"] if record["base_size_bytes"] else None
    steps: Mapping[str, Record] = {step["step"]: step for step in record["trail"]}
    details = []
    if "search" in steps:
        predicted = steps["search"]["predicted"]
        if predicted["kl"] is None:
            details.append("Its KL is expected to be above 0.3, where nothing more is predicted.")
        else:
            details.append(
                f"Expected: KL {number(predicted['kl'])}, SDT "
                f"{in_words(predicted['sdt'], as_percent=True)}, FDT {in_words(predicted['fdt'])}."
            )
    if "measured" in steps:
        metrics = steps["measured"]["metrics"]
        details.append(
            f"Measured on {steps['measured']['prompts']['n_prompts']} prompts: KL "
            f"{in_words(metrics['kl'])}, SDT {in_words(metrics['sdt'], as_percent=True)}, FDT "
            f"{in_words(metrics['fdt'])}."
        )
    return Verdict(PLAIN, name, f"The plan: {schemes}; {percent(share)} of the bytes.", details)


def _counts(components: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for scheme in components.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} x {scheme}" for scheme, count in ranked) or "nothing changed"


def _sweep(record: Record, name: str) -> Verdict:
    details = []
    for scheme in record["schemes"]:
        found = {
            c["name"]: c["options"][scheme]["kl"]
            for c in record["components"]
            if scheme in c["options"]
        }
        worst = sorted(found, key=found.__getitem__, reverse=True)
        total, n, sum_ = sum(found.values()), 0, 0.0
        if not total:
            details.append(f"Under {scheme} no component does any harm.")
            continue
        while n < len(worst) and sum_ < HALF * total:
            sum_ += found[worst[n]]
            n += 1
        details.append(
            f"Under {scheme} {n} of {len(worst)} components do half of the harm, {worst[0]} most "
            f"of all (KL {number(found[worst[0]])} of {number(total)})."
        )
    n = len(record["components"])
    return Verdict(PLAIN, name, f"{n} components, each judged on its own.", details)


def _curve(record: Record, name: str) -> Verdict:
    orders: dict[str, list[Record]] = {}
    for point in record["points"]:
        orders.setdefault(point["rank_by"], []).append(point)
    details = []
    for order, points in orders.items():
        most = max(points, key=lambda point: point["n_components"])
        fdt = in_words(most["measured"]["metrics"]["fdt"])
        details.append(f"By {order}: FDT {fdt} with {most['n_components']} components converted.")
    n = len(record["points"])
    return Verdict(PLAIN, name, f"{n} plans of several sizes, measured.", details)


def _pruned(record: Record) -> str:
    metrics, n = record["metrics"], len(record["rounds"])
    zeros = percent(record["rounds"][-1]["sparsity"])
    return (
        f"{zeros} zeros after {n} round{'' if n == 1 else 's'}: "
        f"FDT {in_words(metrics['fdt'])}, SDT {in_words(metrics['sdt'], as_percent=True)}."
    )


def _pruning(record: Record, name: str) -> Verdict:
    metrics, last = record["metrics"], record["rounds"][-1]
    details = []
    if record["base_ppl"] is not None:
        details.append(
            f"Perplexity {number(last['after']['ppl'])}, the base's {number(record['base_ppl'])}."
        )
    most = metrics["mean_length"]
    return Verdict(PLAIN, name, _pruned(record), details, metrics["fdt"]["value"] / most)


def _verification(record: Record, name: str) -> Verdict:
    failed = [f"{c['name']}: {c['found']}" for c in record["checks"] if not c["passed"]]
    said = f"{verification.title(record)}."
    details = failed or [f"All {len(record['checks'])} checks passed."]
    return Verdict(GOOD if record["passed"] else BAD, name, said, details)
