"""Claims on pruning: what attention bears, and whether guiding pays after recovery."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from claim import HOLDS, IN_PART, NOT, UNKNOWN, Claim, Results, needed, table
from drawing import Chart, Point, Series

from divergent_tokens.report.numbers import number, percent

RECOVERY = "pruning-recovery"
WANTED_SPARSITY, QUARTER = 0.75, 0.25
KINDS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclass(frozen=True)
class Run:
    """One pruning of the recovery file."""

    way: str
    """Criterion, allocation, and `repair`."""
    seed: str
    more: tuple[str, ...]
    """Settings that differ from the others'."""
    found: Mapping[str, Any]

    @property
    def label(self) -> str:
        return ", ".join((self.way, *self.more))

    @property
    def is_guided(self) -> bool:
        return self.way.split("/")[1] not in ("uniform", "uniform-spared")

    @property
    def is_repaired(self) -> bool:
        return "repair" in self.way.split("/")

    @property
    def training(self) -> Mapping[str, Any]:
        """What must be alike in two runs that are held against each other."""
        settings = self.found["settings"].items()
        return {"seed": self.seed, **{k: v for k, v in settings if k != "n_saliency"}}


def recovered(results: Results) -> list[Run]:
    """All prunings to 75 %; empty where none was measured."""
    runs = []
    for name, found in (results(RECOVERY) or {"found": {}})["found"].items():
        way, sparsity, seed, *more = name.split(", ")
        if float(sparsity) == WANTED_SPARSITY:
            runs.append(Run(way, seed, tuple(more), found))
    return runs


def attention(results: Results) -> Claim:
    runs = [run for run in recovered(results) if run.is_guided]
    sparser = [run.found["attention"] > run.found["mlp"] for run in runs]
    beyond = [run.found["attention_beyond"] >= QUARTER for run in runs]
    verdict = UNKNOWN
    if runs:
        verdict = IN_PART if sum(sparser) > len(runs) / 2 or any(beyond) else NOT
        verdict = HOLDS if all(sparser) and all(beyond) else verdict
    rows = [
        [
            run.label,
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
    chart = Chart(
        "Zeros by kind of matrix, guided to 75 %",
        "kind",
        "share of zeros, a mean over layers",
        tuple(
            Series(
                word,
                tuple(_by_kind(run for run in runs if run.is_repaired is repaired)),
                joined=False,
            )
            for word, repaired in (("without repair", False), ("with repair", True))
        ),
        x_names=KINDS,
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
        results=("pruning-one-shot", *((RECOVERY,) if runs else ())),
        figures=(("attention", chart),) if runs else (),
    )


def _by_kind(runs: Iterable[Run]) -> Iterator[Point]:
    """Zeros of q, k, v, ... in each run, a mean over the layers."""
    for run in runs:
        shares = run.found["sparsities"]
        for place, kind in enumerate(KINDS):
            own = [share for name, share in shares.items() if name.endswith(f".{kind}_proj")]
            yield Point(place, sum(own) / len(own))


def guided(results: Results) -> Claim:
    pairs = _pairs(recovered(results))
    won = [[_ratio(metric, *pair) < 1 for pair in pairs] for metric in ("ppl", "sdt")]
    verdict = UNKNOWN
    if pairs:
        verdict = IN_PART if any(sum(wins) > len(wins) / 2 for wins in won) else NOT
        verdict = HOLDS if all(map(all, won)) else verdict
    once = needed(results, "pruning-one-shot")["found"]
    shown = (
        "magnitude/uniform",
        "magnitude/kl",
        "wanda/uniform",
        "wanda/kl",
        "fisher/global",
        "fisher/global/repair",
        "fisher/global/correct3",
    )
    series = []
    for way in shown:
        points = sorted(
            (float(name.split(", ")[1]), row["ppl"])
            for name, row in once.items()
            if name.startswith(f"{way}, ")
        )
        series.append(Series(way, tuple(Point(100 * at, ppl) for at, ppl in points)))
    found = [_ratios(pairs)] if pairs else ["With recovery between rounds: not measured yet."]
    half = {way: once[f"{way}, 0.5, seed 0"]["ppl"] for way in shown}
    found.append(
        "In one shot at 50 %, without training: magnitude has a perplexity of "
        f"{number(half[shown[0]])} uniform and {number(half[shown[1]])} guided by KL, Wanda "
        f"{number(half[shown[2]])} and {number(half[shown[3]])}, Fisher with one threshold "
        f"{number(half[shown[4]])}, with repair {number(half[shown[5]])}, corrected "
        f"{number(half[shown[6]])}."
    )
    return Claim(
        title="Guided beats uniform at 75 %",
        said=(
            "With training between rounds, sparsity allotted by the metric ends at a lower "
            "perplexity than uniform sparsity (the paper: 8.10 and 13.51, Llama-2-13B)."
        ),
        rule=(
            "Every guided run to 75 % with recovery against every uniform one of its seed and "
            "training (repair and the sequences that saliencies are seen on may differ): holds if "
            "perplexity and SDT are lower in every pair, in part if one of them is in most."
        ),
        verdict=verdict,
        found=tuple(found),
        limits=_pruning_limits(results),
        results=("pruning-one-shot", *((RECOVERY,) if pairs else ())),
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


def _pairs(runs: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Guided runs, each with every uniform one that was trained alike."""
    return [
        (run, rival)
        for run in runs
        if run.is_guided
        for rival in runs
        if not rival.is_guided and rival.training == run.training
    ]


def _ratio(metric: str, run: Run, rival: Run) -> float:
    return float(run.found["after"][metric] / rival.found["after"][metric])


def _ratios(pairs: Sequence[tuple[Run, Run]]) -> str:
    """A line for each kind of pair: guided over uniform, from the least to the greatest seed."""
    kinds: dict[tuple[str, str], list[tuple[Run, Run]]] = {}
    for run, rival in pairs:
        kinds.setdefault((run.label, rival.label), []).append((run, rival))
    rows = []
    for labels, alike in kinds.items():
        ratios = [sorted(_ratio(m, *pair) for pair in alike) for m in ("ppl", "sdt", "kl", "fdt")]
        cells = [" to ".join(dict.fromkeys(f"{x:.2f}" for x in (r[0], r[-1]))) for r in ratios]
        rows.append([*labels, str(len(alike)), *cells])
    return table(
        (
            "guided",
            "uniform",
            "seeds",
            "PPL, guided over uniform",
            "SDT",
            "KL",
            "FDT (more is better)",
        ),
        rows,
    )


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
