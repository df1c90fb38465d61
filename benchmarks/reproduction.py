"""docs/reproduction.md and its figures, made from the results in benchmarks/results.

Runs no model. A test holds that the committed page is what this makes.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from claim import Claim, Results, reader
from claims_on_choosing import orders, perplexity, prompts
from claims_on_pruning import attention, guided
from claims_on_quantizing import absmax, others
from drawing import svg

HERE = Path(__file__).resolve().parent
RESULTS, DOCS = HERE / "results", HERE.parent / "docs"
PAGE, FIGURES = "reproduction.md", "figures"
CLAIMS: tuple[Callable[[Results], Claim], ...] = (
    perplexity,
    orders,
    absmax,
    others,
    attention,
    guided,
    prompts,
)
INTRODUCTION = """\
# The paper, claim by claim

Deiseroth et al., *Divergent Token Metrics* (NAACL 2024,
[arXiv 2311.01544](https://arxiv.org/abs/2311.01544)), measured Llama-2 models. Here is what their
claims come to on SmolLM2-135M-Instruct, a model a fiftieth of the smallest of those, in float32.
What does not hold here may hold there.

`python benchmarks/reproduction.py` makes this page from the files in `benchmarks/results/`. Each
verdict is computed by the rule that stands beside it. Intervals are at 95 %, over prompts; words
are explained in [the numbers](metrics.md).
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DOCS)
    folder = parser.parse_args().out
    for name, text in made(reader(RESULTS)).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print("written to", path)


def made(results: Results) -> dict[str, str]:
    """The page and its figures, by their names under docs."""
    claims = [claim(results) for claim in CLAIMS]
    files = {
        f"{FIGURES}/{name}.svg": svg(chart) for claim in claims for name, chart in claim.figures
    }
    return {PAGE: page(claims, results), **files}


def page(claims: Sequence[Claim], results: Results) -> str:
    lines = [INTRODUCTION, "| claim | verdict |", "| --- | --- |"]
    lines += [
        f"| [{claim.title}](#{anchor(claim.title)}) | **{claim.verdict}** |" for claim in claims
    ]
    for claim in claims:
        lines += ["", *section(claim, results)]
    return "\n".join(lines) + "\n"


def section(claim: Claim, results: Results) -> list[str]:
    lines = [f"## {claim.title}", "", f"*Claim.* {claim.said}", ""]
    lines += [
        f"*Rule.* {claim.rule}",
        "",
        f"*Verdict.* **{claim.verdict[0].upper()}{claim.verdict[1:]}.**",
    ]
    for paragraph in claim.found:
        lines += ["", paragraph]
    for name, chart in claim.figures:
        lines += ["", f"![{chart.title}]({FIGURES}/{name}.svg)"]
    lines += ["", f"*Limits.* {claim.limits}", "", "*Made by*", ""]
    return lines + [origin(name, results) for name in claim.results]


def origin(name: str, results: Results) -> str:
    """Which command made a file, and where."""
    found = results(name) or {}
    file = f"- `benchmarks/results/{name}.json`"
    if "command" not in found:
        return f"{file}: {found['settings']['measured_on']['device']}"
    note = f" {found['note']}" if "note" in found else ""
    return f"{file}: `{found['command']}` ({found['device']}).{note}"


def anchor(title: str) -> str:
    """As Markdown makes it of a heading."""
    kept = "".join(c for c in title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


if __name__ == "__main__":
    main()
