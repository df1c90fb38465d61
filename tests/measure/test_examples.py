import dataclasses

import numpy as np
import pytest

import runs
import tiny
from divergent_tokens.measure import examples as module
from divergent_tokens.measure import metrics
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.examples import write_examples


@pytest.fixture(scope="module")
def setting():
    base = runs.model()
    prompts = runs.prompts(8)
    completions = complete(base, prompts, new_tokens=12)
    candidate = runs.noisy(base, 0.03)
    scores = runs.scored(base, candidate, completions)
    found = metrics.divergence(scores.argmax_ids, completions.ids, completions.mask)
    margins = np.arange(96, dtype=np.float32).reshape(8, 12)
    assert len(set(found.fdt.tolist())) > 3
    return base, candidate, completions, scores.argmax_ids, found, margins


def written(setting, n=3, **changes):
    base, candidate, completions, argmax_ids, found, margins = setting
    candidate = changes.get("candidate", candidate)
    completions = changes.get("completions", completions)
    return write_examples(found, argmax_ids, margins, completions, base, candidate, n=n)


def test_the_earliest_divergences_come_first(setting):
    found, completions = setting[4], setting[2]
    shown = written(setting, n=100)
    assert len(shown) == (~found.censored).sum()
    assert [e.fdt for e in shown] == sorted(found.fdt[~found.censored].tolist())
    assert [e.fdt for e in written(setting, n=2)] == [e.fdt for e in shown[:2]]
    assert written(setting, n=0) == ()
    for example in shown:
        assert example.prompt_text == completions.prompts.prompts[example.prompt].text
        assert example.margin == 12 * example.prompt + example.fdt


def test_both_texts_go_on_from_what_is_shared(setting):
    """The candidate's is what it writes when it runs freely from the prompt."""
    _, candidate, completions, *_ = setting
    free = complete(candidate, completions.prompts, new_tokens=12)
    decode = tiny.tokenizer().decode
    for example in written(setting, n=100):
        i = example.prompt
        assert example.shared_text == decode(completions.ids[i, : example.fdt])
        assert example.shared_text + example.base_text == decode(completions.ids[i])
        assert example.shared_text + example.candidate_text == decode(
            free.ids[i, : free.lengths[i]]
        )


def test_a_candidate_that_cannot_write_shows_its_one_token(setting):
    decode, argmax_ids = tiny.tokenizer().decode, setting[3]
    for example in written(setting, candidate=None):
        assert example.candidate_text == decode([argmax_ids[example.prompt, example.fdt]])


def test_an_end_is_not_written_on_from(setting, monkeypatch):
    base, candidate, completions, argmax_ids, found, margins = setting
    first = int(np.argmin(found.fdt))
    ending = runs.with_ends(base, [int(argmax_ids[first, found.fdt[first]])])
    monkeypatch.setattr(module, "generate", None)
    (shown,) = write_examples(found, argmax_ids, margins, completions, ending, candidate, n=1)
    assert shown.prompt == first
    monkeypatch.undo()
    ignoring = dataclasses.replace(completions, ignore_eos=True)
    (longer,) = write_examples(found, argmax_ids, margins, ignoring, ending, candidate, n=1)
    assert len(longer.candidate_text) > len(shown.candidate_text)
