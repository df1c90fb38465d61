"""Claims on what FDT sees: against perplexity, as an order of components, from how many prompts."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from claim import HOLDS, IN_PART, NOT, Claim, Results, apart, needed, point, table, with_interval
from drawing import Chart, Point, Series

from divergent_tokens.measure.widths import parse_widths
from divergent_tokens.report.numbers import number, percent

ALIKE, FAR = 0.01, 0.1


def perplexity(results: Results) -> Claim:
    held_out = needed(results, "gptq")["held_out"]
    ppl = {name: row["ppl"]["conventional"]["value"] for name, row in held_out.items()}
    alike = [
        (a, b) for a, b in itertools.combinations(held_out, 2) if abs(ppl[a] / ppl[b] - 1) < ALIKE
    ]

    def seen(metric: str) -> list[tuple[str, str]]:
        return [(a, b) for a, b in alike if apart(held_out[a][metric], held_out[b][metric])]

    def differ(metric: str) -> list[tuple[str, str]]:
        values = {name: row[metric]["value"] for name, row in held_out.items()}
        return [(a, b) for a, b in alike if abs(values[a] - values[b]) > FAR * values[b]]

    verdict = NOT
    if differ("fdt") or seen("sdt") or seen("kl"):
        verdict = IN_PART
    if seen("fdt"):
        verdict = HOLDS
    names = list(dict.fromkeys(itertools.chain(*alike)))
    rows = [
        [
            name,
            with_interval(held_out[name]["ppl"]["conventional"]),
            with_interval(held_out[name]["fdt"]),
            with_interval(held_out[name]["sdt"], as_percent=True),
            with_interval(held_out[name]["kl"]),
        ]
        for name in names
    ]
    drawn = [name for name in held_out if ppl[name] < 100]
    return Claim(
        title="Perplexity cannot see what FDT sees",
        said="Candidates of equal perplexity write different texts, and FDT shows it.",
        rule=(
            f"Among pairs of candidates whose perplexities differ by less than {ALIKE:.0%}: holds "
            "if the FDT intervals of one or more pairs do not overlap; in part if only the "
            f"values differ, by more than {FAR:.0%}, or only the intervals of SDT or KL do not "
            "overlap."
        ),
        verdict=verdict,
        found=(
            f"{len(alike)} of {len(ppl) * (len(ppl) - 1) // 2} pairs of {len(ppl)} candidates are "
            f"alike by perplexity. Of these, FDT differs by more than {FAR:.0%} in "
            f"{len(differ('fdt'))}, and intervals do not overlap in {len(seen('fdt'))} by FDT, "
            f"{len(seen('sdt'))} by SDT and {len(seen('kl'))} by KL.",
            table(("candidate", "perplexity", "FDT", "SDT", "KL"), rows),
        ),
        limits=(
            f"{held_out[names[0]]['ppl']['n_windows']} windows of text for perplexity and "
            f"{needed(results, 'gptq')['n_prompts']} prompts for the rest, one small model. The "
            "intervals are those of each candidate by itself; a test in pairs on the same "
            "prompts would be sharper, and its rows were not kept. Where the damage is large, "
            "perplexity sees it as well as FDT, which is then near 0."
        ),
        results=("gptq",),
        figures=(
            (
                "perplexity",
                Chart(
                    "FDT and perplexity of the same candidates",
                    "perplexity",
                    "FDT, tokens",
                    tuple(
                        Series(
                            name.replace("nearest on GPTQ's grid, ", "nearest, "),
                            (point(ppl[name], held_out[name]["fdt"]),),
                        )
                        for name in drawn
                    ),
                ),
            ),
        ),
    )


BY_FDT = "FDT, 256 prompts"
RIVALS = {"PPL": "PPL", "DPPL": "DPPL", "SDT, 256 prompts": "SDT"}
RUNS = (
    ("selection-timed", "int8:tensor"),
    ("selection-timed", "int8"),
    ("selection-int8-tensor", "int8:tensor"),
    ("selection-int8-channel", "int8"),
)
MOST = 2 / 3


def orders(results: Results) -> Claim:
    cells = []
    for name, scheme in RUNS:
        run = needed(results, name)
        cells += [(run["held_out"], scheme, k) for k in run["counts"]]
    beaten, rows = [], []
    for rival, short in RIVALS.items():
        pairs = [
            (held[f"{scheme}, {BY_FDT}, {k}"]["fdt"], held[f"{scheme}, {rival}, {k}"]["fdt"])
            for held, scheme, k in cells
        ]
        above = sum(a["value"] > b["value"] for a, b in pairs)
        clear = sum(a["low"] > b["high"] for a, b in pairs)
        below = sum(b["low"] > a["high"] for a, b in pairs)
        if above >= MOST * len(pairs) and not below:
            beaten.append(short)
        rows.append([short, f"{above} of {len(pairs)}", str(clear), str(below)])
    first = needed(results, RUNS[0][0])
    shown = [BY_FDT, "SDT, 256 prompts", "KL, 256 prompts", "weight error", "PPL", "DPPL"]
    figures = tuple(
        (
            f"orders-{word}",
            Chart(
                f"Held-out FDT after the k best components, int8 per {word}",
                "components converted",
                "FDT, tokens",
                tuple(
                    Series(
                        order,
                        tuple(
                            point(k, first["held_out"][f"{scheme}, {order}, {k}"]["fdt"])
                            for k in first["counts"]
                        ),
                    )
                    for order in shown
                ),
            ),
        )
        for word, scheme in (("tensor", "int8:tensor"), ("channel", "int8"))
    )
    few = needed(results, "selection-int8-tensor")["held_out"]

    def of(order: str) -> str:
        return number(few[f"int8:tensor, {order}, 84"]["fdt"]["value"])

    n = len(cells)
    return Claim(
        title="FDT orders components better than PPL, DPPL and SDT",
        said=(
            "Components chosen by their FDT leave the model closer to its base than those chosen "
            "by other metrics."
        ),
        rule=(
            "A rival is beaten if the order by FDT has the higher held-out FDT in two thirds or "
            f"more of {n} cells (four runs, three numbers of components), and in no cell a lower "
            "one with intervals that do not overlap. Holds if all three are beaten, in part if "
            "one or more."
        ),
        verdict=HOLDS if len(beaten) == len(RIVALS) else IN_PART if beaten else NOT,
        found=(
            table(("rival", "FDT's order is higher", "with intervals apart", "lower, apart"), rows),
            f"Beaten: {', '.join(beaten) or 'none'}. What we order by is neither. After 84 "
            f"components per tensor KL with 16 prompts leaves an FDT of {of('KL, 16 prompts')}, "
            f"the probe with 32 prompts {of('probe, 32 prompts')}, FDT with 256 prompts "
            f"{of(BY_FDT)}.",
        ),
        limits=(
            "One small model and two schemes; the four runs share the model and WikiText-2, so "
            "that they are no four witnesses. Held-out prompts: 128 in one run, 256 in the "
            "others; their intervals are of each order by itself, on the same prompts."
        ),
        results=("selection-timed", "selection-int8-tensor", "selection-int8-channel"),
        figures=figures,
    )


FEW, MANY = 50, 200


def prompts(results: Results) -> Claim:
    coverage, run = needed(results, "coverage"), needed(results, "pilot")
    schemes, widths = coverage["rows"]["schemes"], parse_widths((), new_tokens=MANY)
    rows, met = [], []
    for strength, scheme in schemes.items():
        for width in widths:
            at = {
                one["n"]: one
                for one in coverage["results"]
                if (one["strength"], one["metric"]) == (strength, width.metric)
            }
            wanted = width.of(at[MANY]["value"])
            enough = {n: at[n]["mean_width"] <= wanted for n in (FEW, MANY)}
            met.append(enough[MANY])
            numbers = (at[MANY]["value"], wanted, *(at[n]["mean_width"] for n in (FEW, MANY)))
            rows.append(
                [
                    f"{scheme}, {width.metric.upper()}",
                    *(percent(x) if width.metric == "sdt" else number(x) for x in numbers),
                    "50" if enough[FEW] else "200" if enough[MANY] else "more than 200",
                ]
            )
    settings = coverage["rows"]
    held = [one["in_range"] for one in run["drawn"]]
    names = tuple(f"{schemes[one['strength']]} {one['metric'].upper()}" for one in run["drawn"])
    n_trial, n_later, n_wanted = (run[key] for key in ("n_trial", "n_later", "n_wanted"))
    foretold = [
        [name, *(_middle(one[key]) for key in ("ratio", "needed")), percent(one["in_range"])]
        for name, one in zip(names, run["drawn"], strict=True)
    ]
    columns = ("", f"width of {n_later}, foretold / found", f"foretold for {n_wanted}", "in range")
    drawn = tuple(
        Series(width.metric.upper(), _needed_by(width.metric, run["drawn"]), joined=False)
        for width in widths
    )
    return Claim(
        title="How many prompts, which prefix and which length",
        said="A few prompts, each continued for some tokens, are enough to judge a candidate.",
        rule=(
            f"Mean widths of intervals of {MANY} prompts of {settings['prefix']} + "
            f"{settings['new_tokens']} tokens against those that `dtm pilot` asks for by default "
            f"({', '.join(map(str, widths))}): holds if every metric of three schemes meets them, "
            "in part if some do."
        ),
        verdict=HOLDS if all(met) else IN_PART if any(met) else NOT,
        found=(
            table(("", "value", "wanted", "width, 50", "width, 200", "enough"), rows),
            f"What trials of {n_trial} prompts foretell, drawn {run['trials']} times from "
            f"{len(needed(results, 'coverage-rows')['rows']['mild']['fdt']):,} (medians, and where "
            f"90 % lie). The range of the number of prompts holds the true {n_wanted} in "
            f"{percent(min(held))} to {percent(max(held))} of trials.",
            table(columns, foretold),
            *_on_a_model(run.get("model")),
        ),
        limits=(
            "FDT has a heavy tail on a small model: a few prompts in a hundred loop and never "
            "part, and no trial of 32 need hold one. Another prefix or length is another quantity, "
            "so its cost is not that of the same answer. The widths are a wish, not a law: to "
            "order two candidates far apart a handful of prompts is enough."
        ),
        results=("coverage", "pilot", "coverage-rows"),
        figures=(
            (
                "prompts",
                Chart(
                    f"Prompts that {n_trial} foretell where {n_wanted} are needed",
                    "scheme",
                    "prompts",
                    drawn,
                    log_y=True,
                    x_names=tuple(schemes.values()),
                ),
            ),
        ),
    )


def _needed_by(metric: str, drawn: Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
    found = [one["needed"] for one in drawn if one["metric"] == metric]
    return tuple(Point(i, at["median"], at["low"], at["high"]) for i, at in enumerate(found))


def _middle(found: Mapping[str, float]) -> str:
    low, high = number(found["low"], 2), number(found["high"], 2)
    return f"{number(found['median'])} ({low}–{high})"


def _on_a_model(model: Mapping[str, Any] | None) -> list[str]:
    """Prefixes and lengths beside each other, where a model was tried."""
    if model is None:
        return ["Prefixes and lengths beside each other, on a model: not measured yet."]
    places = [
        [
            str(cell["prefix"]),
            str(cell["new_tokens"]),
            number(cell["n_prompts"]),
            percent(max(one["censored"] for one in cell["candidates"])),
            percent(cell["repeated"]),
        ]
        for cell in model["pilot"]["cells"]
    ]
    checks = [
        [
            f"{one['candidate']}, {one['metric'].upper()}, {one['new_tokens']} new tokens",
            with_interval(one["later"], as_percent=one["metric"] == "sdt"),
            number(one["foretold"] / one["found"]),
        ]
        for one in model["checks"]
    ]
    return [
        "Prompts that meet all widths, by prefix and new tokens, with the share of prompts that "
        "never part (of the closest candidate) and of tokens in loops:",
        table(("prefix", "new tokens", "prompts", "never part", "loops"), places),
        f"Intervals of 128 other prompts of {model['prefix']} tokens, and their width as the trial "
        "foretold it over the one found:",
        table(("", "estimate", "foretold / found"), checks),
    ]
