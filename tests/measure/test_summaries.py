import json

import numpy as np
import pytest

from divergent_tokens.measure.metrics import divergence
from divergent_tokens.measure.summaries import summarize

RNG = np.random.default_rng(0)
LENGTHS = RNG.integers(3, 13, 24)
MASK = np.arange(12) < LENGTHS[:, None]
IDS = RNG.integers(0, 9, (24, 12))
ARGMAX = np.where(RNG.random((24, 12)) < 0.15, IDS + 1, IDS)
LOGPROBS = -RNG.exponential(1, (24, 12))
KL = RNG.exponential(0.1, (24, 12))
DOMAINS = ["news", "code", None, "story"] * 6
LANGUAGES = ["en", "de"] * 12


def found(**options):
    d = divergence(
        ARGMAX,
        IDS,
        MASK,
        logprobs=LOGPROBS,
        base_logprobs=LOGPROBS / 2,
        kl=KL,
        acceptance=np.exp(-KL),
    )
    at_first = [None if c else 0.01 * i for i, c in enumerate(d.censored)]
    return summarize(
        d,
        at_first,
        np.zeros_like(MASK),
        level=0.9,
        seed=4,
        **{"domains": DOMAINS, "languages": LANGUAGES, **options},
    )


def test_values_are_pooled_over_tokens_and_fdt_is_a_mean_over_prompts():
    metrics = found()
    n = MASK.sum()
    assert metrics.n_tokens == n
    assert metrics.sdt.value == pytest.approx(((ARGMAX != IDS) & MASK).sum() / n)
    assert metrics.dppl.value == pytest.approx(np.exp(-LOGPROBS[MASK].sum() / n))
    assert metrics.base_dppl == pytest.approx(np.exp(-LOGPROBS[MASK].sum() / n / 2))
    assert metrics.kl.value == pytest.approx(KL[MASK].sum() / n)
    assert metrics.kl_p99 == pytest.approx(np.quantile(KL[MASK], 0.99))
    assert metrics.acceptance.value == pytest.approx(np.exp(-KL)[MASK].sum() / n)
    apart = (ARGMAX != IDS) & MASK
    first = [
        np.flatnonzero(row)[0] if row.any() else k for row, k in zip(apart, LENGTHS, strict=True)
    ]
    assert metrics.fdt.value == pytest.approx(np.mean(first))
    assert metrics.mean_length == pytest.approx(LENGTHS.mean())
    assert metrics.identical == pytest.approx((~apart.any(1)).mean())
    assert metrics.repeated == 0
    for estimate in (metrics.fdt, metrics.sdt, metrics.dppl, metrics.kl, metrics.acceptance):
        assert estimate.low < estimate.value < estimate.high
        assert (estimate.level, estimate.n_prompts, estimate.seed) == (0.9, 24, 4)


def test_the_identity_of_sdt_and_dppl_holds_for_pooled_values():
    metrics = found()
    assert metrics.sdt.value > 0
    # Here the log-probabilities are not those of the argmaxes, so only the arithmetic is tested.
    assert np.log2(metrics.dppl.value) == pytest.approx(-LOGPROBS[MASK].mean() / np.log(2))


def test_groups_add_up_and_prompts_without_one_are_in_none():
    metrics = found()
    assert list(metrics.by_domain) == ["code", "news", "story"]
    assert list(metrics.by_language) == ["de", "en"]
    for groups, member in [(metrics.by_domain, DOMAINS), (metrics.by_language, LANGUAGES)]:
        for name, part in groups.items():
            rows = [i for i, group in enumerate(member) if group == name]
            assert part.n_tokens == LENGTHS[rows].sum()
            assert part.fdt.n_prompts == len(rows)
            assert part.kl.value == pytest.approx(KL[rows][MASK[rows]].mean())
            assert (part.by_domain, part.by_language) == ({}, {})
    whole = sum(part.n_tokens * part.sdt.value for part in metrics.by_language.values())
    assert whole == pytest.approx(metrics.n_tokens * metrics.sdt.value)
    fdt = sum(part.fdt.n_prompts * part.fdt.value for part in metrics.by_language.values())
    assert fdt == pytest.approx(24 * metrics.fdt.value)


def test_json_is_plain_and_has_no_nan():
    plain = found(ppl={"conventional": {"value": 3.0}}).to_json()
    text = json.dumps(plain, allow_nan=False)
    assert json.loads(text) == plain
    assert plain["ppl"] == {"conventional": {"value": 3.0}}
    assert plain["by_domain"]["code"]["sdt"]["n_prompts"] == 6
    assert plain["survival"][0][0] == 0
    assert set(plain["fdt"]) >= {"value", "low", "high", "level", "n_prompts"}


def test_what_was_not_measured_is_none():
    metrics = summarize(
        divergence(ARGMAX, IDS, MASK), [None] * 24, np.zeros_like(MASK), level=0.95, seed=0
    )
    absent = (metrics.dppl, metrics.base_dppl, metrics.kl, metrics.kl_p99, metrics.acceptance)
    assert absent == (None,) * 5
    assert metrics.near_ties is None
    assert metrics.ppl is None
    assert metrics.to_json()["kl"] is None
    assert metrics.by_domain == {}


def test_one_prompt_has_values_and_no_interval():
    d = divergence(ARGMAX[:1], IDS[:1], MASK[:1], kl=KL[:1])
    metrics = summarize(d, [None], np.zeros_like(MASK[:1]), level=0.95, seed=0, domains=["a"])
    assert metrics.fdt.value is not None
    assert (metrics.fdt.low, metrics.fdt.high) == (None, None)
    json.dumps(metrics.to_json(), allow_nan=False)


def test_no_divergence_leaves_an_interval_of_some_width():
    d = divergence(IDS, IDS, MASK, kl=np.zeros((24, 12)), acceptance=np.ones((24, 12)))
    metrics = summarize(d, [None] * 24, np.zeros_like(MASK), level=0.95, seed=0)
    assert metrics.sdt.value == 0 < metrics.sdt.high
    assert metrics.fdt.low < metrics.fdt.value == metrics.mean_length
    assert metrics.identical == 1
    assert metrics.median_fdt.value is None
    json.dumps(metrics.to_json(), allow_nan=False)
