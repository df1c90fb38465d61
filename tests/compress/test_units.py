"""Units tile their components, and heads are where attention has them."""

import pytest
import torch

import runs
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.units import find_units
from divergent_tokens.errors import SchemeError


@pytest.mark.parametrize("granularity", ["component", "expert", "head", "rows"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen3-moe"])
def test_every_weight_is_in_one_unit(architecture, granularity, monkeypatch):
    monkeypatch.setattr("divergent_tokens.compress.units.BLOCK_ROWS", 12)
    model = runs.model(architecture)
    components = find_components(model.network)
    seen = [torch.zeros(c.shape, dtype=torch.int) for c in components]
    units = find_units(model.network, components, granularity)
    for unit in units:
        assert unit.component is components[unit.owner]
        part = unit.of(seen[unit.owner])
        assert part.numel() == unit.n_parameters
        part += 1
    assert all((counts == 1).all() for counts in seen)
    if granularity == "rows":
        assert max(unit.rows[1] - unit.rows[0] for unit in units) == 12


def test_a_head_is_rows_of_q_and_columns_of_o():
    model = runs.model()
    config = model.network.config
    components = find_components(model.network)
    units = find_units(model.network, components, "head")
    by_kind = {}
    for unit in units:
        if unit.component.layer == 0:
            by_kind.setdefault(unit.component.kind, []).append(unit)
    assert len(by_kind["q"]) == len(by_kind["o"]) == config.num_attention_heads
    assert len(by_kind["k"]) == len(by_kind["v"]) == config.num_key_value_heads
    assert len(by_kind["up"]) == 1
    size = config.head_dim
    assert by_kind["q"][1].rows == by_kind["o"][1].columns == (size, 2 * size)


def test_no_heads_is_said():
    model = runs.model()
    components = find_components(model.network, include=["*mlp*"])
    with pytest.raises(SchemeError, match=r"none of the \d+ components is q, k, v or o"):
        find_units(model.network, components, "head")
