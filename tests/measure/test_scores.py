import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax

import runs
import tiny
from divergent_tokens.errors import ModelError
from divergent_tokens.measure import metrics
from divergent_tokens.measure import scores as module
from divergent_tokens.measure.batches import BatchSize
from divergent_tokens.measure.completions import complete
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.progress import silent
from divergent_tokens.measure.scores import (
    BaseLogits,
    logprobs_of,
    score_base,
    score_hidden,
    score_logits,
)
from divergent_tokens.measure.states import base_states, hidden_batches

CPU_ERROR = RuntimeError("DefaultCPUAllocator: can't allocate memory")
FIELDS = [field.name for field in dataclasses.fields(module.TokenScores) if field.name != "mask"]


def ended(base, prompts, new_tokens=14):
    """Completions of several lengths, and the model whose ends make them so."""
    free = complete(base, prompts, new_tokens=new_tokens, ignore_eos=True)
    base = runs.with_ends(base, sorted({int(free.ids[0, 4]), int(free.ids[1, 8])}))
    return base, complete(base, prompts, new_tokens=new_tokens)


def agree(found, expected, rtol=1e-4, atol=1e-5):
    mask = expected.mask
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_array_equal(found.argmax_ids[mask], expected.argmax_ids[mask])
    for name in FIELDS:
        a, b = getattr(found, name)[mask], getattr(expected, name)[mask]
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol, err_msg=name)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_scores_are_what_the_whole_logits_say(architecture):
    prompts = runs.prompts(lengths=[8, 5, 8, 6])
    base, completions = ended(runs.model(architecture), prompts)
    candidate = runs.noisy(base)
    found = runs.scored(base, candidate, completions)
    for i, ids in enumerate(completions.sequences()):
        n, length = len(prompts.prompts[i].ids), int(completions.lengths[i])
        base_logits = runs.logits_of(base.network, ids)[n - 1 : n - 1 + length]
        logits = runs.logits_of(candidate.network, ids)[n - 1 : n - 1 + length]
        p, q = log_softmax(base_logits, -1), log_softmax(logits, -1)
        at, y = np.arange(length), completions.ids[i, :length]
        top = logits.argmax(-1)
        others = logits.copy()
        others[at, y] = -np.inf
        expected = {
            "argmax_ids": top,
            "logprobs": q[at, y],
            "argmax_logprobs": q[at, top],
            "margins": logits[at, y] - others.max(-1),
            "base_logprobs": p[at, y],
            "base_argmax_logprobs": p[at, top],
            "kl": (np.exp(p) * (p - q)).sum(-1),
            "acceptance": np.minimum(np.exp(p), np.exp(q)).sum(-1),
        }
        for name, values in expected.items():
            here = getattr(found, name)[i, :length]
            np.testing.assert_allclose(here, values, rtol=1e-3, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_fdt_is_the_longest_common_prefix_of_two_free_running_generations(architecture):
    """One teacher-forced pass says what the only other tool has to generate for."""
    prompts = runs.prompts(lengths=[8] * 5 + [6] * 5)
    base, completions = ended(runs.model(architecture), prompts)
    seen = set()
    for size in (0.003, 0.02, 0.1):
        candidate = runs.noisy(base, size)
        argmax_ids = runs.scored(base, candidate, completions).argmax_ids
        found = metrics.fdt(argmax_ids, completions.ids, completions.mask)
        free = complete(candidate, prompts, new_tokens=14)
        for i, length in enumerate(completions.lengths):
            ours, theirs = completions.ids[i, :length], free.ids[i, : free.lengths[i]]
            n = min(len(ours), len(theirs))
            apart = np.flatnonzero(ours[:n] != theirs[:n])
            assert found[i] == (apart[0] if len(apart) else n)
            seen.add(int(found[i]))
    assert len(seen) > 3


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_the_base_against_itself(architecture):
    base, completions = ended(runs.model(architecture), runs.prompts(lengths=[8, 5, 8, 6]))
    mask = completions.mask
    head = find_head(base.network)
    states = base_states(base, head, completions, batch_size=BatchSize(4))
    own = score_base(base, head, completions, states)
    again = runs.scored(base, base, completions)
    copy = runs.scored(base, runs.changed(base, lambda network: None), completions)
    for found in (own, again, copy):
        np.testing.assert_array_equal(found.argmax_ids[mask], completions.ids[mask])
        assert (found.kl[mask] == 0).all()
        assert (found.acceptance[mask] == 1).all()
        assert (found.margins[mask] > 0).all()
        np.testing.assert_array_equal(found.logprobs, found.base_logprobs)
        # Bit for bit: the base is scored in the very batches of its candidates.
        np.testing.assert_array_equal(found.base_logprobs[mask], own.logprobs[mask])


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "qwen3-moe", "mamba2"])
@pytest.mark.parametrize("size", [0.01, 0.3])
def test_the_identities_of_the_design(architecture, size):
    base, completions = ended(runs.model(architecture), runs.prompts(8))
    mask = completions.mask
    found = runs.scored(base, runs.noisy(base, size), completions)
    kl, acceptance = found.kl[mask], found.acceptance[mask]
    assert (kl >= 0).all()
    assert (acceptance >= 1 - np.sqrt(kl / 2) - 1e-6).all()
    nats = np.where(mask, -found.logprobs, 0).sum(1)
    n_divergent = ((found.argmax_ids != completions.ids) & mask).sum(1)
    # Each divergent token has a probability under one half: it costs a bit.
    assert (n_divergent <= nats / np.log(2) + 1e-4).all()
    assert (n_divergent.sum() > 0) == (size == 0.3) or n_divergent.sum() > 0
    sdt, dppl = (
        metrics.sdt(found.argmax_ids, completions.ids, mask),
        metrics.dppl(found.logprobs, mask),
    )
    assert sdt <= np.log2(dppl)
    assert (found.margins[mask & (found.argmax_ids != completions.ids)] <= 0).all()
    assert (found.argmax_logprobs >= found.logprobs)[mask].all()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_batch_size_order_and_chunks_change_nothing(architecture, monkeypatch):
    base, completions = ended(runs.model(architecture), runs.prompts(lengths=[8, 5, 8, 11, 5]))
    candidate = runs.noisy(base)
    expected = runs.scored(base, candidate, completions, n_batch=5)
    agree(runs.scored(base, candidate, completions, n_batch=1), expected)
    order = [3, 0, 4, 2, 1]
    shuffled = runs.scored(base, candidate, completions.subset(order), n_batch=2)
    inverse = np.argsort(order)
    agree(
        dataclasses.replace(
            shuffled, **{name: getattr(shuffled, name)[inverse] for name in ["mask", *FIELDS]}
        ),
        expected,
    )
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 3 * 4 * base.vocabulary_size)  # three tokens
    agree(runs.scored(base, candidate, completions, n_batch=5), expected)
    monkeypatch.setitem(module.CHUNK_BYTES, "cpu", 1)
    agree(runs.scored(base, candidate, completions, n_batch=5), expected)


def test_running_out_of_memory_loses_nothing():
    base, completions = ended(runs.model(), runs.prompts(5))
    candidate = runs.noisy(base)
    limited = runs.changed(candidate, runs.failing_above(2, CPU_ERROR))
    agree(runs.scored(base, limited, completions), runs.scored(base, candidate, completions))
    broken = runs.changed(candidate, runs.failing_above(2, RuntimeError("no kernel")))
    with pytest.raises(RuntimeError, match="no kernel"):
        runs.scored(base, broken, completions)


def test_bfloat16_runs_and_the_base_agrees_with_itself():
    base, completions = ended(runs.changed(runs.model(), lambda n: n.bfloat16()), runs.prompts(5))
    found = runs.scored(base, base, completions)
    assert (found.kl == 0).all()
    assert (found.acceptance[completions.mask] == 1).all()
    truth = runs.scored(runs.changed(base, lambda n: n.float()), base, completions)
    kl = truth.kl[completions.mask]
    assert 0 < kl.mean() < 0.1
    # A candidate in another dtype than the base's.
    assert np.isfinite(runs.scored(base, runs.model(), completions).kl).all()


def test_logprobs_of_any_tokens():
    base, completions = ended(runs.model(), runs.prompts(4))
    head = find_head(base.network)
    states = base_states(base, head, completions, batch_size=BatchSize(4))
    own = score_base(base, head, completions, states)
    args = (base, head, completions, states)
    found = logprobs_of(completions.ids, *args)
    mask = completions.mask
    np.testing.assert_allclose(found[mask], own.logprobs[mask], atol=1e-5)
    everything = [logprobs_of(np.full_like(completions.ids, v), *args) for v in range(256)]
    np.testing.assert_allclose(np.exp(everything).sum(0)[mask], 1, atol=1e-4)


@pytest.mark.parametrize(
    ("module_name", "said"),
    [
        ("model.layers.0.self_attn.q_proj", r"first in model\.layers\.0\.self_attn\.q_proj"),
        ("model.layers.1.mlp.down_proj", r"first in model\.layers\.1\.mlp\.down_proj"),
        ("model.norm", r"first in model\.norm"),
        ("lm_head", "its hidden states are finite; check its output embedding"),
    ],
)
def test_the_part_of_a_candidate_that_is_not_finite_is_named(module_name, said):
    base, completions = ended(runs.model(), runs.prompts(4))

    def plant(network):
        network.get_submodule(module_name).weight.view(-1)[7] = float("nan")

    broken = runs.changed(base, plant, "broken")
    with pytest.raises(ModelError, match=f"^broken .*{said}"):
        runs.scored(base, broken, completions)


def test_ties_go_to_the_lowest_id():
    logits = torch.tensor([[1.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0], [0.0, 1.0, 5.0, 5.0]])
    found = score_logits(logits, logits, torch.tensor([2, 3, 1]))
    assert found["argmax_ids"].tolist() == [1, 0, 2]
    assert found["margins"].tolist() == [0, 0, -4]


def test_scores_of_a_table_by_hand():
    """p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4); the base's token is the first."""
    p, q = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.25, 0.5, 0.25]])
    found = {k: v.item() for k, v in score_logits(q.log(), p.log(), torch.tensor([0])).items()}
    log2 = np.log(2)
    assert found == pytest.approx(
        {
            "argmax_ids": 1,
            "logprobs": -2 * log2,
            "argmax_logprobs": -log2,
            "margins": -log2,
            "base_logprobs": -log2,
            "base_argmax_logprobs": -2 * log2,
            "kl": 0.25 * log2,  # 1/2 log 2 − 1/4 log 2
            "acceptance": 0.75,
        },
        rel=1e-6,
    )


@pytest.mark.parametrize("size", [1e-4, 1e-3, 1e-2, 0.1, 1.0, 5.0])
def test_kl_is_right_to_one_percent_where_the_naive_sum_is_wrong(size):
    generator = torch.Generator().manual_seed(0)
    base_logits = 4 * torch.randn(20, 30_000, generator=generator)
    logits = base_logits + size * torch.randn(20, 30_000, generator=generator)
    found = score_logits(logits, base_logits, torch.zeros(20, dtype=torch.int64))
    truth = metrics.kl(base_logits.numpy(), logits.numpy())
    p, q = log_softmax(base_logits.double().numpy(), -1), log_softmax(logits.double().numpy(), -1)
    np.testing.assert_allclose(found["kl"].numpy(), truth, rtol=0.01)
    if size > 1e-3:  # there the plain sum in float64 is a truth of its own
        np.testing.assert_allclose(truth, (np.exp(p) * (p - q)).sum(-1), rtol=1e-6)
    accepted = np.minimum(np.exp(p), np.exp(q)).sum(-1)
    np.testing.assert_allclose(found["acceptance"].numpy(), accepted, atol=1e-5)
    if size <= 1e-3:
        p32, q32 = base_logits.log_softmax(-1), logits.log_softmax(-1)
        naive = (p32.exp() * (p32 - q32)).sum(-1).numpy()
        assert (np.abs(naive / truth - 1) > 0.1).mean() > 0.5


logits_strategy = st.lists(st.floats(-60, 60, width=32), min_size=5, max_size=5)


@settings(max_examples=300)
@given(base=logits_strategy, candidate=logits_strategy, target=st.integers(0, 4))
def test_torch_and_numpy_say_the_same(base, candidate, target):
    p, q = torch.tensor([base]), torch.tensor([candidate])
    found = score_logits(q, p, torch.tensor([target]))
    kl, accepted = metrics.kl(base, candidate), metrics.acceptance(base, candidate)
    assert found["kl"].item() == pytest.approx(kl, rel=1e-3, abs=1e-5)
    assert found["acceptance"].item() == pytest.approx(accepted, abs=1e-5)
    margin = metrics.margin(candidate, target)
    assert found["margins"].item() == pytest.approx(margin, abs=1e-4)
    assert found["argmax_ids"].item() == int(np.argmax(candidate))
    assert found["kl"].item() >= 0
    assert kl >= 0
    assert accepted >= 1 - np.sqrt(kl / 2) - 1e-9


MEMORY = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
sys.path[:0] = sys.argv[1:]
from transformers import LlamaConfig, LlamaForCausalLM
import runs, tiny
from divergent_tokens.measure.batches import BatchSize
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.scores import score, score_base
from divergent_tokens.measure.states import base_states
from divergent_tokens.models import Model

config = LlamaConfig(
    vocab_size=150_000, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1,
)
base = Model(LlamaForCausalLM(config).eval(), tiny.tokenizer(), "base", "base")
head = find_head(base.network)

def peak():
    # Not ru_maxrss: it begins with what the parent had when it started this process.
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

before = peak()
for n in (6, 32):
    completions = runs.written(runs.prompts(n), [list(range(20))] * n)
    states = base_states(base, head, completions, batch_size=BatchSize(32))
    score_base(base, head, completions, states)
    score(base, find_head(base.network), completions, head, states)
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_under_a_gibibyte_for_150_000_tokens_and_any_number_of_prompts():
    """6 prompts of 20 tokens are one chunk; 32 would be 366 MiB for each of several arrays."""
    found = subprocess.run(
        [sys.executable, "-c", MEMORY, *sys.path], capture_output=True, text=True, check=True
    )
    few, many = map(int, found.stdout.split())
    assert 2**26 < few <= many < 2**29


def test_the_bases_logits_are_made_once_where_there_is_room():
    base, completions = runs.model(), runs.written(runs.prompts(5), [list(range(9))] * 5)
    head = find_head(base.network)
    states = base_states(base, head, completions, batch_size=BatchSize(2))
    candidate = runs.noisy(base)
    own = find_head(candidate.network)
    made = []

    class Counted:
        def logits(self, hidden):
            made.append(len(hidden))
            return head.logits(hidden)

    def scored(logits):
        with torch.no_grad():
            batches = hidden_batches(candidate, own, completions, BatchSize(2), "", silent)
            return score_hidden(batches, candidate, own, completions, logits)

    plain = scored(BaseLogits(Counted(), states))
    assert made == [18, 18, 9]
    one_batch = 18 * 4 * base.vocabulary_size
    for room, second in ((0, [18, 18, 9]), (one_batch, [18, 9]), (10 * one_batch, [])):
        logits = BaseLogits(Counted(), states, room=room)
        scored(logits)
        made.clear()
        again = scored(logits)
        assert made == second
        for name in FIELDS:
            np.testing.assert_array_equal(getattr(again, name), getattr(plain, name))
