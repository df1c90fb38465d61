"""The probe beside what it predicts: the measured KL of every component, scheme by scheme.

Reads a sweep that holds both methods' rows on the same prompts, for example from

    dtm sweep demo:smollm2 --scheme int8 ... --method measure --out sweep.db
    dtm sweep demo:smollm2 --scheme int8 ... --method probe --draws 4 --out sweep.db

With `--gradient` it also runs the score that Model Optimizer's auto_quantize uses (squares summed
element by element, labels from the text) on the sweep's prompts and the text that follows them.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import write_result
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import Tensor, nn

from divergent_tokens.compress.components import Component, find_components, weight_of
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.measure.documents import read_documents
from divergent_tokens.models import Model, load_model
from divergent_tokens.probe import kl_of
from divergent_tokens.sensitivities import Sensitivities, read_sensitivities
from divergent_tokens.store import default_cache


def main() -> None:
    arguments = parse()
    sweep = read_sensitivities(arguments.sweep)
    measured = {(row.component, row.scheme): row for row in sweep.rows if row.method == "measure"}
    schemes = list(dict.fromkeys(scheme for _, scheme in measured))
    names = [c.name for c in sweep.components if (c.name, schemes[0]) in measured]
    n_prompts = len(sweep.prompts)
    rows: list[dict[str, Any]] = []
    gradient = gradient_scores(arguments, sweep, names, schemes) if arguments.gradient else {}
    for scheme in schemes:
        truth = np.array([measured[name, scheme].kl for name in names])
        draws = np.stack([sweep.draws(name, scheme) for name in names])
        for n in sorted({n for n in (8, 16, 32, 64, 128) if n < n_prompts} | {n_prompts}):
            for n_draws in sorted({1, draws.shape[2]}):
                found = [kl_of(one[:n, :n_draws], sweep.lengths[:n])[0] for one in draws]
                rows.append(row(scheme, f"probe, {n} prompts, {n_draws} draws", found, truth))
        errors = [measured[name, scheme].weight_error for name in names]
        rows.append(row(scheme, "weight error", errors, truth, ratio=False))
        if gradient:
            rows.append(row(scheme, "gradient, elements, text", gradient[scheme], truth))
    for line in rows:
        print(
            f"{line['scheme']:14} {line['score']:28} Spearman {line['spearman']:.3f}   "
            + (
                f"ratio {line['ratio']:.2f}   spread {line['spread']:.2f}"
                if line["ratio"] is not None
                else ""
            )
        )
    seconds = {
        method: sum(r.seconds for r in sweep.rows if r.method == method)
        for method in ("probe", "measure")
    }
    print({method: round(value, 1) for method, value in seconds.items()})
    result = {
        "base": sweep.run["base"]["reference"],
        "run": run_of(sweep),
        "n_components": len(names),
        "rows": rows,
        "seconds": seconds,
    }
    print("written to", write_result(arguments.name, result, arguments.out))


def run_of(sweep: Sensitivities) -> dict[str, Any]:
    """What a reader must know of the sweep."""
    run = sweep.run
    prompts = {k: v for k, v in run["prompts"].items() if k != "digest"}
    prompts["source"] = Path(prompts["source"]).name
    kept = {name: run[name] for name in ("device", "versions", "dtype", "new_tokens")}
    return {**kept, "prompts": prompts}


def row(
    scheme: str, score: str, found: Any, truth: NDArray[np.float64], *, ratio: bool = True
) -> dict[str, Any]:
    logs = np.log(np.asarray(found, float) / truth)
    return {
        "scheme": scheme,
        "score": score,
        "spearman": float(spearmanr(found, truth)[0]),
        "ratio": float(np.exp(np.median(logs))) if ratio else None,
        "spread": float(logs.std()) if ratio else None,
    }


# --- the gradient score ---


def gradient_scores(
    arguments: argparse.Namespace, sweep: Sensitivities, names: list[str], schemes: list[str]
) -> dict[str, list[float]]:
    """Σ (gradient · change of the output)² over tokens and outputs, halved, per predicted token."""
    base = load_model(sweep.run["base"]["reference"], cache=arguments.cache)
    components = {c.name: c for c in find_components(base.network)}
    prefix, new_tokens = sweep.run["prompts"]["prefix"], sweep.run["new_tokens"]
    rows = texts(base, sweep.run["prompts"], len(sweep.prompts), prefix + new_tokens)
    sums = {scheme: dict.fromkeys(names, 0.0) for scheme in schemes}
    for name in names:
        watch(base, components[name], sums)
    for ids in rows.split(8):
        embedded = base.network.get_input_embeddings()(ids).detach().requires_grad_(True)
        logits = base.network(inputs_embeds=embedded, use_cache=False).logits[:, prefix - 1 : -1]
        logps = logits.float().log_softmax(-1).gather(-1, ids[:, prefix:, None])
        torch.autograd.grad(logps.sum(), embedded)
    n_tokens = len(rows) * new_tokens
    return {
        scheme: [found[name] / 2 / n_tokens for name in names] for scheme, found in sums.items()
    }


def texts(base: Model, prompts: dict[str, Any], n: int, length: int) -> Tensor:
    """The first tokens of documents that are long enough. [text, token]"""

    def long_ones() -> Iterator[list[int]]:
        for document in read_documents(prompts["source"]):
            ids = base.tokenizer(document.text, verbose=False)["input_ids"]
            if len(ids) >= length:
                yield ids[:length]

    found = [ids for ids, _ in zip(long_ones(), range(n), strict=False)]
    return torch.tensor(found, device=base.device)


def watch(base: Model, component: Component, sums: dict[str, dict[str, float]]) -> None:
    weight = weight_of(base.network, component)
    changes = {scheme: parse_scheme(scheme).compress(weight, component) - weight for scheme in sums}

    def forward(_module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        x = inputs[0].detach()

        def backward(delta: Tensor) -> None:
            for scheme, change in changes.items():
                product = (x @ change.t()) * delta
                sums[scheme][component.name] += float(product.double().pow(2).sum())

        output.register_hook(backward)

    base.network.get_submodule(component.name).register_forward_hook(forward)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--gradient", action="store_true")
    parser.add_argument("--name", default="probed")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache())
    return parser.parse_args()


if __name__ == "__main__":
    main()
