"""Claims on quantization: how far plain AbsMax goes, and where LLM.int8 and GPTQ stand."""

from claim import HOLDS, IN_PART, NOT, Claim, Results, needed, point, table, with_interval
from drawing import Chart, Series

from divergent_tokens.report.numbers import percent

WANTED_SHARE = 0.8


def absmax(results: Results) -> Claim:
    run = needed(results, "llm-int8")
    held_out, shares = run["held_out"], run["shares"]
    treated = held_out["llm.int8 on all"]

    def reached(metric: str) -> float:
        sign = 1 if metric == "fdt" else -1
        at = [
            share
            for name, share in shares.items()
            if sign * held_out[name][metric]["value"] >= sign * treated[metric]["value"]
        ]
        return max(at, default=0.0)

    found = {metric: reached(metric) for metric in ("fdt", "sdt", "kl")}
    n_enough = sum(found[metric] > WANTED_SHARE for metric in ("fdt", "kl"))
    rows = [
        [
            name,
            percent(shares[name]) if name in shares else "",
            with_interval(row["fdt"]),
            with_interval(row["sdt"], as_percent=True),
            with_interval(row["kl"]),
        ]
        for name, row in held_out.items()
    ]
    taken = tuple(point(100 * share, held_out[name]["fdt"]) for name, share in shares.items())
    level = tuple(point(100 * share, treated["fdt"]) for share in shares.values())
    return Claim(
        title="More than 80 % of the parameters to AbsMax int8",
        said=(
            "Over 80 % of the parameters can go to int8 by plain AbsMax, without care for outliers."
        ),
        rule=(
            "Components go to AbsMax int8 per tensor in the order of their probed KL, the least "
            "first. Holds if more than 80 % of the weights do before the text is further from the "
            "base than under LLM.int8 on all, by FDT and by KL (their values); in part if by one "
            "of the two."
        ),
        verdict=(NOT, IN_PART, HOLDS)[n_enough],
        found=(
            f"At LLM.int8's FDT: {percent(found['fdt'])} of the weights; at its KL: "
            f"{percent(found['kl'])}; at its SDT: {percent(found['sdt'])}. All of them: an FDT of "
            f"{with_interval(held_out['210 of 210']['fdt'])}.",
            table(("AbsMax int8 on", "weights", "FDT", "SDT", "KL"), rows),
        ),
        limits=(
            "64 prompts: intervals of neighbours overlap, and FDT does not fall at every step. "
            "Shares between those in the table were not tried. What is not in int8 stays in "
            "float32. One small model, with fewer outliers than large ones; embeddings and head "
            "are not counted."
        ),
        results=("llm-int8",),
        figures=(
            (
                "absmax",
                Chart(
                    "AbsMax int8 on a share of the weights",
                    "% of the weights in AbsMax int8",
                    "FDT, tokens",
                    (Series("AbsMax int8", taken), Series("LLM.int8 on all", level)),
                ),
            ),
        ),
    )


BITS = (8, 4, 3, 2)


def others(results: Results) -> Claim:
    run, gptq = needed(results, "llm-int8")["held_out"], needed(results, "gptq")["held_out"]
    pairs = [("LLM.int8", "AbsMax int8 per tensor", run["llm.int8 on all"], run["210 of 210"])]
    pairs += [
        (f"GPTQ int{b}", f"AbsMax int{b}", gptq[f"gptq:int{b}:g64"], gptq[f"int{b}:g64"])
        for b in BITS
    ]
    rows, n_closer = [], 0
    for careful, plain, a, b in pairs:
        closer = a["kl"]["high"] < b["kl"]["low"]
        n_closer += closer
        rows.append(
            [
                f"{careful}, {plain}",
                f"{with_interval(a['fdt'])}, {with_interval(b['fdt'])}",
                f"{with_interval(a['kl'])}, {with_interval(b['kl'])}",
                "yes" if closer else "no",
            ]
        )
    both = [
        Series(
            name, tuple(point(i, pair[side]["kl"]) for i, pair in enumerate(pairs)), joined=False
        )
        for name, side in (("LLM.int8 or GPTQ", 2), ("AbsMax", 3))
    ]
    names = ("int8 tensor", *(f"int{b}:g64" for b in BITS))
    return Claim(
        title="Where LLM.int8 and GPTQ stand",
        said=(
            "Methods that care for outliers or calibrate are closer to the base than plain "
            "rounding."
        ),
        rule=(
            "Each against AbsMax at the same bits, on all components. Holds if the KL of the "
            "careful one is lower with intervals that do not overlap in every pair, in part if "
            "in some."
        ),
        verdict=HOLDS if n_closer == len(pairs) else IN_PART if n_closer else NOT,
        found=(
            f"Closer in {n_closer} of {len(pairs)} pairs.",
            table(("pair", "FDT", "KL", "closer"), rows),
        ),
        limits=(
            "64 prompts, one small model whose weights were stored in 4 bits before, which makes "
            "4-bit results particular to it; GPTQ calibrated on one text. LLM.int8 is 8 bits of "
            "inputs too, AbsMax here of weights only. AbsMax is per tensor beside LLM.int8, in "
            "groups of 64 beside GPTQ."
        ),
        results=("llm-int8", "gptq"),
        figures=(
            (
                "others",
                Chart(
                    "LLM.int8 and GPTQ beside AbsMax",
                    "bits and groups",
                    "KL, nats per token",
                    tuple(both),
                    log_y=True,
                    x_names=names,
                ),
            ),
        ),
    )
