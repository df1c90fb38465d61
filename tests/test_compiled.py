"""Compiled and as written: the same numbers, and no trace of it afterwards."""

import numpy as np
import pytest
import torch

import runs
from divergent_tokens import compiled
from divergent_tokens.compiled import compiled_layers, fused, fusing
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.layers import decoder_layers
from divergent_tokens.measure.completions import complete
from divergent_tokens.probe import probe
from divergent_tokens.sweep import sweep

pytestmark = [
    pytest.mark.skipif(not runs.can_compile(), reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own
]
SCHEMES = tuple(parse_scheme(text) for text in ("int8", "int4"))


def test_a_sweep_of_compiled_layers_has_the_same_rows(tmp_path):
    base = runs.model()
    components = find_components(base.network)[:8]

    def rows(on):
        found = sweep(
            base,
            components,
            SCHEMES,
            runs.prompts(),
            tmp_path / f"{on}.db",
            method="measure",
            new_tokens=5,
            compiled=on,
        )
        return np.array([[r.kl, r.fdt, r.sdt, r.dppl, r.acceptance] for r in found.rows])

    plain = rows(False)
    assert (plain[:, 0] > 0).all()
    np.testing.assert_allclose(rows(True), plain, rtol=1e-2, atol=1e-9)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_compiled_probe_has_the_same_draws(architecture):
    base = runs.model(architecture)
    components = find_components(base.network)
    completions = complete(base, runs.prompts(), new_tokens=5)
    plain = probe(base, components, SCHEMES, completions, compiled=False)
    fast = probe(base, components, SCHEMES, completions, compiled=True)
    largest = np.abs(plain.draws).max()
    np.testing.assert_allclose(fast.draws, plain.draws, rtol=1e-3, atol=1e-4 * largest)
    np.testing.assert_allclose(fast.weight_errors, plain.weight_errors, rtol=1e-5)


def test_nothing_is_left_behind():
    network = runs.model().network
    with compiled_layers(network, on=True):
        assert fusing()
        assert all("forward" in vars(layer) for layer in decoder_layers(network)[1])
    assert not fusing()
    assert not any("forward" in vars(module) for module in network.modules())


def test_where_the_compiler_fails_the_function_runs_as_it_is(monkeypatch, caplog):
    from torch._inductor.exc import InductorError

    def fail(_function, **_options):
        def run(*_args):
            raise InductorError(RuntimeError("no compiler here"), None)

        return run

    def twice(x):
        return 2 * x

    monkeypatch.setattr(torch, "compile", fail)
    with compiled._fusing(True):
        assert fused(twice)(21) == 42
        assert fused(twice)(4) == 8
    (said,) = caplog.messages
    assert "twice runs uncompiled: " in said
    assert "no compiler here" in said
