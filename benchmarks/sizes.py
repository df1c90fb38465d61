"""At the bits of uniform schemes: our plan, the uniform scheme, and our plan's decisions carried
out by llm-compressor: size on disk, and what it does to the text on held-out prompts.

Reads a sweep with a probe of several schemes. llm-compressor takes part where it is installed.
"""

import argparse
import importlib.util
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from joint import estimates, held_out, held_out_arguments
from machine import write_result
from probed import run_of

from divergent_tokens.candidates import lent_candidates, model_candidates
from divergent_tokens.compress.checkpoint import write_checkpoint
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.recipes import recipe
from divergent_tokens.compress.tools import Tool
from divergent_tokens.measure.comparison import compare
from divergent_tokens.models import outline_model
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.search import search
from divergent_tokens.search.settings import Method, Settings
from divergent_tokens.sensitivities import Sensitivities, read_sensitivities


def main() -> None:
    arguments = parse()
    sweep = read_sensitivities(arguments.sweep)
    names = [component.name for component in sweep.components]
    plans: dict[str, Mapping[str, str]] = {}
    for bits, scheme in zip(arguments.bits, arguments.uniform, strict=True):
        settings = Settings(method=Method.probe, schemes=tuple(arguments.mix))
        plans[f"{bits:g} bits, ours"] = search(
            sweep, Budget(Unit.bits, bits), settings
        ).offer.components
        plans[f"{bits:g} bits, {scheme}"] = dict.fromkeys(names, scheme)
    with tempfile.TemporaryDirectory() as place:
        sizes, others = written(arguments, sweep, plans, Path(place))
        found = measured(arguments, sweep, plans, others)
    for name, metrics in found.items():
        fdt, sdt, kl = (metrics[key] for key in ("fdt", "sdt", "kl"))
        print(
            f"{name:36} {sizes[name] / 1e6:7.1f} MB  FDT {fdt['value']:5.1f} ({fdt['low']:.1f} to "
            f"{fdt['high']:.1f})  SDT {100 * sdt['value']:.2f} %  KL {kl['value']:.4f}"
        )
    result = {
        "base": sweep.run["base"]["reference"],
        "run": run_of(sweep),
        "size_bytes": sizes,
        "held_out": found,
    }
    print("written to", write_result(arguments.name or "sizes", result, arguments.out))


def written(
    arguments: argparse.Namespace,
    sweep: Sensitivities,
    plans: Mapping[str, Mapping[str, str]],
    place: Path,
) -> tuple[dict[str, int], dict[str, Path]]:
    """Bytes of weights on disk by name, and llm-compressor's checkpoints by theirs."""
    outline = outline_model(sweep.run["base"]["reference"], cache=arguments.cache)
    sizes, others = {}, {}
    for name, plan in plans.items():
        file = PlanFile(sweep.run["base"], plan, 1, 2)
        folder = place / f"plan {len(sizes)}"
        sizes[name] = write_checkpoint(outline, file, folder).size_bytes
        if name.endswith("ours") and importlib.util.find_spec("llmcompressor"):
            other = f"{name}, by llm-compressor"
            others[other] = carried_out(
                outline.folder, recipe(file, Tool.llm_compressor).text, folder
            )
            files = others[other].glob("*.safetensors")
            sizes[other] = sum(path.stat().st_size for path in files)
    return sizes, others


def carried_out(base: Path, text: str, folder: Path) -> Path:
    """llm-compressor's checkpoint of a base under a recipe."""
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    network = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    oneshot(model=network, recipe=str(file), tokenizer=tokenizer)
    out = folder / "llm-compressor"
    network.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)
    return out


def measured(
    arguments: argparse.Namespace,
    sweep: Sensitivities,
    plans: Mapping[str, Mapping[str, str]],
    others: Mapping[str, Path],
) -> dict[str, Any]:
    run = sweep.run
    base, prompts = held_out(arguments, sweep)
    components = find_components(base.network)
    files = {name: PlanFile(run["base"], plan, 1, 2).plan() for name, plan in plans.items()}
    loaded = model_candidates(*map(str, others.values()), dtype=base.dtype, device=base.device)
    candidates = lent_candidates(base, files, components)
    candidates |= {name: loaded[str(path)] for name, path in others.items()}
    comparison = compare(
        base,
        candidates,
        prompts,
        new_tokens=run["new_tokens"],
        ignore_eos=run["ignore_eos"],
        batch_size=arguments.batch_size,
        cache=arguments.cache,
    )
    return {
        candidate.name: estimates(candidate.metrics.to_json(), "kl", "sdt", "fdt")
        for candidate in comparison.candidates
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    held_out_arguments(parser)
    parser.add_argument("--bits", type=float, nargs="+", default=[4.5, 5.5, 6.5])
    parser.add_argument("--uniform", nargs="+", default=["int4:g64", "int5:g64", "int6:g64"])
    parser.add_argument(
        "--mix", nargs="+", default=["int3:g64", "int4:g64", "int6:g64", "int8:g64"]
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
