"""A trial: cutting is running with fewer tokens, and what the record says fits together."""

import contextlib
import dataclasses
import json
import math
from importlib import resources

import numpy as np
import pytest
from jsonschema import Draft202012Validator

import runs
from divergent_tokens.errors import PromptError
from divergent_tokens.measure.comparison import compare
from divergent_tokens.measure.needed import needed_prompts, sample_of
from divergent_tokens.measure.widths import parse_widths
from divergent_tokens.pilot import SCHEMA, beginnings, pilot

FILE = resources.files("divergent_tokens") / "data" / "schemas" / "pilot-1.json"
VALIDATOR = Draft202012Validator(json.loads(FILE.read_text(encoding="utf-8")))
WIDTHS = parse_widths(["fdt=3", "sdt=30%", "kl=20%"], new_tokens=12)


def problems(record):
    return [f"{e.json_path}: {e.message[:200]}" for e in VALIDATOR.iter_errors(record)]


def candidates(base):
    made = (runs.noisy(base, 0.05, 1), runs.noisy(base, 0.15, 2))
    return {model.reference: contextlib.nullcontext(model) for model in made}


@pytest.fixture(scope="module")
def base():
    return runs.model()


@pytest.fixture(scope="module")
def found(base):
    return pilot(
        base,
        candidates(base),
        runs.prompts(10, length=12),
        WIDTHS,
        prefixes=[12, 6],
        new_tokens=[4, 12],
        comparing=["dtm", "compare", "base", "--scheme", "int8"],
        command=["dtm", "pilot"],
    )


@pytest.fixture(scope="module")
def record(found):
    return json.loads(json.dumps(found.to_json(), allow_nan=False))


def test_every_prefix_with_every_number_of_new_tokens(record):
    places = [(cell["prefix"], cell["new_tokens"]) for cell in record["cells"]]
    assert places == [(6, 4), (6, 12), (12, 4), (12, 12)]


@pytest.mark.parametrize("prefix", [6, 12])
@pytest.mark.parametrize("new_tokens", [4, 12])
def test_a_cell_is_a_run_with_that_prefix_and_so_many_new_tokens(base, found, prefix, new_tokens):
    """Nothing was run for fewer new tokens, and a run gives the same numbers."""
    prompts = beginnings(runs.prompts(10, length=12), prefix, base)
    assert {len(prompt.ids) for prompt in prompts.prompts} == {prefix}
    alone = compare(base, candidates(base), prompts, new_tokens=new_tokens)
    (cell,) = (c for c in found.cells if (c.prefix, c.new_tokens) == (prefix, new_tokens))
    for judged, run in zip(cell.candidates, alone.candidates, strict=True):
        assert judged.name == run.name
        assert judged.estimates["fdt"] == run.metrics.fdt
        assert judged.estimates["sdt"] == run.metrics.sdt
        assert judged.estimates["kl"].value == pytest.approx(run.metrics.kl.value, rel=1e-4)
        assert judged.censored == run.metrics.identical
        assert judged.near_ties == pytest.approx(run.metrics.near_ties, nan_ok=True)
        for width in WIDTHS:
            again = needed_prompts(sample_of(width.metric, run.divergence), width)
            assert judged.needed[width.metric].n_prompts == pytest.approx(again.n_prompts, rel=1e-3)
    assert cell.repeated == pytest.approx(alone.noise_floor.repeated)
    assert cell.sequence_length == alone.completions.sequence_lengths.mean()


def test_completions_that_end_early_are_cut_as_they_are(base):
    """Ends of sequence before and after the cut: token by token what fewer new tokens give."""
    ends = runs.with_ends(base, range(40))
    (other,) = [runs.with_ends(runs.noisy(base, 0.2), range(40))]
    prompts = runs.prompts(12)
    lent = {"other": contextlib.nullcontext(other)}
    long, short = (compare(ends, lent, prompts, new_tokens=n) for n in (10, 3))
    assert len(set(long.completions.lengths.tolist())) > 1
    cut, run = long.candidates[0].divergence.beginning(3), short.candidates[0].divergence
    for name in ("fdt", "censored", "n_divergent", "n_tokens", "apart", "mask"):
        np.testing.assert_array_equal(getattr(cut, name), getattr(run, name), err_msg=name)
    np.testing.assert_allclose(cut.kl, run.kl, rtol=1e-3, atol=1e-9)
    assert cut.nats is cut.acceptance is None


def test_the_record_is_of_its_schema(record):
    assert problems(record) == []
    assert record["trial"]["n_prompts"] == 10
    assert [width["metric"] for width in record["widths"]] == ["fdt", "sdt", "kl"]


def test_the_schema_describes_every_field():
    Draft202012Validator.check_schema(VALIDATOR.schema)
    assert VALIDATOR.schema["properties"]["schema"]["const"] == SCHEMA
    objects = [VALIDATOR.schema, *VALIDATOR.schema["$defs"].values()]
    objects += [VALIDATOR.schema["properties"][name] for name in ("base", "trial")]
    for each in objects:
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])
        for name, field in each["properties"].items():
            assert field["description"].endswith("."), name


def test_no_field_may_be_missing_or_new(record):
    for place in (
        record,
        record["base"],
        record["trial"],
        record["widths"][0],
        record["cells"][0],
        record["cells"][0]["candidates"][0],
        record["cells"][0]["candidates"][0]["needed"]["kl"],
        record["cells"][0]["pairs"][0]["contrasts"][0],
        record["cells"][0]["forward_tokens"],
        record["recommended"],
    ):
        for key in list(place):
            value = place.pop(key)
            assert problems(record), key
            place[key] = value
        place["new"] = 1
        assert problems(record)
        del place["new"]
    assert problems(record) == []


def test_a_cells_number_meets_every_width_of_every_candidate(record):
    for cell in record["cells"]:
        needed = [found["n_prompts"] for c in cell["candidates"] for found in c["needed"].values()]
        assert cell["n_prompts"] >= max(10, *needed)
        assert cell["n_prompts"] <= 1.1 * max(10, *needed)
        n, tokens = cell["n_prompts"], cell["forward_tokens"]
        assert tokens["completions"] == pytest.approx(n * cell["sequence_length"], abs=1)
        passes = 1 + 2 + len(cell["candidates"])  # completing, the base, rounding, each candidate
        assert tokens["all"] == passes * tokens["each_pass"]


def test_the_recommendation_is_the_cheapest_of_the_least_spoiled(record):
    cells = record["cells"]
    least = min(len(cell["spoiled_by"]) for cell in cells)
    cheapest = min(
        (cell for cell in cells if len(cell["spoiled_by"]) == least),
        key=lambda cell: cell["forward_tokens"]["all"],
    )
    chosen = record["recommended"]
    for key in ("prefix", "new_tokens", "n_prompts"):
        assert chosen[key] == cheapest[key]
    assert chosen["command"][:5] == ["dtm", "compare", "base", "--scheme", "int8"]
    options = dict(zip(chosen["command"][5::2], chosen["command"][6::2], strict=True))
    assert options == {
        "--n-prompts": str(chosen["n_prompts"]),
        "--prefix": str(chosen["prefix"]),
        "--new-tokens": str(chosen["new_tokens"]),
    }


def test_what_spoils_a_cell(base):
    """A candidate that is the base itself never parts; without a width of FDT that is no harm."""
    lent = {"same": contextlib.nullcontext(base)}
    for widths, spoilt in ((["fdt=3", "sdt=0.5"], True), (["sdt=0.5"], False)):
        found = pilot(
            base, lent, runs.prompts(8), parse_widths(widths, new_tokens=6), new_tokens=[6]
        )
        (cell,) = found.cells
        assert ("censored" in cell.spoiled_by) == spoilt
        assert cell.candidates[0].censored == 1
        assert cell.candidates[0].near_ties is None
        assert problems(json.loads(json.dumps(found.to_json(), allow_nan=False))) == []


def test_where_no_number_is_known_nothing_is_recommended(base):
    lent = {"same": contextlib.nullcontext(base)}
    found = pilot(base, lent, runs.prompts(8), parse_widths((), new_tokens=6), new_tokens=[6])
    record = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert record["recommended"] is record["cells"][0]["n_prompts"] is None
    assert record["cells"][0]["forward_tokens"] is None
    assert problems(record) == []


def test_whole_chat_turns_have_no_prefix(base):
    turns = dataclasses.replace(runs.prompts(lengths=[8, 6] * 5), prefix=None)
    found = pilot(base, candidates(base), turns, WIDTHS, new_tokens=[4, 6]).to_json()
    assert [cell["prefix"] for cell in found["cells"]] == [None, None]
    assert 7 + 1 < found["cells"][0]["sequence_length"] <= 7 + 4
    assert "--prefix" not in found["recommended"]["command"]
    assert problems(json.loads(json.dumps(found))) == []


def test_pairs_are_of_the_differences_on_the_same_prompts(found):
    for cell in found.cells:
        (pair,) = cell.pairs
        a, b = cell.candidates
        assert (pair.a, pair.b) == (a.name, b.name)
        for contrast in pair.contrasts:
            expected = a.estimates[contrast.metric].value - b.estimates[contrast.metric].value
            assert contrast.difference.value == pytest.approx(expected)


def test_a_trial_too_small_is_refused_before_anything_runs(base):
    class Never:
        def __enter__(self):
            raise AssertionError("entered")

        def __exit__(self, *_):
            return None

    with pytest.raises(PromptError, match=r"the trial has 7 prompts; .* 8 or more.* --n-prompts"):
        pilot(base, {"never": Never()}, runs.prompts(7), WIDTHS, new_tokens=[4])

    few = dataclasses.replace(runs.prompts(3), wanted=32, left_out=5)
    with pytest.raises(PromptError, match=r"all that test has \(5 documents are too short"):
        pilot(base, {"never": Never()}, few, WIDTHS, new_tokens=[4])
    with pytest.raises(PromptError, match="positions"):
        pilot(base, {"never": Never()}, runs.prompts(8), WIDTHS, new_tokens=[4, 1000])


def test_an_estimate_of_the_trial_is_the_one_that_is_scaled(found):
    cell = found.cells[0]
    for judged in cell.candidates:
        for width in WIDTHS:
            estimate = judged.estimates[width.metric]
            ratio = (estimate.high - estimate.low) / width.of(estimate.value)
            needed = judged.needed[width.metric].n_prompts
            assert (needed <= 10) == (ratio <= 1)
            # With about the square root.
            assert 0.3 < math.sqrt(needed / 10) / ratio < 1.5
