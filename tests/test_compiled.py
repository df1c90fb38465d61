"""Compiled and as written: the same numbers, and no trace of it afterwards."""

import warnings

import numpy as np
import pytest
import torch

import runs
from divergent_tokens import compiled as module
from divergent_tokens.compiled import (
    as_written,
    compiled_layers,
    compiled_norms,
    compiler_works,
    compiling_pays,
)
from divergent_tokens.compress.components import find_components
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import RecordError
from divergent_tokens.layers import decoder_layers, operations_a_token
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.probe import probe
from divergent_tokens.recover import Recovery, Training
from divergent_tokens.sweep import sweep

CPU = torch.device("cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the compiler's own
    WORKS = compiler_works(CPU)
pytestmark = [
    pytest.mark.skipif(not WORKS, reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the compiler's own
]
SCHEMES = tuple(parse_scheme(text) for text in ("int8", "int4"))


def rows(place, scheme, on):
    """The numbers of some components' rows, and whether layers ran compiled."""
    base = runs.model()
    found = sweep(
        base,
        find_components(base.network)[:8],
        [parse_scheme(scheme)],
        runs.prompts(),
        place / f"{scheme} {on}.db",
        method="measure",
        new_tokens=5,
        compiled=on,
    )
    table = [[r.kl, r.fdt, r.sdt, r.dppl, r.acceptance] for r in found.rows]
    return np.array(table), found.run["compiled"]


def test_a_sweep_of_compiled_layers_has_the_same_rows(tmp_path):
    plain, _ = rows(tmp_path, "int6", False)
    fast, ran_compiled = rows(tmp_path, "int6", True)
    assert ran_compiled
    assert (plain[:, 0] > 0).all()
    np.testing.assert_allclose(fast, plain, rtol=1e-3, atol=1e-9)
    assert not np.array_equal(fast, plain), "these kernels are the same"


def test_inputs_are_quantized_though_layers_may_be_compiled(tmp_path):
    # A hook inside a layer that is compiled already would not be called.
    rows(tmp_path, "int6", True)
    plain, _ = rows(tmp_path, "w8a8", False)
    fast, ran_compiled = rows(tmp_path, "w8a8", True)
    assert not ran_compiled
    np.testing.assert_array_equal(fast, plain)


def test_a_sweep_goes_on_as_it_began(tmp_path):
    base = runs.model()
    components = find_components(base.network)[:2]

    def run(on, only):
        return sweep(
            base,
            components,
            SCHEMES[:1],
            runs.prompts(),
            tmp_path / "sweep.db",
            method="measure",
            only=only,
            new_tokens=5,
            compiled=on,
        )

    assert run(True, []).run["compiled"]
    assert run(False, None).run["compiled"]
    whole, _ = rows(tmp_path, "int8", True)
    found = [row.kl for row in run(None, None).rows]
    np.testing.assert_array_equal(found, whole[:2, 0])


def test_rows_of_other_kernels_do_not_join_a_file(tmp_path, monkeypatch):
    rows(tmp_path, "int6", True)
    (tmp_path / "int6 True.db").rename(tmp_path / "w8a8 None.db")
    with pytest.raises(RecordError, match="compiled layers, and schemes that quantize inputs"):
        rows(tmp_path, "w8a8", None)
    (tmp_path / "w8a8 None.db").rename(tmp_path / "int8 None.db")
    monkeypatch.setattr("divergent_tokens.sweep.compiler_works", lambda _device: False)
    with pytest.raises(RecordError, match=r"compiled layers, and nothing can here.*--no-compile"):
        rows(tmp_path, "int8", None)


def test_whether_it_works_does_not_hang_on_gradients():
    compiler_works.cache_clear()
    with torch.no_grad():
        assert compiler_works(CPU)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2"])
def test_a_compiled_probe_has_the_same_draws(architecture):
    base = runs.model(architecture)
    components = find_components(base.network)
    completions = complete(base, runs.prompts(), new_tokens=5)
    plain = probe(base, components, SCHEMES, completions, n_draws=2, compiled=False)
    classes = [type(module) for module in base.network.modules()]
    fast = probe(base, components, SCHEMES, completions, n_draws=2, compiled=True)
    assert [type(module) for module in base.network.modules()] == classes
    largest = np.abs(plain.draws).max()
    np.testing.assert_allclose(fast.draws, plain.draws, rtol=1e-3, atol=1e-4 * largest)
    np.testing.assert_allclose(fast.weight_errors, plain.weight_errors, rtol=1e-5)
    assert not np.array_equal(fast.draws, plain.draws), "these kernels are the same"


@pytest.mark.parametrize("context", [compiled_layers, compiled_norms])
def test_nothing_is_left_behind(context):
    network = runs.model().network

    def changed():
        return [module for module in network.modules() if "forward" in vars(module)]

    with context(network, on=True):
        assert changed()
    assert not changed()
    with pytest.raises(KeyboardInterrupt), context(network, on=True):
        raise KeyboardInterrupt
    assert not changed()
    with context(network, on=False):
        assert not changed()


def test_hooks_are_called_where_the_network_runs_as_written():
    network = runs.model().network
    ids = torch.arange(4)[None]
    called = []
    inner = decoder_layers(network)[1][0].mlp
    with torch.no_grad(), compiled_layers(network, on=True):
        network(ids)
        hook = inner.register_forward_hook(lambda *_: called.append(1))
        with as_written(network):
            network(ids)
        hook.remove()
    assert called == [1]


def test_where_the_compiler_fails_it_is_said_once_and_nothing_is_compiled(monkeypatch, caplog):
    def fail(_function):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(module, "compiled", fail)
    compiler_works.cache_clear()
    try:
        assert not compiler_works(CPU)
        assert not compiler_works(CPU)
    finally:
        compiler_works.cache_clear()
    (said,) = caplog.messages
    assert said == "torch.compile does not work here, so nothing is compiled: no compiler here"


def test_it_pays_on_a_gpu_alone():
    assert not compiling_pays(runs.model().network, 1e30)


def test_operations_count_the_experts_that_a_token_passes():
    for architecture in ("llama", "qwen3-moe"):
        network = runs.model(architecture).network
        used = getattr(network.config, "num_experts_per_tok", 0)
        n = sum(
            c.n_parameters for c in find_components(network) if c.expert is None or c.expert < used
        )
        routers = sum(p.numel() for name, p in network.named_parameters() if "gate.weight" in name)
        assert operations_a_token(network) == 2 * (n + (routers if used else 0))


def test_it_can_be_asked_for_where_nothing_can_be_compiled(tmp_path, monkeypatch):
    monkeypatch.setattr("divergent_tokens.sweep.compiler_works", lambda _device: False)
    monkeypatch.setattr("divergent_tokens.probe.compiler_works", lambda _device: False)
    _, ran_compiled = rows(tmp_path, "int6", True)
    assert not ran_compiled
    base = runs.model()
    completions = complete(base, runs.prompts(), new_tokens=5)
    components = find_components(base.network)
    plain, asked = (
        probe(base, components, SCHEMES, completions, compiled=on).draws for on in (False, True)
    )
    np.testing.assert_array_equal(asked, plain)


@pytest.mark.parametrize(
    ("loss", "checkpointing"), [("distill", False), ("both", False), ("ce", False), ("both", True)]
)
def test_compiled_steps_are_the_steps(loss, checkpointing):
    base = runs.changed(runs.model(), lambda n: n)
    sequences = Sequences(np.random.default_rng(1).integers(4, 200, (12, 16)), "random")
    found = []
    for compiles in (False, True):
        network = runs.changed(base, lambda n: n).network
        training = Training(batch_size=4, micro_batch=2, loss=loss, checkpointing=checkpointing)
        recovery = Recovery(
            network, base.network, sequences, training, total_steps=9, seed=0, compiles=compiles
        )
        assert recovery.compiles == compiles
        with torch.no_grad():
            decoder_layers(network)[1][0].mlp.up_proj.weight.mul_(0.5)
        losses = [recovery.run(1, {}), recovery.run(1, {})]
        weights = torch.cat([p.detach().flatten() for p in network.parameters()])
        found.append((losses, weights))
        assert not any("forward" in vars(m) for n in (network, base.network) for m in n.modules())
    (plain, own), (fast, other) = found
    assert fast == pytest.approx(plain, rel=1e-4)
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    assert not torch.equal(own, other), "nothing was compiled"
