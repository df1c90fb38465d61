"""Schemes by architectures: what is written and reloaded equal, what is refused and why.

Tiny random weights in bfloat16. A scheme is given to every matrix of the decoder layers; the folder
is loaded again by plain transformers in a process of its own and held against the plan.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from machine import write_result
from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parents[1] / "tests"))
import runs
import tiny
from divergent_tokens.compress.checkpoint import write_checkpoint
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.couplings import Coupling
from divergent_tokens.compress.plan import size_bytes, uniform_plan
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.models import load_model, outline_model
from divergent_tokens.quiet import quietly
from divergent_tokens.verify import verify

ARCHITECTURES = ("llama", "qwen3", "gemma3", "gpt2", "qwen3-moe", "gpt-oss")
SCHEMES = (
    *("int8", "int8:tensor", "int6", "int4:g16", "int4:g16:asym", "int3:g16", "int2:g16"),
    *("w8a8", "fp8", "mxfp4", "nvfp4", "llm.int8", "magnitude:0.5", "magnitude:0.5+int4:g16"),
)


def main() -> None:
    arguments = parse()
    cells: dict[str, dict[str, dict[str, str]]] = {}
    with tempfile.TemporaryDirectory() as place:
        bases = {name: saved(name, Path(place) / name) for name in arguments.architectures}
        for scheme in arguments.schemes:
            cells[scheme] = {
                name: cell(folder, scheme, Path(place)) for name, folder in bases.items()
            }
            shown = "  ".join(f"{found['verdict']:14}" for found in cells[scheme].values())
            print(f"{scheme:24} {shown}", flush=True)
    reasons = {
        found["why"]: f"{scheme}, {name}"
        for scheme, row in cells.items()
        for name, found in row.items()
        if found["why"]
    }
    for why, example in reasons.items():
        print(f"- {example}: {why}")
    print("written to", write_result("checkpoints", {"cells": cells}, arguments.out))


def saved(architecture: str, folder: Path) -> Path:
    """Hidden sizes that groups of 32 divide, unlike those of the suite's networks."""
    config = tiny.CONFIGS[architecture]()
    for name, value in {"intermediate_size": 64, "moe_intermediate_size": 32}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    network = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    with quietly():
        network.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def cell(folder: Path, scheme: str, place: Path) -> dict[str, Any]:
    """What becomes of one scheme on one base, packed, or else dense."""
    with tempfile.TemporaryDirectory(dir=place) as out:
        try:
            return {"verdict": checked(folder, scheme, Path(out) / "packed"), "why": None}
        except DivergentTokensError as error:
            why = str(error)
        try:
            found = checked(folder, scheme, Path(out) / "dense", dense=True)
        except DivergentTokensError as error:
            return {"verdict": "refused", "why": f"{why} | dense: {error}"}
    return {"verdict": "dense " + found, "why": why}


def checked(folder: Path, scheme: str, out: Path, **options: Any) -> str:
    outline = outline_model(folder)
    components = find_components(outline.network)
    base = {
        "reference": folder.name,
        "fingerprint": outline.fingerprint,
        "model_type": outline.network.config.model_type,
        "config": {},
    }
    plan = uniform_plan(components, parse_scheme(scheme))
    whole = sum(component.base_size_bytes for component in components)
    file = PlanFile(base, dict.fromkeys(plan.schemes, scheme), size_bytes(plan, components), whole)
    write_checkpoint(outline, file, out, target=Coupling.transformers, **options)
    model = load_model(folder, dtype="bfloat16", device="cpu")
    found = verify(out, model, runs.prompts(n=4, length=8), new_tokens=8, batch_size=4)
    failed = [f"{check.name}: {check.found}" for check in found.checks if not check.passed]
    return "; ".join(failed) if failed else "equal"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architectures", nargs="+", default=ARCHITECTURES)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES)
    parser.add_argument("--out", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
