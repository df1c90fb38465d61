"""Claims on pruning: what attention bears, and whether guiding pays after recovery."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from claim import HOLDS, IN_PART, NOT, UNKNOWN, Claim, Results, needed, table
from drawing import Chart, Point, Series

from divergent_tokens.report.numbers import number, percent

RECOVERY = ("pruning-recovery", "pruning-recovery-magnitude")
"""Measured on texts that were cut a little differently: runs are held together within a file."""
WANTED_SPARSITY, QUARTER = 0.75, 0.25


@dataclass(frozen=True)
class Run:
    """One pruning of a recovery file."""

    file: str
    way: str
    seed: str
    found: Mapping[str, Any]

    @property
    def is_guided(self) -> bool:
        return self.way.split("/")[1] not in ("uniform", "uniform-spared")


def recovered(results: Results) -> list[Run]:
    """All prunings to 75 %; empty where none was measured."""
    runs = []
    for file in RECOVERY:
        for name, found in (results(file) or {"found": {}})["found"].items():
            way, sparsity, seed = name.split(", ")
            if float(sparsity) == WANTED_SPARSITY:
                runs.append(Run(file, way, seed, found))
    return runs


def attention(results: Results) -> Claim:
    # Of some runs the printed line alone is left.
    runs = [run for run in recovered(results) if run.is_guided and "attention" in run.found]
    sparser = [run.found["attention"] > run.found["mlp"] for run in runs]
    beyond = [run.found["attention_beyond"] >= QUARTER for run in runs]
    verdict = UNKNOWN
    if runs:
        verdict = IN_PART if sum(sparser) > len(runs) / 2 or any(beyond) else NOT
        verdict = HOLDS if all(sparser) and all(beyond) else verdict
    rows = [
        [
            run.way,
            run.seed,
            percent(run.found["attention"]),
            percent(run.found["mlp"]),
            percent(run.found["attention_beyond"]),
        ]
        for run in runs
    ]
    once = needed(results, "pruning-one-shot")["found"]
    most, where = max((row["attention_beyond"], name) for name, row in once.items())
    found = [
        f"In one shot, without training, at most {percent(most)} of the attention matrices end "
        f"beyond 90 % zeros ({where})."
    ]
    if runs:
        columns = ("criterion/allocation", "", "attention", "MLP", "attention beyond 90 %")
        found.insert(0, table(columns, rows))
    else:
        found.insert(0, "With recovery between rounds: not measured yet.")
    ways = tuple(dict.fromkeys(run.way for run in runs))
    chart = Chart(
        "Zeros in attention and MLP matrices at 75 %",
        "criterion/allocation",
        "share of zeros, a mean over matrices",
        tuple(
            Series(
                word,
                tuple(Point(ways.index(run.way), run.found[key]) for run in runs),
                joined=False,
            )
            for word, key in (("attention", "attention"), ("MLP", "mlp"))
        ),
        x_names=ways,
    )
    return Claim(
        title="Attention prunes further than MLP, a quarter of it beyond 90 %",
        said=(
            "Guided pruning to 75 % leaves a quarter of the attention matrices with over 90 % "
            "zeros."
        ),
        rule=(
            "Over all guided runs to 75 % with recovery: holds if in every one attention "
            "matrices are sparser than MLP matrices on average and a quarter or more of them end "
            "beyond 90 %; in part if attention is the sparser in most runs, or a quarter is "
            "reached in one."
        ),
        verdict=verdict,
        found=tuple(found),
        limits=_pruning_limits(results),
        results=("pruning-one-shot", *dict.fromkeys(run.file for run in runs)),
        figures=(("attention", chart),) if runs else (),
    )


def guided(results: Results) -> Claim:
    runs = recovered(results)
    rows, wins = [], []
    for run in (run for run in runs if run.is_guided):
        rival = _rival(run, runs)
        if rival is None:
            continue
        ours, theirs = run.found["after"], rival.found["after"]
        won = [ours[metric] < theirs[metric] for metric in ("ppl", "sdt")]
        wins.append(won)
        cells = [f"{number(ours['ppl'])}, {number(theirs['ppl'])}"]
        cells += [f"{percent(ours['sdt'])}, {percent(theirs['sdt'])}"]
        cells += [f"{number(ours[m])}, {number(theirs[m])}" for m in ("kl", "fdt")]
        rows.append([f"{run.way}, {rival.way}", run.seed, *cells])
    verdict = UNKNOWN
    if wins:
        n_better = [sum(won[i] for won in wins) for i in (0, 1)]
        verdict = IN_PART if max(n_better) > len(wins) / 2 else NOT
        verdict = HOLDS if n_better == [len(wins)] * 2 else verdict
    once = needed(results, "pruning-one-shot")["found"]
    shown = (
        "magnitude/uniform",
        "magnitude/kl",
        "wanda/uniform",
        "wanda/kl",
        "fisher/global",
        "fisher/global/repair",
    )
    series = []
    for way in shown:
        points = sorted(
            (float(name.split(", ")[1]), row["ppl"])
            for name, row in once.items()
            if name.startswith(f"{way}, ")
        )
        series.append(Series(way, tuple(Point(100 * at, ppl) for at, ppl in points)))
    found = [table(("guided, uniform", "", "PPL", "SDT", "KL", "FDT"), rows)] if rows else []
    found = found or ["With recovery between rounds: not measured yet."]
    half = {way: once[f"{way}, 0.5, seed 0"]["ppl"] for way in shown}
    found.append(
        "In one shot at 50 %, without training: magnitude has a perplexity of "
        f"{number(half[shown[0]])} uniform and {number(half[shown[1]])} guided by KL, Wanda "
        f"{number(half[shown[2]])} and {number(half[shown[3]])}, Fisher with one threshold "
        f"{number(half[shown[4]])} and with repair {number(half[shown[5]])}."
    )
    return Claim(
        title="Guided beats uniform at 75 %",
        said=(
            "With training between rounds, sparsity allotted by the metric ends at a lower "
            "perplexity than uniform sparsity (the paper: 8.10 and 13.51, Llama-2-13B)."
        ),
        rule=(
            "Every guided run to 75 % with recovery against the uniform one of its seed (and "
            "criterion, where there is one): holds if perplexity and SDT are lower in every "
            "pair, in part if one of them is in most."
        ),
        verdict=verdict,
        found=tuple(found),
        limits=_pruning_limits(results),
        results=("pruning-one-shot", *(dict.fromkeys(run.file for run in runs) if wins else ())),
        figures=(
            (
                "pruning",
                Chart(
                    "One shot, no training",
                    "% zeros",
                    "perplexity",
                    tuple(series),
                    log_y=True,
                ),
            ),
        ),
    )


def _rival(run: Run, runs: Sequence[Run]) -> Run | None:
    """The uniform run to hold a guided one against: of its file and seed, as alike as there is."""
    criterion, _, *more = run.way.split("/")

    def likeness(other: Run) -> tuple[bool, bool, bool]:
        parts = other.way.split("/")
        return parts[1] == "uniform", parts[2:] == more, parts[0] == criterion

    alike = (r for r in runs if not r.is_guided and (r.file, r.seed) == (run.file, run.seed))
    return max(alike, key=likeness, default=None)


def _pruning_limits(results: Results) -> str:
    runs = recovered(results)
    n = len({run.seed for run in runs if run.is_guided})
    if not n:
        return "One seed, one shot, one small model whose weights were stored in 4 bits before."
    seeds = "One seed of the guided runs" if n == 1 else f"{n} seeds"
    return (
        f"{seeds}; values without intervals over seeds. One small model with little room: SmolLM2 "
        "at 75 % is damaged far beyond what a 13B model is. Its weights were stored in 4 bits "
        "before."
    )
