"""Tasks of lm-eval on tiny models, against slow computations that know nothing of it."""

import contextlib
import copy
import logging
import os
import random

import numpy as np
import pytest
import torch

import lm_tasks
import offloaded
import runs
import tiny
from divergent_tokens.candidates import scheme_candidates
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.comparison import compare
from divergent_tokens.models import Model, load_model
from divergent_tokens.tasks import read_tasks

NEWLY = 6


def ids_of(text):
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


@torch.no_grad()
def nats_and_greedy(model, context, continuation):
    """Log-likelihood of the tokens after the context's, and whether all are the largest.

    As the harness does it, the context is encoded by itself: a merge across the border is undone.
    """
    ids = ids_of(context)
    start, whole = len(ids), [*ids, *ids_of(context + continuation)[len(ids) :]]
    logits = model.network(torch.tensor([whole])).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)
    nats = sum(logprobs[t - 1, whole[t]].item() for t in range(start, len(whole)))
    return nats, all(int(logits[t - 1].argmax()) == whole[t] for t in range(start, len(whole)))


@torch.no_grad()
def written(model, text):
    """At most six tokens, one pass each, to an end of sequence or a blank line."""
    ids = ids_of(text)
    start = len(ids)
    while len(ids) < start + NEWLY:
        ids.append(int(model.network(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] in model.eos_ids:
            break
    return tiny.tokenizer().decode(ids[start:], skip_special_tokens=True).split("\n\n")[0]


def answers_by_metric(model, *names, **settings):
    return {(a.task, a.metric): a for a in read_tasks(names, **settings)(model)}


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_multiple_choice_is_that_of_a_slow_computation(tmp_path, architecture):
    model = runs.model(architecture)
    file = lm_tasks.multiple_choice(tmp_path)
    found = answers_by_metric(model, str(file))
    for metric, length in (("acc", lambda _: 1), ("acc_norm", len)):
        expected = []
        for row in lm_tasks.CHOICES:
            nats = [nats_and_greedy(model, row["question"], f" {c}")[0] for c in row["choices"]]
            sizes = [length(choice) for choice in row["choices"]]
            expected.append(int(np.argmax(np.array(nats) / sizes)))
        answers = found["choices", metric]
        assert answers.choices == tuple(expected)
        right = [
            taken == row["answer"] for taken, row in zip(expected, lm_tasks.CHOICES, strict=True)
        ]
        assert answers.right.tolist() == right
        assert answers.value == pytest.approx(np.mean(right))
        assert answers.stderr == pytest.approx(np.std(right, ddof=1) / np.sqrt(len(right)))
    assert found["choices", "acc"].choices != found["choices", "acc_norm"].choices


def test_loglikelihood_is_that_of_a_slow_computation(tmp_path):
    model = runs.model()
    # Every other target is what the model would write.
    rows = [
        row | ({} if i % 2 else {"target": written(model, row["text"])})
        for i, row in enumerate(lm_tasks.TEXTS)
    ]
    found = answers_by_metric(model, str(lm_tasks.loglikelihood(tmp_path, rows=rows)))
    slow = [nats_and_greedy(model, row["text"], row["target"]) for row in rows]
    assert found["last_word", "acc"].right.tolist() == [greedy for _, greedy in slow]
    assert 0 < found["last_word", "acc"].value < 1
    assert found["last_word", "acc"].choices is None
    perplexity = found["last_word", "perplexity"]
    assert perplexity.value == pytest.approx(np.exp(-np.mean([nats for nats, _ in slow])), rel=1e-4)
    assert perplexity.stderr > 0
    assert perplexity.right is None
    assert not perplexity.higher_is_better


def test_generation_is_that_of_a_slow_loop(tmp_path):
    model = runs.model()
    own = [written(model, row["text"]) for row in lm_tasks.TEXTS]
    rows = [
        {"text": row["text"], "target": "something else" if i % 5 == 0 else own[i]}
        for i, row in enumerate(lm_tasks.TEXTS)
    ]
    found = answers_by_metric(model, str(lm_tasks.generate_until(tmp_path, rows)))
    answers = found["writes", "exact_match"]
    assert answers.choices == tuple(own)
    assert answers.right.tolist() == [i % 5 != 0 for i in range(len(rows))]
    assert answers.value == pytest.approx(0.8)


def test_batches_change_nothing(tmp_path):
    lm_tasks.multiple_choice(tmp_path)
    one, eight = (
        read_tasks(["choices"], paths=[tmp_path], batch_size=size)(runs.model()) for size in (1, 8)
    )
    assert [a.choices for a in one] == [a.choices for a in eight]


def test_few_shot_examples_are_the_same_for_every_model(tmp_path):
    lm_tasks.multiple_choice(tmp_path)
    with_two = read_tasks(["choices"], paths=[tmp_path], num_fewshot=2)
    first, again = with_two(runs.model()), with_two(runs.noisy(runs.model(), 0.3))
    assert [a.documents for a in first] == [a.documents for a in again]
    without = read_tasks(["choices"], paths=[tmp_path])(runs.model())
    assert without[0].documents != first[0].documents  # the prompts' digests are in them


def test_a_task_that_says_no_examples_gets_none(tmp_path):
    lm_tasks.multiple_choice(tmp_path, num_fewshot=0)
    asked, plain = (
        read_tasks(["choices"], paths=[tmp_path], num_fewshot=n)(runs.model()) for n in (2, None)
    )
    assert asked[0].documents == plain[0].documents


@pytest.mark.parametrize(("limit", "n"), [(5, 5), (0.25, 3), (1000, 12), (None, 12)])
def test_limit(tmp_path, limit, n):
    lm_tasks.multiple_choice(tmp_path)
    (acc, _) = read_tasks(["choices"], paths=[tmp_path], limit=limit)(runs.model())
    assert len(acc.documents) == len(acc.right) == n


def test_a_group_has_the_documents_of_its_tasks(tmp_path):
    lm_tasks.multiple_choice(tmp_path)
    lm_tasks.multiple_choice(tmp_path, "few", lm_tasks.CHOICES[:4])
    lm_tasks.group(tmp_path, "both", "choices", "few")
    found = answers_by_metric(runs.model(), "both", paths=[tmp_path])
    parts, whole = [found["choices", "acc"], found["few", "acc"]], found["both", "acc"]
    assert whole.right.tolist() == [right for part in parts for right in part.right]
    assert whole.value == pytest.approx(np.mean(whole.right))  # the harness weighs by size
    assert len(set(whole.documents)) == 16
    assert list(found)[-1] == ("both", "acc")


def test_tags_and_wildcards_stand_for_their_tasks(tmp_path):
    for name in ("animal_cats", "animal_dogs"):
        lm_tasks.multiple_choice(tmp_path, name, lm_tasks.CHOICES[:4], tag="pets")
    for asked in ("pets", "animal_*"):
        loaded = read_tasks([asked, "animal_cats"], paths=[tmp_path]).loaded["tasks"]
        assert list(loaded) == ["animal_cats", "animal_dogs"]


# --- nothing leaks ---


def test_the_harness_leaves_no_trace(tmp_path, capfd):
    lm_tasks.multiple_choice(tmp_path)
    lm_tasks.loglikelihood(tmp_path)
    model = runs.model()
    tokenizer = model.tokenizer
    random.seed(7)
    np.random.seed(7)  # noqa: NPY002
    torch.manual_seed(7)

    def state():
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        return (
            random.getstate(),
            (kind, keys.tolist(), *rest),
            torch.get_rng_state().tolist(),
            dict(os.environ),
            [logging.getLogger(name).level for name in ("lm_eval", "datasets", "")],
            (tokenizer.padding_side, tokenizer.truncation_side, tokenizer.pad_token_id),
            "tie_weights" in vars(model.network),
            model.network.training,
        )

    before = state()
    read_tasks(["choices", "last_word"], paths=[tmp_path])(model)
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_without_padding_stays_so(tmp_path):
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.pad_token = None
    model = Model(runs.model().network, tokenizer, "m", "f")
    lm_tasks.multiple_choice(tmp_path)
    found = read_tasks(["choices"], paths=[tmp_path])(model)
    assert tokenizer.pad_token is None
    assert found[0].choices == read_tasks(["choices"], paths=[tmp_path])(runs.model())[0].choices


def test_lent_weights_are_what_answers(tmp_path):
    lm_tasks.multiple_choice(tmp_path)
    asked, base = read_tasks(["choices"], paths=[tmp_path]), runs.model()
    before = asked(base)
    with scheme_candidates(base, "int2")["int2"] as lent:
        under = asked(lent)
    after = asked(base)
    assert [a.value for a in after] == [a.value for a in before]
    assert [a.choices for a in after] == [a.choices for a in before]
    assert under[0].choices != before[0].choices


def test_layers_that_wait_on_disk_answer_the_same(tmp_path):
    whole, spread = offloaded.both(tmp_path / "model")
    lm_tasks.multiple_choice(tmp_path)
    lm_tasks.generate_until(tmp_path, lm_tasks.TEXTS)
    asked = read_tasks(["choices", "writes"], paths=[tmp_path])
    assert [a.choices for a in asked(spread)] == [a.choices for a in asked(whole)]
    with (
        scheme_candidates(spread, "int4")["int4"] as lent,
        scheme_candidates(whole, "int4")["int4"] as same,
    ):
        assert [a.choices for a in asked(lent)] == [a.choices for a in asked(same)]


# --- in a comparison ---


def test_compare_counts_flips_against_the_base(tmp_path):
    lm_tasks.multiple_choice(tmp_path)
    base, other = runs.model(), runs.noisy(runs.model(), 0.4)
    asked = read_tasks(["choices"], paths=[tmp_path])
    found = compare(
        base,
        scheme_candidates(base, "int8") | {"noisy": contextlib.nullcontext(other)},
        runs.prompts(),
        new_tokens=4,
        tasks=asked,
    )
    ours, theirs = asked(base)[0].right, asked(other)[0].right
    int8, noisy = found.candidates
    flips = noisy.tasks[0].flips
    assert flips.to_wrong == int((ours & ~theirs).sum())
    assert flips.to_right == int((~ours & theirs).sum())
    assert flips.to_wrong + flips.to_right > 0
    assert noisy.tasks[0].answers.value == pytest.approx(theirs.mean())
    assert int8.tasks[0].flips is not None
    assert [result.flips.share.value for result in found.tasks.rounding] == [0, 0]
    record = found.to_json()
    assert record["tasks"]["settings"]["harness"].startswith("lm-eval 0.")
    assert record["candidates"][1]["tasks"][0]["flips"]["to_wrong"] == flips.to_wrong


# --- what can go wrong ---


def test_without_the_extra_one_line_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("divergent_tokens.tasks.find_spec", lambda _: None)
    with pytest.raises(DivergentTokensError, match=r"pip install 'divergent-tokens\[eval\]'"):
        read_tasks(["arc_easy"])


def test_an_unknown_task_names_near_misses(tmp_path):
    lm_tasks.multiple_choice(tmp_path)
    with pytest.raises(DivergentTokensError, match="no task 'arc_eazy'; did you mean arc_easy"):
        read_tasks(["choices", "arc_eazy"], paths=[tmp_path])


def test_a_definition_that_is_no_yaml_is_named(tmp_path):
    lm_tasks.multiple_choice(tmp_path)
    file = tmp_path / "broken.yaml"
    file.write_text("task: broken\n  output_type: [\n")
    with pytest.raises(DivergentTokensError, match=r"broken\.yaml cannot be read"):
        read_tasks([str(file)])


def test_data_that_is_not_there_is_named(tmp_path):
    file = lm_tasks.multiple_choice(tmp_path)
    (tmp_path / "choices.jsonl").unlink()
    with pytest.raises(DivergentTokensError, match=r"the task .*choices\.yaml cannot be loaded"):
        read_tasks([str(file)])


def test_a_prompt_that_cannot_be_built_is_found_before_any_model(tmp_path):
    file = lm_tasks.multiple_choice(tmp_path)
    file.write_text(file.read_text().replace("{{answer}}", "{{answer.of.nobody}}"))
    with pytest.raises(
        DivergentTokensError, match=r"choices\.yaml cannot be loaded|the task choices"
    ):
        read_tasks([str(file)])


def test_more_examples_than_there_are(tmp_path):
    file = lm_tasks.multiple_choice(tmp_path)
    with pytest.raises(DivergentTokensError, match=r"the task choices: .* has 60 examples to show"):
        read_tasks([str(file)], num_fewshot=60)


def test_code_that_a_model_writes_is_not_run(tmp_path):
    file = lm_tasks.generate_until(tmp_path, lm_tasks.TEXTS, unsafe_code=True)
    with pytest.raises(DivergentTokensError, match="the task writes runs code that the model"):
        read_tasks([str(file)])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"limit": 0}, "the limit 0 leaves no"),
        ({"limit": -3}, "the limit -3 leaves no"),
        ({"limit": 2.5}, "the limit 2.5 leaves no"),
        ({"num_fewshot": -1}, "-1 few-shot examples"),
        ({"paths": ["nowhere"]}, "nowhere is no folder"),
    ],
)
def test_settings_that_make_no_sense(tmp_path, settings, says):
    settings["paths"] = [tmp_path / path for path in settings.get("paths", [])]
    with pytest.raises(DivergentTokensError, match=says):
        read_tasks(["choices"], **settings)
    with pytest.raises(DivergentTokensError, match="no task is named"):
        read_tasks([])


def test_a_template_or_an_end_that_is_missing_is_said(tmp_path):
    lm_tasks.multiple_choice(tmp_path)
    with pytest.raises(DivergentTokensError, match="no chat template"):
        read_tasks(["choices"], paths=[tmp_path], chat=True)(runs.model())
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.eos_token = None
    endless = Model(runs.model().network, tokenizer, "m", "f")
    with pytest.raises(DivergentTokensError, match="no end-of-sequence token"):
        read_tasks(["choices"], paths=[tmp_path])(endless)


@pytest.mark.demo
def test_the_example_on_smollm2():
    base = load_model("demo:smollm2")
    asked = read_tasks(["everyday"], paths=[lm_tasks.EXAMPLE])
    found = compare(
        base,
        scheme_candidates(base, "int8", "int4:g64"),
        runs.prompts(2),
        new_tokens=2,
        tasks=asked,
    )
    acc = found.tasks.base[0]
    assert 0.6 < acc.value < 0.8  # 0.7 in float32; chance is 0.25
    int8, int4 = (candidate.tasks[0] for candidate in found.candidates)
    assert int8.flips.share.value <= 0.05
    assert int4.answers.value < acc.value
    assert int4.flips.to_wrong > int4.flips.to_right
