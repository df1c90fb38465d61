"""The README.md of a checkpoint: what was done to which base, and what it did to the text."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from divergent_tokens.compress.plan_file import PlanFile

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_METRICS = {
    "kl": ("KL, nats per token", "{:.3g}"),
    "sdt": ("SDT, share of divergent tokens", "{:.2%}"),
    "fdt": ("FDT, tokens until the first divergence", "{:.1f}"),
    "dppl": ("DPPL", "{:.3g}"),
}


def model_card(file: PlanFile, *, packed: Sequence[str], size_bytes: int) -> str:
    """The card as Markdown, with the front matter that the hub reads.

    The measured table is that of the plan's last measurement, if it has one.
    """
    base = str(file.base["reference"])
    is_id = _HUB_ID.fullmatch(base) is not None
    name = base if is_id else base.rstrip("/").rpartition("/")[2]
    front = ["library_name: transformers", "pipeline_tag: text-generation"]
    if is_id:
        front += [f"base_model: {base}", "base_model_relation: quantized"]
    front += ["tags:", "- divergent-tokens", *(["- compressed-tensors"] if packed else [])]
    counts = Counter(file.components.values()).most_common()
    lines = [
        "---",
        *front,
        "---",
        "",
        f"# {name}, compressed",
        "",
        f"A version of `{name}` in which {len(file.components)} weight matrices are compressed; "
        f"{100 * file.size_bytes / file.base_size_bytes:.1f} % of the bytes that the base spends "
        f"on them, {size_bytes / 1e6:.1f} MB of weights in all.",
        "",
        "| scheme | matrices |",
        "| --- | --- |",
        *(f"| `{scheme}` | {count} |" for scheme, count in counts),
        "",
        *_measured(file.trail),
        "Which matrix has which scheme, and how that was found, is in `plan.json`.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        "",
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
        "```",
        "",
    ]
    return "\n".join(lines)


def _measured(trail: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of the last measurement."""
    steps = [step for step in trail if step.get("step") == "measured"]
    if not steps:
        return ["It was not measured on held-out prompts.", ""]
    step = steps[-1]
    prompts, metrics = step["prompts"], step["metrics"]
    rows = [
        f"| {title} | {form.format(found['value'])} | "
        f"{form.format(found['low'])} to {form.format(found['high'])} |"
        for key, (title, form) in _METRICS.items()
        if (found := metrics.get(key)) is not None
    ]
    return [
        f"Against the base, on {prompts['n_prompts']} prompts that chose nothing, over "
        f"{prompts['new_tokens']} new tokens at most:",
        "",
        "| metric | value | 95 % interval |",
        "| --- | --- | --- |",
        *rows,
        "",
    ]
