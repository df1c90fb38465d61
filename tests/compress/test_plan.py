"""Plans: names, digests, sizes, and what does not fit."""

import pytest

import tiny
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.plan import Plan, check_plan, size_bytes, uniform_plan
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import SchemeError

INT8, INT4 = parse_scheme("int8"), parse_scheme("int4:g16")


def test_uniform_plan_and_its_size() -> None:
    components = find_components(tiny.network("llama"))
    plan = uniform_plan(components, INT8)
    assert plan.name == "int8"
    assert list(plan.schemes) == [c.name for c in components]
    # 14 matrices in float32: one byte a weight and four a row.
    n_rows = 2 * (32 + 16 + 16 + 32 + 48 + 48 + 32)
    n_weights = 2 * 32 * (32 + 16 + 16 + 32 + 3 * 48)
    assert size_bytes(plan, components) == n_weights + 4 * n_rows
    assert size_bytes(Plan({}), components) == 2 * n_weights
    one = uniform_plan(components[:1], INT8)
    assert size_bytes(one, components) == 2 * n_weights - 2 * 1024 + 1024 + 4 * 32


def test_names_and_digests() -> None:
    mixed = Plan({"b": INT4, "a": INT8, "c": INT8})
    assert mixed.name == "2 x int8, 1 x int4:g16"
    assert Plan({}).name == "unchanged"
    assert mixed.digest == Plan({"a": INT8, "b": INT4, "c": INT8}).digest
    others = [Plan({}), Plan({"a": INT8, "b": INT4}), Plan({"a": INT8, "b": INT8, "c": INT8})]
    assert len({mixed.digest, *(plan.digest for plan in others)}) == 4


def test_what_does_not_fit() -> None:
    components = find_components(tiny.network("llama"))
    assert check_plan(uniform_plan(components[3:5], INT8), components) == components[3:5]
    with pytest.raises(SchemeError, match=r"'lm_head' \(1 of 2 names\)"):
        check_plan(Plan({components[0].name: INT8, "lm_head": INT8}), components)
    with pytest.raises(SchemeError, match=r"48 input columns of model\.layers\.0\.mlp\.down_proj"):
        check_plan(uniform_plan(components, parse_scheme("int4:g32")), components)
