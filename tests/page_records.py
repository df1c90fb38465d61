"""Records as the commands write them, of models that never were: for pages, small and large."""

import json
import math
from dataclasses import replace

import numpy as np

import sweeps
from divergent_tokens.measure.comparison import versions
from divergent_tokens.measure.flips import fit
from divergent_tokens.measure.metrics import divergence, repeated
from divergent_tokens.measure.pairs import compare_pairs
from divergent_tokens.measure.rows import Row
from divergent_tokens.measure.summaries import summarize
from divergent_tokens.search.budgets import Budget, Unit
from divergent_tokens.search.curve import curve as curve_of
from divergent_tokens.search.search import search
from divergent_tokens.search.settings import RankBy, Settings

BASE = {"reference": "tiny", "fingerprint": "ab" * 32, "dtype": "float32", "device": "cpu"}
WORDS = ("the", "tide", "rises", "where", "nobody", "counts", "it", "and", "falls", "again", ",")
LAW = 2.4


def comparison(
    *,
    n_prompts=24,
    n_candidates=3,
    n_tokens=24,
    seed=0,
    domains=("prose", "code"),
    languages=("en", "de"),
    names=(),
    examples=3,
):
    """comparison.json of candidates that flip as the law says, the first one not at all."""
    rng = np.random.default_rng(seed)
    margins = rng.gamma(1.0, 3.0, (n_prompts, n_tokens)).astype(np.float32)
    groups = [domains[i % len(domains)] for i in range(n_prompts)]
    tongues = [languages[i // 2 % len(languages)] for i in range(n_prompts)]
    texts = [_text(rng, 40) for _ in range(n_prompts)]
    pieces = [[f" {word}" for word in rng.choice(WORDS, n_tokens)] for _ in range(n_prompts)]
    shared = margins, groups, tongues, pieces
    names = names or [f"candidate {i}" for i in range(n_candidates)]
    kls = [1e-11, *(1e-4 * 10**i for i in np.linspace(0, 3, max(0, len(names) - 1)))]
    candidates = [
        _candidate(rng, name, kl, *shared, n_examples=examples, flips=i > 0)
        for i, (name, kl) in enumerate(zip(names, kls, strict=True))
    ]
    floor = _candidate(rng, "", 0.0, *shared, n_examples=0, flips=False)
    rounding = _candidate(rng, "", 1e-11, *shared, n_examples=0, flips=False)
    fdt = {c["name"]: np.array([row["fdt"] for row in c["rows"]]) for c in candidates}
    pairs = compare_pairs(fdt, np.full(n_prompts, n_tokens), level=0.95, seed=0)
    return {
        "schema": "divergent-tokens/comparison/1",
        "versions": versions(),
        "command": ["dtm", "compare", "tiny", "--scheme", names[0]],
        "seed": 0,
        "base": BASE,
        "prompts": {
            "source": "test",
            "digest": "cd" * 32,
            "n_prompts": n_prompts,
            "left_out": 0,
            "skipped": 0,
            "wanted": None,
            "prefix": 8,
            "new_tokens": n_tokens,
            "ignore_eos": False,
            "decoding": "dynamic",
            "texts": texts,
            "completions": pieces,
            "margins": [[round(float(m), 4) for m in row] for row in margins],
        },
        "noise_floor": floor["metrics"],
        "rounding": rounding["metrics"],
        "candidates": candidates,
        "pairs": [pair.to_json() for pair in pairs],
    }


def _text(rng, n):
    return " ".join(rng.choice(WORDS, n))


def _candidate(rng, name, kl, margins, domains, languages, pieces, *, n_examples, flips):
    shape = margins.shape
    ids = np.zeros(shape, np.int32)
    noise = rng.normal(0, LAW * math.sqrt(kl), shape) if flips else np.zeros(shape)
    argmax = (noise > margins).astype(np.int32)
    by_token = kl * rng.lognormal(-0.5, 1, shape)
    base_logprobs = -rng.gamma(1.0, 0.5, shape)
    found = divergence(
        argmax,
        ids,
        logprobs=base_logprobs - by_token,
        base_logprobs=base_logprobs,
        kl=by_token,
        acceptance=1 - np.sqrt(by_token / 2) / 2,
    )
    first = zip(found.fdt, found.censored, strict=True)
    at_first = [None if c else float(margins[i, t]) for i, (t, c) in enumerate(first)]
    own = repeated(np.arange(shape[1]) + np.zeros(shape, int), np.ones(shape, bool))
    metrics = summarize(
        found, at_first, own, level=0.95, seed=0, domains=domains, languages=languages
    )
    rows = [_row(found, i, domains, languages, at_first, pieces) for i in range(shape[0])]
    return {
        "name": name,
        "metrics": metrics.to_json(),
        "rows": rows,
        "examples": [_example(rng, row, pieces) for row in rows if not row["censored"]][
            :n_examples
        ],
    }


def _row(found, i, domains, languages, at_first, pieces):
    parted = at_first[i] is not None
    parting = {
        "margin": at_first[i],
        "base_token": pieces[i][int(found.fdt[i])] if parted else None,
        "candidate_token": " other" if parted else None,
        "base_token_p": 0.412 if parted else None,
        "base_token_q": 0.287 if parted else None,
        "candidate_token_p": 0.362 if parted else None,
        "candidate_token_q": 0.438 if parted else None,
    }
    row = Row(
        prompt=i,
        domain=domains[i],
        language=languages[i],
        fdt=int(found.fdt[i]),
        censored=bool(found.censored[i]),
        n_divergent=int(found.n_divergent[i]),
        n_tokens=int(found.n_tokens[i]),
        nats=float(found.nats[i]),
        kl=float(found.kl[i]),
        acceptance=float(found.acceptance[i]),
        **parting,
    )
    return vars(row)


def _example(rng, row, pieces):
    own, t = pieces[row["prompt"]], row["fdt"]
    return {
        "prompt": row["prompt"],
        "prompt_text": "the prompt",
        "shared_text": "".join(own[:t]),
        "base_text": "".join(own[t:]),
        "candidate_text": row["candidate_token"] + " " + _text(rng, len(own) - t),
        "fdt": t,
        "margin": row["margin"],
    }


def measured(metrics, n_prompts=24):
    """A measurement as a step of a plan's trail."""
    return {
        "step": "measured",
        "components_digest": "ef" * 32,
        "dtype": "float32",
        "prompts": {
            "source": "test",
            "digest": "12" * 32,
            "n_prompts": n_prompts,
            "skipped": 0,
            "prefix": 8,
            "new_tokens": 24,
        },
        "overlap": 0,
        "rounding_kl": 1e-11,
        "metrics": metrics,
        "reading": {"sdt": 2.0, "fdt": 2.0, "n_flips": 9.0, "n_first": 5.0},
    }


def renamed(sweep, names):
    """A sweep whose first components have other names."""
    other = {c.name: new for c, new in zip(sweep.components, names, strict=False)}

    def new(name):
        return other.get(name, name)

    return replace(
        sweep,
        components=tuple(replace(c, name=new(c.name)) for c in sweep.components),
        rows=tuple(replace(row, component=new(row.component)) for row in sweep.rows),
        all_draws={(new(name), scheme): s for (name, scheme), s in sweep.all_draws.items()},
    )


def folder(path, *, record=None, sweep=None):
    """A file of every kind in a folder; their paths by kind."""
    record = record or comparison()
    metrics = record["candidates"][1]["metrics"]
    found = {kind: path / f"{kind}.json" for kind in ("comparison", "plan", "curve", "pruning")}
    found |= {"sweep": path / "sweep.db", "verification": path / "verification.json"}
    sensitivities = sweeps.written(found["sweep"], sweep or sweeps.sweep())
    settings = Settings()
    plan = search(sensitivities, Budget(Unit.bits, 6.0), settings).plan_file(measured(metrics))
    points = curve_of(sensitivities, [RankBy.kl, RankBy.weight_error], [7, 28], settings, fit([]))
    law = fit([]).to_json()
    base = {name: BASE[name] for name in ("reference", "fingerprint")}
    write(found["comparison"], record)
    write(found["plan"], plan.to_json())
    write(
        found["curve"],
        {
            "schema": "divergent-tokens/curve/1",
            "base": base,
            "law": law,
            "refit": None,
            "points": [point.to_json(measured(metrics)) for point in points],
        },
    )
    names = [component.name for component in sensitivities.components]
    write(found["pruning"], pruning(names, metrics))
    write(found["verification"], verification(record, metrics))
    return found


def pruning(names, metrics):
    """pruning.json of three rounds."""
    means = {"fdt": 12.0, "sdt": 0.1, "kl": 0.05, "ppl": 30.0}
    return {
        "schema": "divergent-tokens/pruning/1",
        "versions": versions(),
        "command": ["dtm", "prune", "tiny"],
        "settings": {
            "sparsity": 0.5,
            "rounds": 3,
            "criterion": "fisher",
            "allocate": "global",
            "pattern": None,
            "seed": 0,
        },
        "base": BASE,
        "data": {"source": "self", "digest": "34" * 32, "n_sequences": 8, "length": 32},
        "prompts": measured(metrics)["prompts"],
        "base_ppl": 26.5,
        "rounds": [
            {
                "round": i + 1,
                "target": share,
                "sparsity": share,
                "loss": 0.5,
                "before": {**means, "ppl": 40.0},
                "after": means,
                "sparsities": dict.fromkeys(names, share),
            }
            for i, share in enumerate((0.2, 0.4, 0.5))
        ],
        "components": [
            {"name": n, "kind": n.split(".")[-1], "layer": 0, "n_parameters": 100, "n_zero": 50}
            for n in names
        ],
        "metrics": metrics,
    }


def verification(record, metrics):
    """verification.json of a checkpoint that is as planned."""
    return {
        "schema": "divergent-tokens/verification/1",
        "versions": versions(),
        "command": ["dtm", "verify", "DIR"],
        "folder": "DIR",
        "base": BASE,
        "plan": {
            "digest": "ef" * 32,
            "n_components": 28,
            "size_bytes": 50,
            "base_size_bytes": 100,
        },
        "passed": True,
        "checks": [{"name": "loads", "passed": True, "found": "in a fresh process"}],
        "worst": None,
        "measured": {
            "prompts": measured(metrics)["prompts"],
            "rounding": record["rounding"],
            "candidates": {"in memory": metrics, "reloaded": metrics},
            "overlap": None,
        },
        "servers": {"vllm": [], "transformers": []},
    }


def write(path, record):
    path.write_text(json.dumps(record))
    return path
