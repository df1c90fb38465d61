import contextlib
import dataclasses
import json

import numpy as np
import pytest
import torch

import runs
import tiny
from divergent_tokens.errors import DivergentTokensError, ModelError, PromptError
from divergent_tokens.measure import ways
from divergent_tokens.measure.comparison import compare
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.engine import write_completions
from divergent_tokens.measure.prompts import Prompt
from divergent_tokens.models import Model

TEXT = " ".join(tiny.SENTENCES * 20)


@pytest.fixture(scope="module")
def base():
    return runs.model()


@pytest.fixture(scope="module")
def prompts():
    """With domains, and of two lengths."""
    plain = runs.prompts(lengths=[8, 6] * 6)
    tagged = tuple(
        dataclasses.replace(p, domain="abc"[i % 3], language="en")
        for i, p in enumerate(plain.prompts)
    )
    return dataclasses.replace(plain, prompts=tagged)


def lend(*models, log=None):
    """Named candidates that write down when they are entered and left."""

    @contextlib.contextmanager
    def lent(model):
        if log is not None:
            log.append(("in", model.reference))
        try:
            yield model
        finally:
            if log is not None:
                log.append(("out", model.reference))

    return {model.reference: lent(model) for model in models}


@pytest.fixture(scope="module")
def result(base, prompts):
    mild, strong = runs.noisy(base, 0.01), runs.noisy(base, 0.2)
    return compare(base, lend(mild, strong), prompts, new_tokens=12, n_examples=2, text=TEXT)


def test_the_noise_floor_is_the_base_against_itself(result):
    floor = result.noise_floor
    assert floor.sdt.value == floor.kl.value == 0
    assert floor.acceptance.value == floor.identical == 1
    assert floor.dppl.value == pytest.approx(floor.base_dppl)
    assert floor.fdt.value == floor.mean_length == result.completions.lengths.mean() > 6
    assert floor.near_ties is None


def test_rounding_lies_between_nothing_and_a_change(result):
    mild = result.candidates[0].metrics
    assert 0 < result.rounding.kl.value < 1e-6 < mild.kl.value
    assert result.rounding.sdt.value == 0


def test_candidates_come_in_order_and_the_stronger_change_is_farther(result):
    mild, strong = (candidate.metrics for candidate in result.candidates)
    assert [c.name for c in result.candidates] == ["noise 0.01 1", "noise 0.2 1"]
    assert mild.kl.value < strong.kl.value
    assert mild.fdt.value > strong.fdt.value
    assert mild.sdt.value < strong.sdt.value <= np.log2(strong.dppl.value)
    assert mild.base_dppl == strong.base_dppl == pytest.approx(result.noise_floor.base_dppl)
    assert mild.ppl["conventional"]["value"] != strong.ppl["conventional"]["value"]


def test_groups_and_rows_add_up(result):
    for candidate in result.candidates:
        metrics, rows = candidate.metrics, candidate.rows
        assert len(rows) == 12
        assert np.mean([row.fdt for row in rows]) == pytest.approx(metrics.fdt.value)
        n_tokens = sum(row.n_tokens for row in rows)
        assert n_tokens == metrics.n_tokens
        assert sum(row.n_divergent for row in rows) / n_tokens == pytest.approx(metrics.sdt.value)
        assert sum(row.kl for row in rows) / n_tokens == pytest.approx(metrics.kl.value)
        assert list(metrics.by_domain) == ["a", "b", "c"]
        assert sum(part.n_tokens for part in metrics.by_domain.values()) == n_tokens
        pooled = sum(p.n_tokens * p.kl.value for p in metrics.by_domain.values()) / n_tokens
        assert pooled == pytest.approx(metrics.kl.value)
        assert metrics.by_language["en"].fdt.value == pytest.approx(metrics.fdt.value)


def test_margins_and_probabilities_belong_to_the_first_divergence(result):
    strong = result.candidates[1]
    for row in strong.rows:
        if row.censored:
            assert row.margin is None
            continue
        assert row.margin == result.margins[row.prompt, row.fdt] > 0
        assert row.base_token_p >= row.candidate_token_p
        assert row.candidate_token_q >= row.base_token_q
    near = [row.margin < 0.1 for row in strong.rows if not row.censored]
    assert strong.metrics.near_ties == pytest.approx(np.mean(near))
    assert [example.fdt for example in strong.examples] == sorted(r.fdt for r in strong.rows)[:2]


def test_pairs(result):
    (pair,) = result.pairs
    assert (pair.a, pair.b) == ("noise 0.01 1", "noise 0.2 1")
    difference = result.candidates[0].metrics.fdt.value - result.candidates[1].metrics.fdt.value
    assert pair.fdt_difference.value == pytest.approx(difference)


def test_json_has_every_part_and_no_nan(result):
    plain = result.to_json()
    again = json.loads(json.dumps(plain, allow_nan=False))
    assert again.keys() >= {"schema", "versions", "command", "seed", "base", "prompts", "pairs"}
    assert again["schema"] == "divergent-tokens/comparison/1"
    assert again["base"]["dtype"] == "float32"
    lengths = [len(row) for row in again["prompts"]["margins"]]
    assert lengths == [row["n_tokens"] for row in again["candidates"][0]["rows"]]
    assert len(set(lengths)) > 1
    assert again["prompts"]["n_prompts"] == len(again["prompts"]["texts"]) == 12
    assert len(again["candidates"][1]["rows"]) == 12
    assert len(again["candidates"][1]["examples"]) == 2


def plain_candidates(found):
    return {c["name"]: c for c in found.to_json()["candidates"]}


def test_the_order_of_candidates_changes_nothing(base, prompts, result):
    mild, strong = runs.noisy(base, 0.01), runs.noisy(base, 0.2)
    swapped = compare(base, lend(strong, mild), prompts, new_tokens=12, n_examples=2, text=TEXT)
    assert plain_candidates(swapped) == plain_candidates(result)
    assert swapped.noise_floor.to_json() == result.noise_floor.to_json()
    assert swapped.pairs[0].p_value == result.pairs[0].p_value


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_base_as_its_own_candidate(architecture, prompts):
    base = runs.model(architecture)
    found = compare(base, lend(base), prompts, new_tokens=8)
    metrics = found.candidates[0].metrics
    assert metrics.sdt.value == metrics.kl.value == 0
    assert metrics.acceptance.value == metrics.identical == 1
    assert metrics.dppl.value == found.noise_floor.dppl.value
    assert found.candidates[0].examples == ()


def test_the_second_time_the_base_neither_writes_nor_runs(base, prompts, tmp_path, monkeypatch):
    candidate = runs.noisy(base, 0.1)
    first = compare(base, lend(candidate), prompts, new_tokens=12, cache=tmp_path)
    monkeypatch.setitem(ways.WAYS, "dynamic", None)
    long = []

    def count(network):
        forward = network.forward

        def counting(input_ids=None, **kwargs):
            if input_ids is not None and input_ids.shape[1] > 4:
                long.append(tuple(input_ids.shape))
            return forward(input_ids=input_ids, **kwargs)

        network.forward = counting

    watched = dataclasses.replace(runs.changed(base, count), fingerprint=base.fingerprint)
    again = compare(watched, lend(candidate), prompts, new_tokens=12, cache=tmp_path)
    assert plain_candidates(again) == plain_candidates(first)
    assert len(long) == 1  # the rounding floor is the base's layers, changed


def test_each_candidate_is_entered_and_left_once_before_the_next(base, prompts):
    log = []
    one, two = runs.noisy(base, 0.01), runs.noisy(base, 0.02)
    compare(base, lend(one, two, log=log), prompts, new_tokens=4)
    expected = [(step, m.reference) for m in (one, two) for step in ("in", "out")]
    assert log == expected


def broken(base):
    def plant(network):
        network.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")

    return runs.changed(base, plant, "broken")


def test_a_candidate_that_fails_is_left_and_the_next_is_not_entered(base, prompts):
    log = []
    one, two = runs.noisy(base, 0.01), runs.noisy(base, 0.02)
    before = {name: t.clone() for name, t in base.network.state_dict().items()}
    with pytest.raises(ModelError, match=r"broken .*model\.layers\.1\.mlp\.up_proj"):
        compare(base, lend(one, broken(base), two, log=log), prompts, new_tokens=4)
    names = [one.reference, "broken"]
    assert log == [(step, name) for name in names for step in ("in", "out")]
    assert all(torch.equal(before[n], t) for n, t in base.network.state_dict().items())


def test_a_candidate_with_another_vocabulary_is_refused_and_left(base, prompts):
    log = []
    other = runs.model("llama-padded")
    with pytest.raises(ModelError, match="256 in the base and 293 in the candidate"):
        compare(base, lend(other, log=log), prompts, new_tokens=4)
    assert log == [("in", other.reference), ("out", other.reference)]


def test_a_candidate_with_fewer_positions_is_refused(base, prompts):
    def shorten(network):
        network.config.max_position_embeddings = 10

    short = runs.changed(base, shorten, "short")
    with pytest.raises(PromptError, match="short has 10"):
        compare(base, lend(short), prompts, new_tokens=4)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_lent_head_leaves_the_bases_logits_alone(architecture, prompts):
    """As good as a network of its own, tied to the embeddings or not."""
    mine = runs.changed(runs.model(architecture), lambda network: None, "mine")

    def change(network):
        weight = network.get_output_embeddings().weight
        weight.data = weight.data * 1.01

    @contextlib.contextmanager
    def head_changed():
        weight = mine.network.get_output_embeddings().weight
        kept = weight.data
        change(mine.network)
        try:
            yield mine
        finally:
            weight.data = kept

    apart = runs.changed(mine, change, "apart")
    found = compare(mine, {"lent": head_changed()} | lend(apart), prompts, new_tokens=4)
    lent, own = (result.metrics for result in found.candidates)
    assert lent.kl.value > 1e-6
    assert lent.to_json() == own.to_json()


def test_a_head_that_is_overwritten_is_refused(base, prompts):
    """It would change the base's logits too, and the KL would be wrong in silence."""
    mine = runs.changed(base, lambda network: None, "mine")

    @contextlib.contextmanager
    def overwritten():
        with torch.no_grad():
            mine.network.lm_head.weight.mul_(1.01)
        yield mine

    with pytest.raises(ModelError, match="head overwrites weights of the head in the base's own"):
        compare(mine, {"head": overwritten()}, prompts, new_tokens=4)


def test_no_candidate_and_two_of_one_name(base, prompts, tmp_path):
    with pytest.raises(DivergentTokensError, match="no candidate"):
        compare(base, {}, prompts)
    with pytest.raises(DivergentTokensError, match="two candidates are called 'llama'"):
        compare(base, lend(base), prompts, scores={"llama": tmp_path / "x"})


def scores_file(base, prompts, path, candidate):
    """What an engine that runs `candidate` would send back."""
    completions = complete(base, prompts, new_tokens=12)
    write_completions(path, completions)
    scores = runs.scored(base, candidate, completions)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row, ids, logprobs, own in zip(
        rows, scores.argmax_ids, scores.logprobs, scores.argmax_logprobs, strict=True
    ):
        n = len(row["completion_ids"])
        row["argmax_ids"] = ids[:n].tolist()
        row["logprobs"] = logprobs[:n].tolist()
        tops = zip(ids[:n].tolist(), own[:n].tolist(), strict=True)
        row["top_logprobs"] = [{str(token): logprob} for token, logprob in tops]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_scores_from_an_engine_say_what_the_model_itself_says(base, prompts, tmp_path):
    candidate = runs.noisy(base, 0.2)
    scores_file(base, prompts, tmp_path / "same.jsonl", base)
    scores_file(base, prompts, tmp_path / "other.jsonl", candidate)
    files = {"same": tmp_path / "same.jsonl", "other": tmp_path / "other.jsonl"}
    found = compare(base, lend(candidate), prompts, scores=files, new_tokens=12, n_examples=1)
    model, same, other = found.candidates
    assert same.metrics.sdt.value == 0
    assert same.metrics.dppl.value == pytest.approx(found.noise_floor.dppl.value)
    assert other.metrics.sdt == model.metrics.sdt
    assert other.metrics.fdt == model.metrics.fdt
    assert other.metrics.dppl.value == pytest.approx(model.metrics.dppl.value)
    assert other.metrics.kl is other.metrics.acceptance is other.metrics.ppl is None
    for row, expected in zip(other.rows, model.rows, strict=True):
        for name in ("base_token_p", "base_token_q", "candidate_token_p", "candidate_token_q"):
            assert getattr(row, name) == pytest.approx(getattr(expected, name), rel=1e-4)
    assert len(found.pairs) == 3
    json.dumps(found.to_json(), allow_nan=False)


def test_bfloat16_has_a_rounding_floor_to_speak_of(base, prompts):
    half = runs.changed(base, lambda network: network.bfloat16(), "half")
    found = compare(half, lend(half), prompts, new_tokens=8)
    assert found.candidates[0].metrics.kl.value == 0
    assert found.rounding.kl.value > 1e-6


def test_prompts_of_one_token_and_completions_that_end_at_once(base):
    prompts = dataclasses.replace(runs.prompts(2), prompts=(Prompt((5,), "a"), Prompt((9,), "b")))
    ends = sorted({int(i) for i in complete(base, prompts, new_tokens=1).ids[:, 0]})
    found = compare(runs.with_ends(base, ends), lend(runs.noisy(base)), prompts, new_tokens=5)
    assert found.noise_floor.n_tokens == 2
    json.dumps(found.to_json(), allow_nan=False)


def test_settings_reach_the_estimates(base, prompts):
    found = compare(base, lend(runs.noisy(base)), prompts, new_tokens=4, level=0.8, seed=5)
    assert found.candidates[0].metrics.fdt.level == 0.8
    assert found.candidates[0].metrics.kl.seed == 5
    assert isinstance(found.base, Model)
