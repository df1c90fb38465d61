"""The model card: what the hub reads, and a table that claims no more than was measured."""

import dataclasses

import pytest

from divergent_tokens.compress.model_card import measured_table, model_card
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.errors import RecordError

ESTIMATE = {"value": 0.0123456, "low": 0.01, "high": 0.02, "level": 0.95}


def plan(components=None, size_bytes=50, base_size_bytes=100):
    components = components or {"a": "int8", "b": "int4:g64", "c": "int8"}
    return PlanFile({"reference": "elsewhere"}, components, size_bytes, base_size_bytes)


def measured(*steps):
    return measured_table(dataclasses.replace(plan(), trail=steps))


def card(file=None, base="org/model", packed=("pack-quantized",), measured=()):
    file = file or plan()
    return model_card(file, base=base, packed=packed, size_bytes=2_500_000, measured=measured)


def step(overlap=0, **metrics):
    prompts = {"n_prompts": 32, "new_tokens": 64}
    return {
        "step": "measured",
        "components_digest": plan().digest,
        "dtype": "bfloat16",
        "prompts": prompts,
        "overlap": overlap,
        "metrics": metrics,
    }


def test_the_front_matter_of_a_version_of_a_hub_model():
    lines = card().splitlines()
    end = lines.index("---", 1)
    assert lines[0] == "---"
    front = lines[1:end]
    assert {"base_model: org/model", "base_model_relation: quantized"} <= set(front)
    assert front[-1] == "- compressed-tensors"


@pytest.mark.parametrize("base", ["demo:smollm2", "{folder}"])
def test_what_is_no_hub_id_is_not_named_to_the_hub(base, tmp_path):
    text = card(base=base.format(folder=tmp_path))
    assert "base_model" not in text
    assert str(tmp_path.parent) not in text


def test_what_was_done():
    text = card()
    assert "`org/model` with 3 compressed weight matrices" in text
    assert "50.0 % of the bytes" in text
    assert "2.5 MB of weights in all." in text
    assert "| `int8` | 2 |\n| `int4:g64` | 1 |" in text
    assert "It loads with transformers and compressed-tensors:" in text


def test_ordinary_weights_promise_no_size():
    text = card(packed=())
    assert "stored as ordinary ones: the harm of the plan without its size." in text
    assert "compressed-tensors" not in text


def test_a_plan_of_no_bytes_has_no_share():
    assert "%" not in card(plan(size_bytes=0, base_size_bytes=0))


def test_a_scheme_cannot_leave_its_cell():
    assert "| `from:a\\|b 'c'` | 1 |" in card(plan({"a": "from:a|b\n`c`"}))


def test_the_last_measurement():
    lines = measured(step(kl=ESTIMATE | {"value": 9.0}), step(kl=ESTIMATE, sdt=ESTIMATE))
    assert "on 32 prompts that chose nothing, over at most 64 new tokens" in lines[0]
    assert lines[2] == "| metric | value | 95 % interval |"
    assert lines[4] == "| KL, nats per token | 0.0123 | 0.01 to 0.02 |"
    assert lines[5] == "| SDT, share of divergent tokens | 1.23% | 1.00% to 2.00% |"
    assert len(lines) == 6


def test_its_level_and_bounds_are_those_that_were_measured():
    lines = measured(step(fdt={"value": 64.0, "low": 50.04, "high": None, "level": 0.9}))
    assert lines[2] == "| metric | value | 90 % interval |"
    assert lines[4] == "| FDT, tokens until the first divergence | 64.0 | 50.0 to ? |"


def test_prompts_that_chose_are_not_called_held_out():
    assert "on 32 prompts of which 3 had a say" in measured(step(3, kl=ESTIMATE))[0]


def test_a_measurement_is_of_the_plan_that_it_names():
    known = step(kl=ESTIMATE)
    assert measured(known)[0].startswith("Against the base in bfloat16, on 32 prompts")
    changed = plan({"a": "int8"})
    assert changed.digest != plan().digest
    (line,) = measured_table(dataclasses.replace(changed, trail=(known,)))
    assert "changed after it was measured" in line


def test_nothing_measured_is_said():
    assert measured({"step": "search"}) == ["It was not measured on held-out prompts."]


@pytest.mark.parametrize(
    "wrong", [{"step": "measured"}, step(kl=3.0), step(kl={"value": "much"}), step(kl={"value": 1})]
)
def test_another_step_than_ours_is_refused(wrong):
    with pytest.raises(RecordError, match="measure the plan again"):
        measured(wrong)
