"""SparseGPT through llm-compressor: against its own modifier, and kept matrices."""

import importlib.util
import subprocess
import sys

import pytest
import torch

import runs
import tiny
from divergent_tokens.calibrated import ready_schemes
from divergent_tokens.candidates import lent_candidates
from divergent_tokens.compress.calibration import Calibration, second_moments
from divergent_tokens.compress.components import Component, find_components, weight_of
from divergent_tokens.compress.kept import Kept
from divergent_tokens.compress.plan import uniform_plan
from divergent_tokens.compress.prune import n_of_m_mask, rows_mask
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.compress.sparsegpt import prune_by_sparsegpt
from divergent_tokens.errors import SchemeError

needs_llm_compressor = pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)
ROWS = Calibration(tuple(tuple(range(4 + i, 24 + i)) for i in range(12)), "test")


# --- without llm-compressor ---


@pytest.mark.parametrize("text", ["sparsegpt:0.5", "sparsegpt:2:4"])
def test_its_text(text):
    scheme = parse_scheme(text)
    assert str(scheme) == text
    assert (scheme.is_calibrated, scheme.is_ready, scheme.is_packable) == (True, False, False)
    assert parse_scheme(f"{text}+int4:g8").is_packable


def test_texts_that_say_too_much_or_too_little():
    with pytest.raises(SchemeError, match=r"as in 'sparsegpt:0\.5'"):
        parse_scheme("sparsegpt:2")
    with pytest.raises(SchemeError, match="let 'sparsegpt:' stand first"):
        parse_scheme("magnitude:0.5+sparsegpt:0.5")


def test_what_has_no_inputs_of_its_own_is_refused():
    with pytest.raises(SchemeError, match=r"looked up or shared.* take magnitude:0\.5"):
        parse_scheme("sparsegpt:0.5").check(find_components(tiny.network("llama"), include=["*"]))
    with pytest.raises(SchemeError, match="which 5 does not divide"):
        parse_scheme("sparsegpt:2:5").check(find_components(tiny.network("llama")))


def test_matrices_that_were_not_made_are_asked_for():
    component = find_components(tiny.network("llama"))[0]
    with pytest.raises(SchemeError, match=r"weights of .*q_proj under sparsegpt:0\.5 were not"):
        parse_scheme("sparsegpt:0.5").compress(torch.zeros(32, 32), component)


@pytest.mark.skipif(
    importlib.util.find_spec("llmcompressor") is not None, reason="llm-compressor is installed"
)
def test_without_llm_compressor_it_says_what_to_install(tmp_path):
    model = runs.model()
    components = find_components(model.network)
    with pytest.raises(SchemeError, match=r"sparsegpt: .*pip install llmcompressor.*take wanda:"):
        ready_schemes(model, components, [parse_scheme("sparsegpt:0.5")], cache=tmp_path)
    assert list(tmp_path.iterdir()) == []


# --- with it ---


def inputs_and_weight(n_out=24, n_in=160):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, n_in, generator=generator) @ torch.randn(n_in, n_in, generator=generator)
    return x, torch.randn(n_out, n_in, generator=generator)


@needs_llm_compressor
@pytest.mark.parametrize("text", ["sparsegpt:0.5", "sparsegpt:0.7", "sparsegpt:2:4"])
def test_it_is_what_its_own_modifier_makes_of_the_first_layer(text, tmp_path):
    """Whose inputs are the base's whatever is pruned before."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier

    (step,) = parse_scheme(text).steps
    network = tiny.network("llama")
    network.save_pretrained(tmp_path)
    network.config._name_or_path = str(tmp_path)
    name = "model.layers.0.self_attn.q_proj"
    component = next(c for c in find_components(network) if c.name == name)
    ((_, moment),) = second_moments(network, [component], ROWS)
    found = prune_by_sparsegpt(weight_of(network, component), moment, step.extent)
    of_pattern = isinstance(step.extent, tuple)
    modifier = SparseGPTModifier(
        sparsity=0.5 if of_pattern else step.extent,
        mask_structure="2:4" if of_pattern else "0:0",
        targets=[name],
    )
    data = Dataset.from_dict(
        {
            "input_ids": [list(row) for row in ROWS.rows],
            "attention_mask": [[1] * len(row) for row in ROWS.rows],
        }
    )
    oneshot(
        model=network,
        recipe=modifier,
        dataset=data,
        num_calibration_samples=len(ROWS.rows),
        max_seq_length=64,
        tokenizer=tiny.tokenizer(),
        pipeline="basic",
    )
    theirs = weight_of(network, component)
    assert float((theirs == 0).float().mean()) >= 0.5
    assert torch.equal(found == 0, theirs == 0)
    torch.testing.assert_close(found, theirs, rtol=1e-3, atol=1e-5)


@needs_llm_compressor
@pytest.mark.parametrize("share", [0.3, 0.5, 0.75])
def test_of_each_block_of_columns_the_share_goes_and_one_more(share):
    x, weight = inputs_and_weight()
    zeros = prune_by_sparsegpt(weight, x.T @ x, share) == 0
    for block in (zeros[:, :128], zeros[:, 128:]):
        assert int(block.sum()) == int(block.numel() * share) + 1
    assert torch.equal(prune_by_sparsegpt(weight, x.T @ x, 0.0), weight)


@needs_llm_compressor
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (6, 8), (1, 5)])
def test_n_of_m_neighbours_stay(n, m):
    x, weight = inputs_and_weight()
    zeros = prune_by_sparsegpt(weight, x.T @ x, (n, m)) == 0
    assert (zeros.view(-1, m).sum(1) == m - n).all()


@needs_llm_compressor
@pytest.mark.parametrize("extent", [0.5, (2, 4)])
def test_it_harms_the_outputs_less_than_wanda_of_as_many_weights(extent):
    x, weight = inputs_and_weight()
    saliency = weight.abs() * x.norm(dim=0)
    mask = rows_mask(saliency, 0.5) if extent == 0.5 else n_of_m_mask(saliency, *extent)
    found = prune_by_sparsegpt(weight, x.T @ x, extent)
    assert (x @ (found - weight).T).norm() < 0.9 * (x @ (weight * mask - weight).T).norm()


@needs_llm_compressor
def test_what_is_gone_stays_gone_and_counts():
    x, weight = inputs_and_weight()
    moment = x.T @ x
    first = prune_by_sparsegpt(weight, moment, 0.4)
    assert float(prune_by_sparsegpt(first, moment, 0.6)[first == 0].abs().max()) > 0
    second = prune_by_sparsegpt(first, moment, 0.6, keep_zeros=True)
    assert (second[first == 0] == 0).all()
    assert float((second == 0).float().mean()) == pytest.approx(0.6, abs=0.001)
    assert torch.equal(prune_by_sparsegpt(second, moment, 0.5, keep_zeros=True), second)
    gone = float((second == 0).float().mean())
    assert torch.equal(prune_by_sparsegpt(second, moment, gone, keep_zeros=True), second)


@needs_llm_compressor
def test_a_column_without_inputs_is_not_wholly_zeroed():
    x, weight = inputs_and_weight()
    x[:, 3] = 0
    weight[:4, 3] = 50.0 * x.square().sum()
    found = prune_by_sparsegpt(weight, x.T @ x, 0.5)
    assert torch.equal(found[:4, 3], weight[:4, 3])
    assert (found[4:, 3] == 0).all()


@needs_llm_compressor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_kept_matrices_come_back_to_the_bit(dtype, tmp_path):
    x, weight = inputs_and_weight()
    weight = weight.to(dtype)
    component = Component("q_proj", "q", 0, (24, 160), dtype, "q_proj.weight")
    (step,) = parse_scheme("sparsegpt:0.5").steps
    kept = Kept(tmp_path, "base", "calibration")
    kept.write(str(step), component, step.make(weight, x.T @ x))
    found = step.bound(kept).compress(weight, component)
    assert found.dtype == dtype
    assert torch.equal(found, prune_by_sparsegpt(weight, x.T @ x, 0.5))


@needs_llm_compressor
@pytest.mark.parametrize(
    "call", ["sparsegpt import prune_by_sparsegpt as f; f(w, w, 0.5)", "gptq import *; f(w)"]
)
def test_what_it_logs_is_kept_out_of_the_output(call):
    """A record that is printed as JSON must be nothing else."""
    call = call.replace("f(w)", "round_to_nearest(w, parse_absmax('int4'))")
    code = f"import torch; w = torch.eye(8); from divergent_tokens.compress.{call}"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""


@needs_llm_compressor
def test_matrices_that_are_stored_transposed():
    x, weight = inputs_and_weight()
    transposed = weight.T.contiguous().T
    assert not transposed.is_contiguous()
    moment = x.T @ x
    found = prune_by_sparsegpt(transposed, moment, 0.5)
    assert torch.equal(found, prune_by_sparsegpt(weight, moment, 0.5))


@needs_llm_compressor
def test_a_model_runs_under_it_and_under_a_chain(tmp_path):
    model = runs.model()
    components = find_components(model.network, include=["*.mlp.*"])
    schemes = [parse_scheme("sparsegpt:0.5"), parse_scheme("sparsegpt:0.5+int4:g8")]
    alone, chain = ready_schemes(model, components, schemes, cache=tmp_path)
    weight = weight_of(model.network, components[0])
    pruned = alone.compress(weight, components[0])
    rounded = parse_scheme("int4:g8").compress(pruned, components[0])
    assert torch.equal(chain.compress(weight, components[0]), rounded)
    plan = uniform_plan(components, schemes[0])
    with lent_candidates(model, {"it": plan}, components, cache=tmp_path)["it"] as lent:
        assert torch.equal(weight_of(lent.network, components[0]), pruned)
