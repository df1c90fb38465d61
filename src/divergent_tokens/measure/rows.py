"""One row a prompt: how a candidate did there, and what happened where it left the base."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from divergent_tokens.measure.completions import Completions
from divergent_tokens.measure.metrics import Divergence


@dataclass(frozen=True)
class Row:
    """One prompt under one candidate; what belongs to the first divergence is None without one."""

    prompt: int
    domain: str | None
    language: str | None
    fdt: int
    censored: bool
    n_divergent: int
    n_tokens: int
    nats: float | None
    """−log q of the completion, summed."""
    kl: float | None
    """KL(p ‖ q) summed over the completion, in nats."""
    acceptance: float | None
    """Σ min(p, q) summed over the completion."""
    margin: float | None
    """The base's logit of its own token minus its best other one's."""
    base_token: str | None
    candidate_token: str | None
    base_token_p: float | None
    """The base's probability of the base's token."""
    base_token_q: float | None
    """The candidate's probability of the base's token."""
    candidate_token_p: float | None
    """The base's probability of the candidate's token."""
    candidate_token_q: float | None
    """The candidate's probability of its own token."""


@dataclass(frozen=True)
class TokenArrays:
    """What rows are made of, [prompt, token] each; log-probabilities are None where not known."""

    argmax_ids: NDArray[np.int32]
    margins: NDArray[np.float32]
    """The base's."""
    base_logprobs: NDArray[np.float32]
    logprobs: NDArray[np.float32] | None
    base_argmax_logprobs: NDArray[np.float32]
    argmax_logprobs: NDArray[np.float32] | None


_OF_THE_PARTING = (
    "margin",
    "base_token",
    "candidate_token",
    "base_token_p",
    "base_token_q",
    "candidate_token_p",
    "candidate_token_q",
)


def rows_of(
    divergence: Divergence,
    arrays: TokenArrays,
    completions: Completions,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Row, ...]:
    """The rows of a candidate, in the prompts' order."""
    return tuple(
        Row(
            prompt=i,
            domain=prompt.domain,
            language=prompt.language,
            fdt=int(divergence.fdt[i]),
            censored=bool(divergence.censored[i]),
            n_divergent=int(divergence.n_divergent[i]),
            n_tokens=int(divergence.n_tokens[i]),
            nats=_at(divergence.nats, i),
            kl=_at(divergence.kl, i),
            acceptance=_at(divergence.acceptance, i),
            **_parting(divergence, arrays, completions, tokenizer, i),
        )
        for i, prompt in enumerate(completions.prompts.prompts)
    )


def _parting(
    divergence: Divergence,
    arrays: TokenArrays,
    completions: Completions,
    tokenizer: PreTrainedTokenizerBase,
    i: int,
) -> dict[str, Any]:
    if divergence.censored[i]:
        return dict.fromkeys(_OF_THE_PARTING)
    t = int(divergence.fdt[i])
    return {
        "margin": float(arrays.margins[i, t]),
        "base_token": str(tokenizer.decode([int(completions.ids[i, t])])),
        "candidate_token": str(tokenizer.decode([int(arrays.argmax_ids[i, t])])),
        "base_token_p": _probability(arrays.base_logprobs, i, t),
        "base_token_q": _probability(arrays.logprobs, i, t),
        "candidate_token_p": _probability(arrays.base_argmax_logprobs, i, t),
        "candidate_token_q": _probability(arrays.argmax_logprobs, i, t),
    }


def _at(sums: NDArray[np.floating] | None, i: int) -> float | None:
    return None if sums is None else float(sums[i])


def _probability(logprobs: NDArray[np.float32] | None, i: int, t: int) -> float | None:
    if logprobs is None or np.isnan(logprobs[i, t]):
        return None
    return float(np.exp(np.float64(logprobs[i, t])))
