"""Pruning guided by divergence against uniform, one shot and with recovery.

Text to train on (`--data`) is apart from the prompts and the text to report on. Both sides have the
same steps, data and seeds.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from machine import machine, seconds_of, write_result

from divergent_tokens.compress.components import find_components
from divergent_tokens.measure.perplexity import read_text
from divergent_tokens.measure.prompts import read_prompts
from divergent_tokens.measure.sequences import read_sequences
from divergent_tokens.models import load_model
from divergent_tokens.pruning.prune import prune
from divergent_tokens.pruning.settings import Settings
from divergent_tokens.recover import Training
from divergent_tokens.store import default_cache

SETTINGS = ("rounds", "steps", "train_batch", "lr", "loss", "lift", "n_saliency")
"""Options that a run's numbers depend on, kept with them."""

KEPT = ("sparsity", "loss", "before", "after", "repaired", "corrected_from")
"""What is kept of each round."""

N_SALIENCY, RATE = 64, 3e-4


def main() -> None:
    arguments = parse()
    base = load_model(arguments.base, dtype="float32", cache=arguments.cache)
    components = find_components(base.network)
    prompts = read_prompts(
        arguments.prompts,
        base,
        n_prompts=arguments.n_prompts,
        prefix=arguments.prefix,
        cache=arguments.cache,
    )
    text = read_text(arguments.text)
    found: dict[str, Any] = {}
    base_ppl = None
    sequences_of = {
        seed: read_sequences(
            arguments.data,
            base,
            length=arguments.length,
            n_sequences=arguments.n_sequences,
            seed=seed,
            cache=arguments.cache,
        )
        for seed in arguments.seeds
    }
    runs = [
        (seed, sparsity, way)
        for seed in arguments.seeds
        for sparsity in arguments.sparsities
        for way in arguments.ways
    ]
    for seed, sparsity, way in runs:
        settings = settings_of(arguments, way, sparsity, seed)
        records: list[dict[str, Any]] = []
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "out"
            options = {
                "text": text,
                "cache": arguments.cache,
                "compiled": arguments.compile,
            }

            def run() -> None:
                records.append(  # noqa: B023
                    prune(base, components, sequences_of[seed], prompts, place, settings, **options)  # noqa: B023
                )

            seconds = seconds_of(run)
        name = ", ".join([f"{way}, {sparsity}, seed {seed}", *unusual(arguments)])
        found[name] = {
            "settings": {key: getattr(arguments, key) for key in SETTINGS},
            "n_sequences": len(sequences_of[seed].ids),
            **kept(records[0]),
            "seconds": seconds,
        }
        base_ppl = records[0]["base_ppl"]
        show(name, found[name])
        result = {
            "base": arguments.base,
            "base_ppl": base_ppl,
            "n_prompts": len(prompts),
            "length": arguments.length,
            "found": found,
        }
        path = write_result(arguments.name, result, arguments.out)  # what is done is kept
    print(machine()["device"], "written to", path)


def settings_of(arguments: argparse.Namespace, way: str, sparsity: float, seed: int) -> Settings:
    """`way` is a criterion and an allocation, and `repair` and `correct3` (or another number)."""
    criterion, allocate, *more = way.split("/")
    looks = [int(one.removeprefix("correct")) for one in more if one != "repair"]
    return Settings(
        sparsity=sparsity,
        rounds=arguments.rounds,
        criterion=criterion,  # type: ignore[arg-type]
        allocate=allocate,  # type: ignore[arg-type]
        training=Training(
            steps=arguments.steps,
            batch_size=arguments.train_batch,
            micro_batch=arguments.train_batch,
            learning_rate=arguments.lr,
            lifted=arguments.lift,
            loss=arguments.loss,
        ),
        n_saliency=arguments.n_saliency,
        repair="repair" in more,
        corrections=sum(looks),
        seed=seed,
    )


def unusual(arguments: argparse.Namespace) -> list[str]:
    """In words, what makes a run another than those of the same way."""
    found = []
    if arguments.n_saliency != N_SALIENCY:
        found.append(f"{arguments.n_saliency} sequences")
    if arguments.lr != RATE:
        found.append(f"learning rate {arguments.lr:g}")
    return found


def kept(record: dict[str, Any]) -> dict[str, Any]:
    """What is compared: the last round, its intervals, and where the zeros are."""
    last = record["rounds"][-1]
    shares = {c["name"]: c["n_zero"] / c["n_parameters"] for c in record["components"]}
    attention = [share for name, share in shares.items() if "attn" in name]
    others = [share for name, share in shares.items() if "attn" not in name]
    metrics = {
        name: {key: record["metrics"][name][key] for key in ("value", "low", "high")}
        for name in ("fdt", "sdt", "kl")
    }
    return {
        "after": last["after"],
        "sparsity": last["sparsity"],
        "compiled": last["compiled"],
        "metrics": metrics,
        "rounds": [{key: one[key] for key in KEPT} for one in record["rounds"]],
        "attention": sum(attention) / len(attention),
        "mlp": sum(others) / len(others),
        "attention_beyond": sum(share > 0.9 for share in attention) / len(attention),
        "sparsities": {name: round(share, 4) for name, share in shares.items()},
    }


def show(name: str, one: dict[str, Any]) -> None:
    after = one["after"]
    print(
        f"{name:36} PPL {after['ppl']:9.2f}  FDT {after['fdt']:6.2f}  "
        f"SDT {100 * after['sdt']:5.2f} %  KL {after['kl']:6.3f}  zeros {one['sparsity']:.4f}  "
        f"attention beyond 0.9 {one['attention_beyond']:.2f}  {one['seconds']:5.1f} s",
        flush=True,
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", nargs="?", default="demo:smollm2")
    parser.add_argument("--data", nargs="+", default=["self"])
    parser.add_argument("--prompts", default="builtin")
    parser.add_argument("--text", required=True)
    parser.add_argument("--ways", nargs="+", default=["magnitude/uniform", "fisher/global"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--n-prompts", type=int, default=96)
    parser.add_argument("--prefix", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--n-sequences", type=int, default=1024)
    parser.add_argument("--train-batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=RATE)
    parser.add_argument("--n-saliency", type=int, default=N_SALIENCY)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction)
    parser.add_argument("--lift", action="store_true")
    parser.add_argument("--loss", default="distill")
    parser.add_argument("--name", default="pruning")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cache", type=Path, default=default_cache())
    return parser.parse_args()


if __name__ == "__main__":
    main()
