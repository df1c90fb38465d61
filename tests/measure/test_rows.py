import dataclasses

import numpy as np
import pytest

import runs
import tiny
from divergent_tokens.measure.metrics import divergence
from divergent_tokens.measure.prompts import Prompt
from divergent_tokens.measure.rows import TokenArrays, rows_of

PROMPTS = dataclasses.replace(
    runs.prompts(2), prompts=(Prompt((5, 6), "a", "news", "de"), Prompt((7, 8), "b"))
)
COMPLETIONS = runs.written(PROMPTS, [[40, 41, 42], [43, 44]])
ARGMAX = np.array([[40, 50, 42], [43, 44, 0]], np.int32)
ARRAYS = TokenArrays(
    argmax_ids=ARGMAX,
    margins=np.array([[3, 0.25, 2], [1, 1, 0]], np.float32),
    base_logprobs=np.log(np.array([[0.9, 0.5, 0.8], [0.7, 0.6, 1]], np.float32)),
    logprobs=np.log(np.array([[0.9, 0.25, 0.8], [0.7, 0.6, 1]], np.float32)),
    base_argmax_logprobs=np.log(np.array([[0.9, 0.375, 0.8], [0.7, 0.6, 1]], np.float32)),
    argmax_logprobs=np.log(np.array([[0.9, 0.625, 0.8], [0.7, 0.6, 1]], np.float32)),
)


def rows(arrays=ARRAYS, **scores):
    found = divergence(ARGMAX, COMPLETIONS.ids, COMPLETIONS.mask, **scores)
    return rows_of(found, arrays, COMPLETIONS, tiny.tokenizer())


def test_a_row_says_what_happened_at_the_first_divergence():
    first, second = rows(
        logprobs=ARRAYS.logprobs, kl=np.full((2, 3), 0.5), acceptance=np.ones((2, 3))
    )
    decode = tiny.tokenizer().decode
    assert (first.prompt, first.domain, first.language) == (0, "news", "de")
    assert (first.fdt, first.censored, first.n_divergent, first.n_tokens) == (1, False, 1, 3)
    assert first.nats == pytest.approx(-np.log(0.9 * 0.25 * 0.8))
    assert (first.kl, first.acceptance, first.margin) == (1.5, 3, 0.25)
    assert (first.base_token, first.candidate_token) == (decode([41]), decode([50]))
    at_parting = (first.base_token_p, first.base_token_q)
    assert at_parting == pytest.approx((0.5, 0.25))
    assert (first.candidate_token_p, first.candidate_token_q) == pytest.approx((0.375, 0.625))
    assert (second.fdt, second.censored, second.domain) == (2, True, None)
    assert second.margin is second.base_token is second.candidate_token_q is None


def test_what_an_engine_does_not_say_is_none():
    arrays = dataclasses.replace(
        ARRAYS, logprobs=None, argmax_logprobs=np.full((2, 3), np.nan, np.float32)
    )
    first, _ = rows(arrays)
    assert first.nats is first.kl is first.acceptance is None
    assert first.base_token_q is first.candidate_token_q is None
    assert first.candidate_token_p == pytest.approx(0.375)
