"""The README.md of a checkpoint: what was done to which base, and what it did to the text."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.errors import RecordError

_METRICS = {
    "kl": ("KL, nats per token", "{:.3g}"),
    "sdt": ("SDT, share of divergent tokens", "{:.2%}"),
    "fdt": ("FDT, tokens until the first divergence", "{:.1f}"),
    "dppl": ("DPPL", "{:.3g}"),
}
_UNKNOWN = "?"
"""A bound that nothing is known of."""


def model_card(
    file: PlanFile, *, base: str, packed: Sequence[str], size_bytes: int, measured: Sequence[str]
) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    `base` is what the user called it: only a hub id is named to the hub. `packed` are the formats
    of compressed-tensors in the files, none if all weights are ordinary; `size_bytes` are those of
    all weights. `measured` is the `measured_table`.
    """
    is_id = not base.startswith("demo:") and not Path(base).expanduser().exists()
    name = _code(base if is_id else base.rstrip("/").rpartition("/")[2])
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if is_id:
        front += [f"base_model: {base}", "base_model_relation: quantized"]
    front += ["tags:", "- divergent-tokens", *(["- compressed-tensors"] if packed else [])]
    counts = Counter(file.components.values()).most_common()
    needed = "transformers and compressed-tensors" if packed else "transformers"
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {name}, compressed",
        "",
        f"A version of {name} with {len(file.components)} compressed weight matrices. "
        f"{_size(file)}{size_bytes / 1e6:.1f} MB of weights in all"
        f"{'' if packed else ', stored as ordinary ones: the harm of the plan without its size'}.",
        "",
        "| scheme | matrices |",
        "| --- | --- |",
        *(f"| {_code(scheme)} | {count} |" for scheme, count in counts),
        "",
        *measured,
        "",
        "Which matrix has which scheme, and how that was found, is in `plan.json`.",
        "",
        f"It loads with {needed}:",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
        "```",
        "",
    ]
    return "\n".join(lines)


def measured_table(file: PlanFile) -> list[str]:
    """Lines of Markdown with what was measured last of a plan, if the plan is still the same.

    Raises RecordError for a step that does not hold what `dtm search --prompts` writes.
    """
    steps = [step for step in file.trail if step.get("step") == "measured"]
    if not steps:
        return ["It was not measured on held-out prompts."]
    try:
        if steps[-1]["components_digest"] != file.digest:
            return ["Its plan was changed after it was measured: nothing is known of this one."]
        return _table(steps[-1])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(
            "a step 'measured' of the plan's trail does not hold what `dtm search --prompts` "
            f"writes ({type(error).__name__}: {error}); measure the plan again, or take the step "
            "out"
        ) from error


def _table(step: Mapping[str, Any]) -> list[str]:
    prompts, metrics, overlap = step["prompts"], step["metrics"], step.get("overlap", 0)
    held_out = "that chose nothing" if not overlap else f"of which {overlap} had a say in the plan"
    found = {name: metrics[name] for name in _METRICS if metrics.get(name) is not None}
    levels = {f"{100 * estimate['level']:g} %" for estimate in found.values()}
    return [
        f"Against the base in {step['dtype']}, on {prompts['n_prompts']} prompts {held_out}, over "
        f"at most {prompts['new_tokens']} new tokens:",
        "",
        f"| metric | value | {', '.join(sorted(levels))} interval |",
        "| --- | --- | --- |",
        *(_row(*_METRICS[name], estimate) for name, estimate in found.items()),
    ]


def _row(title: str, form: str, estimate: Mapping[str, Any]) -> str:
    value, low, high = (
        _UNKNOWN if estimate[name] is None else form.format(estimate[name])
        for name in ("value", "low", "high")
    )
    return f"| {title} | {value} | {low} to {high} |"


def _size(file: PlanFile) -> str:
    """What the plan does to the matrices that there were to choose from."""
    if not file.base_size_bytes:
        return ""
    share = file.size_bytes / file.base_size_bytes
    return (
        f"All matrices that there were to choose from take {100 * share:.1f} % of the bytes that "
        "the base spends on them at 16 bits a weight; "
    )


def _code(text: str) -> str:
    """As code in a line of Markdown, or in a table's cell."""
    line = " ".join(text.split()).replace("`", "'").replace("|", "\\|")
    return f"`{line}`"
