import dataclasses

import numpy as np
import pytest
import torch

import runs
import tiny
from divergent_tokens.errors import PromptError
from divergent_tokens.measure import ways
from divergent_tokens.measure.completions import complete

CPU = RuntimeError("DefaultCPUAllocator: can't allocate memory")


def rows(completions):
    return [row[:n].tolist() for row, n in zip(completions.ids, completions.lengths, strict=True)]


@pytest.fixture(scope="module")
def prompts():
    """Of several lengths, mixed."""
    return runs.prompts(lengths=[8, 5, 8, 11, 5, 8])


@pytest.fixture(scope="module")
def ending(prompts):
    """A model of which some completions end early, each at a place of its own."""
    free = rows(complete(runs.model(), prompts, new_tokens=12, ignore_eos=True))
    return runs.with_ends(runs.model(), sorted({free[0][2], free[1][5], free[3][0]}))


def test_a_completion_is_the_obvious_loop_until_an_end(ending, prompts):
    found = complete(ending, prompts, new_tokens=12)
    expected = [runs.greedy(ending.network, p.ids, 12, ending.eos_ids) for p in prompts.prompts]
    assert rows(found) == expected
    assert len(set(map(len, expected))) > 2
    for row in expected:
        assert len(row) == 12 or row[-1] in ending.eos_ids
        assert not set(row[:-1]) & set(ending.eos_ids)
    assert found.ids.shape == found.mask.shape == (6, max(map(len, expected)))
    assert (found.ids[~found.mask] == 0).all()
    assert found.new_tokens == 12


def test_an_end_is_passed_over_if_asked(ending, prompts):
    found = complete(ending, prompts, new_tokens=12, ignore_eos=True)
    assert found.lengths.tolist() == [12] * 6
    assert rows(found) == [runs.greedy(ending.network, p.ids, 12, ()) for p in prompts.prompts]


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_batch_size_and_order_change_nothing(architecture, prompts):
    model = runs.model(architecture)
    expected = rows(complete(model, prompts, new_tokens=10))
    assert rows(complete(model, prompts, new_tokens=10, batch_size=1)) == expected
    backwards = dataclasses.replace(prompts, prompts=prompts.prompts[::-1])
    assert rows(complete(model, backwards, new_tokens=10, batch_size=2)) == expected[::-1]


def test_sequences_and_subsets(ending, prompts):
    found = complete(ending, prompts, new_tokens=12)
    sequences = found.sequences()
    assert sequences == [
        [*p.ids, *row] for p, row in zip(prompts.prompts, rows(found), strict=True)
    ]
    part = found.subset((3, 1))
    assert part.sequences() == [sequences[3], sequences[1]]
    assert part.prompts.prompts == (prompts.prompts[3], prompts.prompts[1])


@pytest.fixture
def forbidden(monkeypatch):
    """After this is called, generating is an error."""

    def never(*_args, **_kwargs):
        raise AssertionError("something was generated")

    return lambda: monkeypatch.setitem(ways.WAYS, "dynamic", never)


def test_the_second_time_nothing_is_generated(tmp_path, ending, prompts, forbidden):
    first = complete(ending, prompts, new_tokens=12, cache=tmp_path)
    forbidden()
    again = complete(ending, prompts, new_tokens=12, cache=tmp_path)
    np.testing.assert_array_equal(again.ids, first.ids)
    np.testing.assert_array_equal(again.mask, first.mask)


def test_whatever_changes_the_result_has_another_key(tmp_path, ending, prompts, forbidden):
    complete(ending, prompts, new_tokens=12, cache=tmp_path)
    forbidden()
    others = [
        (ending, prompts, {"new_tokens": 11}),
        (ending, prompts, {"new_tokens": 12, "ignore_eos": True}),
        (runs.model(), prompts, {"new_tokens": 12}),
        (runs.with_ends(ending, [77]), prompts, {"new_tokens": 12}),
        (runs.changed(ending, lambda n: n.bfloat16()), prompts, {"new_tokens": 12}),
        (ending, runs.prompts(6), {"new_tokens": 12}),
        (ending, dataclasses.replace(prompts, prompts=prompts.prompts[::-1]), {"new_tokens": 12}),
    ]
    for model, other, options in others:
        with pytest.raises(AssertionError, match="generated"):
            complete(model, other, cache=tmp_path, **options)


@pytest.mark.parametrize("name", ["header.json", "ids.npy", "lengths.npy"])
@pytest.mark.parametrize("content", [b"", b"\x93NUMPY\x01", b"null"])
def test_a_damaged_entry_is_made_again(tmp_path, ending, prompts, name, content, forbidden):
    first = complete(ending, prompts, new_tokens=12, cache=tmp_path)
    (folder,) = tmp_path.iterdir()
    (folder / name).write_bytes(content)
    again = complete(ending, prompts, new_tokens=12, cache=tmp_path)
    np.testing.assert_array_equal(again.ids, first.ids)
    forbidden()
    complete(ending, prompts, new_tokens=12, cache=tmp_path)


@pytest.mark.parametrize("error", [CPU, torch.OutOfMemoryError("CUDA out of memory")])
def test_running_out_of_memory_loses_nothing(ending, prompts, error):
    limited = runs.changed(ending, runs.failing_above(2, error))
    found = complete(limited, prompts, new_tokens=12)
    assert rows(found) == rows(complete(ending, prompts, new_tokens=12))


def test_other_errors_pass_through(ending, prompts):
    broken = runs.changed(ending, runs.failing_above(2, RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        complete(broken, prompts, new_tokens=12)


def test_progress_goes_up_to_the_end(ending, prompts):
    seen = []
    complete(
        ending,
        prompts,
        new_tokens=12,
        batch_size=2,
        progress=lambda stage, done, total, unit: seen.append((stage, done, total, unit)),
    )
    done = [call[1] for call in seen]
    assert done == sorted(done)
    assert seen[-1] == ("completions", 72, 72, "tokens")
    assert len(seen) > 12


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_positions_are_counted_before_anything_runs(architecture, forbidden):
    model, prompts = runs.model(architecture), runs.prompts(2, length=10)
    forbidden()
    with pytest.raises(PromptError, match=r"need 257 positions; .* has 256"):
        complete(model, prompts, new_tokens=247)
    with pytest.raises(AssertionError, match="generated"):
        complete(model, prompts, new_tokens=246)
    with pytest.raises(PromptError, match="new_tokens is 0"):
        complete(model, prompts, new_tokens=0)


def test_a_model_without_positions_has_no_limit():
    model = runs.model("mamba2")
    assert complete(model, runs.prompts(1), new_tokens=300).ids.shape == (1, 300)
