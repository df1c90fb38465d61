"""comparison.json as it is written, against the JSON Schema that comes with the package."""

import contextlib
import copy
import dataclasses
import json
import math
from importlib import resources

import numpy as np
import pytest
from jsonschema import Draft202012Validator, validators

import lm_tasks
import runs
import tiny
from divergent_tokens.measure.comparison import SCHEMA, compare
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.engine import write_completions
from divergent_tokens.tasks import read_tasks

FILE = resources.files("divergent_tokens") / "data" / "schemas" / "comparison-1.json"
SCHEMA_JSON = json.loads(FILE.read_text(encoding="utf-8"))


def is_number(_checker, value):
    """JSON has no NaN and no infinity, though Python's parser lets them in."""
    return type(value) in (int, float) and math.isfinite(value)


LATER = {"tasks"}
"""What files of earlier versions lack."""

Strict = validators.extend(
    Draft202012Validator,
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine("number", is_number),
)
VALIDATOR = Strict(SCHEMA_JSON)


def problems(record):
    return [f"{e.json_path}: {e.message[:200]}" for e in VALIDATOR.iter_errors(record)]


def lend(*models):
    return {model.reference: contextlib.nullcontext(model) for model in models}


def scores_file(path, completions, *, logprobs):
    """What an engine says that differs in one token; with log-probabilities or without."""
    write_completions(path, completions)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows:
        row["argmax_ids"] = list(row["completion_ids"])
        if logprobs:
            row["logprobs"] = [-0.5] * len(row["completion_ids"])
            row["top_logprobs"] = [{str(i): -0.5} for i in row["argmax_ids"]]
    rows[0]["argmax_ids"][2] = (rows[0]["argmax_ids"][2] + 1) % tiny.VOCABULARY
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """Two models, two engines, a text, examples, domains for some of the prompts."""
    base, folder = runs.model(), tmp_path_factory.mktemp("schema")
    plain = runs.prompts(lengths=[8, 6] * 4)
    tagged = [
        dataclasses.replace(p, domain="abc"[i % 3], language="en") if i else p
        for i, p in enumerate(plain.prompts)
    ]
    prompts = dataclasses.replace(plain, prompts=tuple(tagged))
    completions = complete(base, prompts, new_tokens=12)
    files = {
        "ids": scores_file(folder / "ids.jsonl", completions, logprobs=False),
        "logprobs": scores_file(folder / "logprobs.jsonl", completions, logprobs=True),
    }
    found = compare(
        base,
        lend(base, runs.noisy(base, 0.2)),
        prompts,
        scores=files,
        new_tokens=12,
        n_examples=2,
        text=" ".join(tiny.SENTENCES * 20),
        tasks=read_tasks(
            [str(lm_tasks.multiple_choice(folder)), str(lm_tasks.loglikelihood(folder))]
        ),
        command=["dtm", "compare"],
    )
    return json.loads(json.dumps(found.to_json(), allow_nan=False))


def test_the_schema_is_one_and_describes_every_field():
    Draft202012Validator.check_schema(SCHEMA_JSON)
    assert SCHEMA_JSON["properties"]["schema"]["const"] == SCHEMA
    objects = [SCHEMA_JSON, *SCHEMA_JSON["$defs"].values()]
    objects += [SCHEMA_JSON["properties"][name] for name in ("base", "prompts")]
    for each in objects:
        if each.get("type") == "object":
            assert each["additionalProperties"] is False
            assert each["required"] == [name for name in each["properties"] if name not in LATER]
            for name, field in each["properties"].items():
                assert field["description"].endswith("."), name


def test_a_record_with_everything_in_it(record):
    assert problems(record) == []
    names = [candidate["name"] for candidate in record["candidates"]]
    assert names == ["llama", "noise 0.2 1", "ids", "logprobs"]
    same, noisy, ids, logprobs = (candidate["metrics"] for candidate in record["candidates"])
    assert same["near_ties"] is None
    assert same["median_fdt"]["value"] is None
    assert noisy["ppl"]["conventional"]["value"] > 1
    assert set(noisy["by_domain"]) == {"a", "b", "c"}
    assert ids["kl"] is ids["dppl"] is ids["acceptance"] is ids["ppl"] is None
    assert logprobs["dppl"]["value"] == pytest.approx(math.exp(0.5))
    assert logprobs["kl"] is None
    assert record["candidates"][0]["examples"] == []
    assert len(record["candidates"][1]["examples"]) == 2
    assert len(record["pairs"]) == 6
    asked = record["tasks"]
    assert [(t["task"], t["metric"]) for t in asked["base"]] == [
        ("choices", "acc"),
        ("choices", "acc_norm"),
        ("last_word", "perplexity"),
        ("last_word", "acc"),
    ]
    tasks = [candidate["tasks"] for candidate in record["candidates"]]
    assert tasks[2:] == [None, None]  # no engine's scores can be asked
    assert [task["flips"] is None for task in tasks[0]] == [False, False, True, False]
    assert tasks[0][0]["flips"]["share"]["value"] == 0
    assert tasks[0][3]["flips"]["changed"] is None


def test_the_smallest_record():
    """One prompt of one token that ends at once; every interval is unknown."""
    base = runs.model()
    one = runs.prompts(1, length=1)
    ends = complete(base, one, new_tokens=1).ids[0].tolist()
    short = dataclasses.replace(runs.with_ends(base, ends), fingerprint="0" * 64)
    found = compare(short, lend(base), one, new_tokens=5).to_json()
    assert problems(json.loads(json.dumps(found, allow_nan=False))) == []
    turns = dataclasses.replace(one, prefix=None)
    assert problems(compare(base, lend(base), turns, new_tokens=2).to_json()) == []


def test_other_dtypes():
    half = runs.changed(runs.model(), lambda network: network.bfloat16(), "half")
    half = dataclasses.replace(half, fingerprint="0" * 64)
    found = compare(half, lend(half), runs.prompts(3), new_tokens=4).to_json()
    assert problems(found) == []


def leaves(value, path=()):
    """Paths of every object's fields, one for each kind of place."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield (*path, key)
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list):
        for inner in value[:1]:
            yield from leaves(inner, (*path, 0))


def changed(record, path, change):
    copied = copy.deepcopy(record)
    place = copied
    for key in path[:-1]:
        place = place[key]
    change(place, path[-1])
    return copied


def small(record):
    """The same with what repeats taken out, so that thousands of changes can be tried."""
    part = copy.deepcopy(record)
    part["candidates"] = [part["candidates"][1]]
    for each in (part["noise_floor"], part["rounding"], part["candidates"][0]["metrics"]):
        each["by_domain"] = dict(list(each["by_domain"].items())[:1])
        each["by_language"] = {}
        each["survival"] = each["survival"][:2]
    own = part["candidates"][0]
    own["rows"] = [row for row in own["rows"] if not row["censored"]][:1]
    part["prompts"]["margins"] = [row[:2] for row in part["prompts"]["margins"][:1]]
    part["prompts"]["texts"] = part["prompts"]["texts"][:1]
    part["pairs"] = part["pairs"][:1]
    del part["rounding"]["by_domain"]["a"]
    return part


FREE = {"by_domain", "by_language"}
"""Objects whose keys are names of the user's; a group may be there or not."""


def test_no_field_may_be_missing_and_none_be_new(record):
    part = small(record)
    assert problems(part) == []
    for path in leaves(part):
        if len(path) > 1 and path[-2] in FREE:
            continue
        if path[-1] in LATER:
            assert not problems(changed(part, path, lambda place, key: place.pop(key))), path
            continue
        assert problems(changed(part, path, lambda place, key: place.pop(key))), path
    for path in [(), ("base",), ("prompts",), ("noise_floor",), ("noise_floor", "fdt")]:
        extra = changed(part, (*path, "extra"), lambda place, key: place.update({key: 1}))
        assert problems(extra), path


@pytest.mark.parametrize("bad", [math.nan, "text", True])
def test_no_number_may_be_anything_else(bad, record):
    part = small(record)
    tried = 0
    for path in leaves(part):
        place = part
        for key in path:
            place = place[key]
        if type(place) in (int, float):
            tried += 1
            wrong = changed(part, path, lambda place, key: place.update({key: bad}))
            assert problems(wrong), path
    assert tried > 100


@pytest.mark.parametrize(
    "path",
    [
        ("noise_floor", "fdt", "value"),
        ("noise_floor", "fdt"),
        ("noise_floor", "sdt"),
        ("noise_floor", "identical"),
        ("candidates", 0, "rows", 0, "fdt"),
        ("candidates", 0, "rows", 0, "margin"),
        ("candidates", 0, "rows", 0, "base_token"),
        ("candidates", 0, "rows", 0, "candidate_token_p"),
        ("pairs", 0, "p_value"),
        ("base", "fingerprint"),
        ("prompts", "digest"),
        ("seed",),
    ],
)
def test_null_only_where_something_may_not_be_known(path, record):
    part = small(record)
    wrong = changed(part, path, lambda place, key: place.__setitem__(key, None))
    assert problems(wrong)


def test_values_out_of_range_and_contradictions(record):
    part = small(record)
    wrong = {
        ("schema",): "divergent-tokens/comparison/2",
        ("noise_floor", "sdt_by_quarter"): [0.0] * 3,
        ("noise_floor", "repeated"): 1.5,
        ("noise_floor", "n_tokens"): 0,
        ("noise_floor", "survival"): [[0.5, 1.0, 1.0, 1.0]],
        ("noise_floor", "survival", 0): [0, 1.0, 1.0],
        ("candidates", 0, "rows", 0, "censored"): True,
        ("candidates", 0, "rows", 0, "n_divergent"): 0,
        ("candidates", 0, "rows", 0, "nats"): -1.0,
        ("candidates",): [],
        ("base", "fingerprint"): "abc",
        ("noise_floor", "by_domain", "a", "by_domain"): part["noise_floor"]["by_domain"],
    }
    for path, value in wrong.items():
        bad = changed(part, path, lambda place, key, value=value: place.__setitem__(key, value))
        assert problems(bad), path


def test_what_stands_beside_each_other_fits(record):
    """What no schema can say."""
    n = record["prompts"]["n_prompts"]
    lengths = [len(row) for row in record["prompts"]["margins"]]
    assert n == len(record["prompts"]["texts"]) == len(lengths)
    names = {candidate["name"] for candidate in record["candidates"]}
    for candidate in record["candidates"]:
        rows, metrics = candidate["rows"], candidate["metrics"]
        assert [row["prompt"] for row in rows] == list(range(n))
        assert [row["n_tokens"] for row in rows] == lengths
        assert metrics["fdt"]["value"] == pytest.approx(np.mean([row["fdt"] for row in rows]))
        for row in rows:
            if not row["censored"]:
                margin = record["prompts"]["margins"][row["prompt"]][row["fdt"]]
                assert row["margin"] == pytest.approx(margin, abs=1e-4)
    assert {pair[side] for pair in record["pairs"] for side in "ab"} == names
