"""A sweep that no model made: harms, draws and margins of which everything is known."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from divergent_tokens.sensitivities import (
    ComponentRow,
    PromptRow,
    Sensitivities,
    Sensitivity,
    open_sensitivities,
    read_sensitivities,
)

PARTS = (("q", 64), ("k", 32), ("v", 32), ("o", 64), ("gate", 96), ("up", 96), ("down", 96))
BITS = {"int8": 8, "int6": 6, "int4": 4, "int3": 3}
N_TOKENS = 40
LAW = 2.0


@dataclass
class Sweep:
    """What `read_sensitivities` gives, in memory."""

    components: tuple[ComponentRow, ...]
    rows: tuple[Sensitivity, ...]
    margins: list[np.ndarray]
    all_draws: dict[tuple[str, str], np.ndarray]
    true_kl: dict[tuple[str, str], float]
    """What an endless sweep would find."""
    path: Path = Path("sweep.db")
    rounding_kl: float | None = None
    run: dict[str, Any] = field(default_factory=dict)

    @property
    def lengths(self):
        return np.array([len(row) for row in self.margins])

    @property
    def prompts(self):
        n = len(self.margins)
        return tuple(PromptRow(i, f"{i:064x}", None, None) for i in range(n))

    def draws(self, component, scheme):
        return self.all_draws[component, scheme]

    def prompt_kl(self, component, scheme, _method):
        return np.square(self.all_draws[component, scheme].astype(np.float64)).mean(1) / 2

    def below_rounding(self, row):
        return row.method == "measure" and row.kl < 3 * (self.rounding_kl or 0)


def kl_of(draws, lengths):
    return float(np.square(draws.astype(np.float64)).mean(1).sum() / 2 / lengths.sum())


def sweep(
    *,
    n_layers=4,
    schemes=("int8", "int4"),
    methods=("probe",),
    n_prompts=32,
    n_draws=1,
    noise=1.0,
    scale=1e-5,
    seed=0,
    prompt_seed=100,
    model_type="llama",
) -> Sweep:
    """Components whose true KLs span three orders of magnitude, seen through noisy draws.

    `noise` is how much a component's own KL differs from prompt to prompt (sd of its logarithm).
    The same `seed` gives the same components; `prompt_seed` chooses the prompts and labels.
    """
    truth, rng = np.random.default_rng(seed), np.random.default_rng(prompt_seed)
    components = [
        ComponentRow(
            f"model.layers.{layer}.{'mlp' if n == 96 else 'self_attn'}.{kind}_proj",
            kind,
            layer,
            n,
            64,
            n * 64,
            n * 128,
        )
        for layer in range(n_layers)
        for kind, n in PARTS
    ]
    margins = list(rng.gamma(1.0, 3.0, (n_prompts, N_TOKENS)))
    lengths = np.full(n_prompts, N_TOKENS)
    rows, draws, true_kl = [], {}, {}
    for component in components:
        own = scale * 10 ** truth.uniform(0, 3)
        for scheme in schemes:
            bits = BITS[scheme]
            kl = true_kl[component.name, scheme] = own * 4.0 ** (8 - bits)
            by_prompt = kl * N_TOKENS * rng.lognormal(-(noise**2) / 2, noise, n_prompts)
            s = np.sqrt(2 * by_prompt)[:, None] * rng.normal(size=(n_prompts, n_draws))
            draws[component.name, scheme] = s.astype(np.float32)
            for method in methods:
                measured = method == "measure"
                seen = kl_of(draws[component.name, scheme], lengths)
                flipped = rng.normal(0, LAW * math.sqrt(seen), (n_prompts, N_TOKENS)) > margins
                fdt = np.where(flipped.any(1), flipped.argmax(1), N_TOKENS).mean()
                rows.append(
                    Sensitivity(
                        component=component.name,
                        scheme=scheme,
                        method=method,
                        kl=seen,
                        kl_se=seen / 5,
                        fdt=float(fdt) if measured else None,
                        sdt=float(flipped.mean()) if measured else None,
                        dppl=float(3.0 * math.exp(rng.normal(0, kl))) if measured else None,
                        acceptance=1 - math.sqrt(seen / 2) / 2 if measured else None,
                        ppl=None,
                        weight_error=float(2.0**-bits * rng.lognormal(0, 0.1)),
                        n_prompts=n_prompts,
                        size_bytes=component.n_parameters * bits // 8 + 2 * component.out_features,
                        seconds=0.1,
                    )
                )
    run = {
        "base": {
            "reference": "tiny",
            "fingerprint": "ab" * 32,
            "model_type": model_type,
            "config": {"model_type": model_type},
        },
        "prompts": {"digest": "cd" * 32, "n_prompts": n_prompts, "prefix": 8, "source": "test"},
        "dtype": "float32",
        "new_tokens": N_TOKENS,
        "base_dppl": 3.0,
        "base_ppl": None,
    }
    return Sweep(tuple(components), tuple(rows), margins, draws, true_kl, run=run)


def written(path: Path, sweep: Sweep) -> Sensitivities:
    """The same through a file."""
    run = {**sweep.run, "rounding_kl": sweep.rounding_kl}
    with open_sensitivities(path, run, sweep.components, sweep.prompts, sweep.margins) as writer:
        probed = [row for row in sweep.rows if row.method == "probe"]
        writer.add_all([(row, sweep.draws(row.component, row.scheme)) for row in probed])
        for row in sweep.rows:
            if row.method == "measure":
                writer.add(row, prompt_kl=sweep.prompt_kl(row.component, row.scheme, row.method))
    return read_sensitivities(path)
