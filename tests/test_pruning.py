"""Pruning in rounds: exact zeros that stay, harm against slow loops, and runs that go on."""

import json
import logging
import signal
import subprocess
import sys
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import runs
import tiny
from divergent_tokens import recover
from divergent_tokens.allocation import Cut, _ordered, _threshold, cut
from divergent_tokens.candidates import plan_candidates
from divergent_tokens.compress.calibration import Calibration, second_moments
from divergent_tokens.compress.components import find_components, weight_of
from divergent_tokens.compress.plan_file import PlanFile
from divergent_tokens.compress.prune import n_of_m_mask, parse_pattern, rows_mask, share_mask
from divergent_tokens.compress.units import find_units, whole
from divergent_tokens.errors import DivergentTokensError, PromptError, RecordError, SchemeError
from divergent_tokens.gradients import sequence_gradients as gradients_of
from divergent_tokens.layers import decoder_layers
from divergent_tokens.measure.comparison import compare
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.sequences import Sequences, read_sequences
from divergent_tokens.models import load_model
from divergent_tokens.pruning import run as run_module
from divergent_tokens.pruning.ground import Ground
from divergent_tokens.pruning.prune import check_folder, prune
from divergent_tokens.pruning.run import Run, _Held
from divergent_tokens.pruning.settings import Settings
from divergent_tokens.recover import Recovery, Training, hold, schedule
from divergent_tokens.report.pruning import pruning_markdown
from divergent_tokens.report.records import read_source, read_sources
from divergent_tokens.saliencies import LEVELS, Saliencies, find_saliencies, levels_of

RNG = np.random.default_rng(0)
needs_llm_compressor = pytest.mark.skipif(
    find_spec("llmcompressor") is None, reason="llm-compressor is not installed"
)


@pytest.fixture(scope="module")
def sequences():
    return Sequences(np.random.default_rng(1).integers(4, 200, (12, 16)), "random")


@pytest.fixture
def base():
    return runs.changed(runs.model(), lambda network: network)


def of(model):
    return find_components(model.network)


def made(*matrices, harm=None):
    """Saliencies of made-up matrices, of components with these shapes."""
    components = []
    names = find_components(runs.model().network)
    for matrix, component in zip(matrices, names, strict=False):
        fields = {**vars(component), "shape": tuple(matrix.shape)}
        components.append(type(component)(**fields))
    return Saliencies(whole(components), tuple(matrices), harm)


# --- masks ---


def test_two_of_four_stay_in_every_group():
    saliency = torch.rand(6, 16)
    mask = n_of_m_mask(saliency, 2, 4)
    assert (mask.view(-1, 4).sum(1) == 2).all()
    kept = saliency.masked_fill(~mask, -1).view(-1, 4).sort(1).values[:, 2:]
    assert torch.equal(kept, saliency.view(-1, 4).sort(1).values[:, 2:])
    with pytest.raises(SchemeError, match="'4:2' is no pattern"):
        parse_pattern("4:2")


def test_rows_lose_the_same():
    mask = rows_mask(torch.rand(5, 20), 0.35)
    assert (mask.sum(1) == 13).all()


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.99])
def test_one_threshold_takes_the_least_of_all_to_the_last_weight(sparsity):
    values = [torch.from_numpy(RNG.random((7, 9))).float() ** 4, torch.rand(11, 5) * 0.1]
    values[0][0, :4] = 0.0  # ties
    found = cut(made(*values), "global", sparsity)
    joined = torch.cat([value.flatten() for value in values])
    n_gone = round(sparsity * len(joined))
    assert sum(int((~mask).sum()) for mask in found.masks) == n_gone
    gone = torch.cat([v[~m] for v, m in zip(values, found.masks, strict=True)])
    assert torch.equal(gone.sort().values, joined.sort().values[:n_gone])


@pytest.mark.parametrize(("by_rows", "mask_of"), [(False, share_mask), (True, rows_mask)])
def test_one_sort_gives_the_mask_of_every_level(by_rows, mask_of):
    saliency = torch.from_numpy(RNG.integers(0, 40, (13, 17))).float()  # many are alike
    levels = levels_of(saliency, by_rows)
    for j, level in enumerate(LEVELS):
        assert torch.equal(levels > j, mask_of(saliency, level)), level


def test_what_is_gone_stays_gone():
    values = [torch.rand(8, 8) - 0.5 for _ in range(3)]
    before = cut(made(*values), "global", 0.4)
    other = [torch.rand(8, 8) for _ in range(3)]
    for allocate in ("global", "uniform"):
        after = cut(made(*other), allocate, 0.6, before=before)
        for old, new in zip(before.masks, after.masks, strict=True):
            assert not (new & ~old).any() or allocate == "uniform"
        assert after.sparsity == pytest.approx(0.6, abs=0.02)


def test_uniform_spares_the_first_and_the_last_layer():
    values = [torch.rand(10, 10) for _ in range(14)]
    found = made(*values)
    with pytest.raises(SchemeError, match="nothing else is left; take --allocate uniform"):
        cut(found, "uniform-spared", 0.5)  # two layers, both of them ends
    layers = [
        replace(u, component=replace(u.component, layer=i % 4)) for i, u in enumerate(found.units)
    ]
    four = replace(found, units=tuple(layers))
    shares = cut(four, "uniform-spared", 0.3).sparsities
    assert [share > 0 for share in shares] == [i % 4 in (1, 2) for i in range(14)]
    with pytest.raises(SchemeError, match="leaves nothing of the layers between"):
        cut(four, "uniform-spared", 0.6)


def test_least_harm_is_the_best_of_all_choices():
    harm = np.cumsum(RNG.random((3, len(LEVELS))), 1) * np.array([[1], [5], [0.2]])
    found = cut(made(*[torch.rand(20, 20) for _ in range(3)], harm=harm), "kl", 0.5)
    assert found.sparsity >= 0.5
    levels = [int(np.argmin(abs(np.array(LEVELS) - s))) for s in found.sparsities]
    total = sum(harm[i, level] for i, level in enumerate(levels))
    every = [
        harm[0, a] + harm[1, b] + harm[2, c]
        for a in range(len(LEVELS))
        for b in range(len(LEVELS))
        for c in range(len(LEVELS))
        if LEVELS[a] + LEVELS[b] + LEVELS[c] >= 1.5
    ]
    assert total <= min(every) * 1.1  # without the proof of the optimum


def test_the_papers_rule_keeps_every_fdt_above_one_threshold():
    fdt = np.sort(RNG.random((3, len(LEVELS))) * 100, 1)[:, ::-1]
    found = cut(made(*[torch.rand(20, 20) for _ in range(3)]), "fdt-threshold", 0.5, fdt=fdt)
    assert found.sparsity == pytest.approx(0.5, abs=0.01)


def test_the_papers_rule_counts_what_is_gone_already():
    fdt = np.tile(np.linspace(100, 1, len(LEVELS)), (3, 1))
    fdt[0] = 100.0  # the first bears everything
    values = [torch.rand(20, 20) for _ in range(3)]
    before = cut(made(*values), "fdt-threshold", 0.4, fdt=fdt)
    found = cut(made(*values), "fdt-threshold", 0.5, fdt=fdt[::-1].copy(), before=before)
    assert found.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(b >= a - 1e-6 for a, b in zip(before.sparsities, found.sparsities, strict=True))


# --- saliencies ---


def test_wanda_is_its_definition(base, sequences):
    """|w| times the norm of the input, from hooks put on by hand."""
    component = next(c for c in of(base) if c.kind == "down" and c.layer == 1)
    rows = []
    module = base.network.get_submodule(component.parameter.removesuffix(".weight"))
    hook = module.register_forward_pre_hook(lambda _m, inputs: rows.append(inputs[0].detach()))
    with torch.no_grad():
        base.network(input_ids=torch.from_numpy(sequences.ids))
    hook.remove()
    norms = torch.cat([row.flatten(0, -2) for row in rows]).norm(dim=0)
    found = find_saliencies(base, [component], "wanda", sequences, n_sequences=99).values[0]
    expected = weight_of(base.network, component).abs() * norms
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def slow_gradients(model, components, ids, seed):
    """Gradients of drawn labels' log-probabilities by autograd on the weights. [sequence, ...]"""
    network = runs.changed(model, lambda n: n.requires_grad_(True)).network
    generator = torch.Generator().manual_seed(seed)
    found = []
    for batch in torch.split(ids, 4):
        uniforms = torch.rand(batch[:, 1:].numel(), generator=generator, dtype=torch.float64)
        for row, own in zip(batch, uniforms.view(len(batch), -1), strict=True):
            logps = network(input_ids=row[None]).logits[0, :-1].log_softmax(-1)
            sums = logps.detach().exp().double().cumsum(-1)
            labels = torch.searchsorted(sums, (own * sums[:, -1])[:, None], right=True)
            value = logps.gather(-1, labels.clamp(max=logps.shape[1] - 1)).sum()
            weights = [network.get_parameter(c.parameter) for c in components]
            found.append(torch.autograd.grad(value, weights))
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2", "opt"])
def test_gradients_are_those_of_the_weights(architecture, sequences):
    model = runs.model(architecture)
    components = of(model)
    ids = torch.from_numpy(sequences.ids[:6])
    found = [[] for _ in components]
    gradients_of(model, components, ids, lambda i, g: found[i].append(g), 3, None, lambda *_: None)
    expected = slow_gradients(model, components, ids, 3)
    for i, component in enumerate(components):
        own = torch.cat(found[i])
        for sequence, gradients in zip(own, expected, strict=True):
            gradient = gradients[i].t() if component.transposed else gradients[i]
            scale = float(gradient.abs().max())
            torch.testing.assert_close(sequence, gradient, rtol=1e-3, atol=1e-4 * scale)


def test_harm_is_that_of_the_slow_loop(base, sequences):
    components = of(base)[:3]
    found = find_saliencies(
        base, components, "magnitude", sequences, n_sequences=12, with_harm=True, seed=5
    )
    order = np.random.default_rng(5).permutation(len(sequences.ids))
    ids = torch.from_numpy(sequences.ids[order])
    gradients = slow_gradients(base, components, ids, 6)
    for i, component in enumerate(components):
        weight = weight_of(base.network, component)
        for j, level in enumerate(LEVELS):
            mask = cut(made(weight.abs()), "uniform", level).masks[0]
            s = [-float((g[i] * weight)[~mask].double().sum()) for g in gradients]
            expected = np.square(s).sum() / (2 * ids[:, 1:].numel())
            assert found.harm[i, j] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_harm_of_units_is_that_of_the_slow_loop(base, sequences):
    components = [c for c in of(base) if c.layer == 0 and c.kind in ("q", "o")]
    units = find_units(base.network, components, "head")
    run = {"n_sequences": 12, "with_harm": True, "seed": 5, "units": units}
    found = find_saliencies(base, components, "magnitude", sequences, **run)
    order = np.random.default_rng(5).permutation(len(sequences.ids))
    ids = torch.from_numpy(sequences.ids[order])
    gradients = slow_gradients(base, components, ids, 6)
    for u, unit in enumerate(units):
        weight = unit.of(weight_of(base.network, unit.component))
        for j in (1, 10, 21):
            mask = share_mask(weight.abs(), LEVELS[j])
            s = [-float((unit.of(g[unit.owner]) * weight)[~mask].double().sum()) for g in gradients]
            expected = np.square(s).sum() / (2 * ids[:, 1:].numel())
            assert found.harm[u, j] == pytest.approx(expected, rel=1e-3, abs=1e-9)


def test_the_slope_counts_around_a_model_that_moved(base, sequences):
    moved = runs.noisy(base, 0.2)
    components = of(base)[:2]
    run = {"n_sequences": 12, "with_harm": True, "seed": 5}
    without = find_saliencies(moved, components, "magnitude", sequences, **run).harm
    with_slope = find_saliencies(
        moved, components, "magnitude", sequences, teacher=base, **run
    ).harm
    network = runs.changed(moved, lambda n: n.requires_grad_(True)).network
    ids = torch.from_numpy(sequences.ids)
    wanted = base.network(input_ids=ids).logits[:, :-1].log_softmax(-1).detach()
    logps = network(input_ids=ids).logits[:, :-1].log_softmax(-1)
    kl = (wanted.exp() * (wanted - logps)).sum(-1).mean()
    for i, component in enumerate(components):
        parameter = network.get_parameter(component.parameter)
        (gradient,) = torch.autograd.grad(kl, parameter, retain_graph=True)
        weight = weight_of(moved.network, component)
        for j in (5, 12, 20):
            mask = cut(made(weight.abs()), "uniform", LEVELS[j]).masks[0]
            slope = -float((gradient * weight)[~mask].sum())
            assert with_slope[i, j] - without[i, j] == pytest.approx(slope, rel=1e-3, abs=1e-6)


def test_embeddings_and_head_are_not_pruned(base, sequences):
    every = find_components(base.network, include=["*"])
    with pytest.raises(SchemeError, match="is not pruned: only matrices of the layers"):
        find_saliencies(base, every, "magnitude", sequences)


@pytest.mark.parametrize("seed", range(20))
def test_one_threshold_is_that_of_a_sort(seed):
    rng = np.random.default_rng(seed)
    values = [torch.from_numpy(rng.normal(1, 0.01, (3, 7)).astype("f4")) for _ in range(3)]
    values.append(torch.full((3, 7), float(values[0][0, 0])))  # ties
    keys = [_ordered(value) for value in values]
    whole = sorted(key for part in keys for key in part.flatten().tolist())
    for n in (1, 20, 42, len(whole)):
        threshold = whole[n - 1]
        assert _threshold(lambda: keys, n) == (threshold, whole.index(threshold))


# --- training ---


def test_zeros_stay_through_steps_and_weights_move(base, sequences):
    network = runs.changed(base, lambda n: n).network
    masks = {
        name: torch.rand(p.shape) > 0.5 for name, p in network.named_parameters() if p.ndim == 2
    }
    hold(network, masks)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    recovery = Recovery(
        network,
        base.network,
        sequences,
        Training(batch_size=4, micro_batch=2, loss="both", learning_rate=3e-3),
        total_steps=60,
        seed=0,
    )
    losses = [recovery.run(15, masks) for _ in range(4)]
    assert losses[-1] < losses[0]
    for name, parameter in network.named_parameters():
        if name in masks:
            assert (parameter[~masks[name]] == 0).all()
            assert not torch.equal(parameter, before[name])


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_an_untouched_model_has_nothing_to_learn_and_stays_as_it_computes(architecture, sequences):
    model = runs.model(architecture)
    network = runs.changed(model, lambda n: n).network
    training = Training(batch_size=4, micro_batch=4, learning_rate=0.0)
    recovery = Recovery(network, model.network, sequences, training, total_steps=9, seed=0)
    assert recovery.run(2, {}) == pytest.approx(0.0, abs=1e-5)  # no dropout
    assert "forward" not in vars(network)
    assert not network.training


def test_gradients_that_are_no_numbers_stop_before_the_step(base, sequences, monkeypatch):
    network = runs.changed(base, lambda n: n).network
    training = Training(batch_size=4, micro_batch=4)
    recovery = Recovery(network, base.network, sequences, training, total_steps=9, seed=0)
    network.lm_head.weight.register_hook(lambda gradient: gradient * torch.nan)
    with pytest.raises(recover.NotFiniteError, match="gradients are not finite at step 1"):
        recovery.run(1, {})
    assert all(bool(p.isfinite().all()) and p.grad is None for p in network.parameters())


def test_the_papers_rule_ends_where_it_was_asked_to(base, tmp_path):
    record = run(base, tmp_path, rounds=8, steps=0, criterion="magnitude", allocate="fdt-threshold")
    assert record["rounds"][-1]["sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("architecture", ["gpt2", "gpt-oss"])
def test_a_pattern_fits_transposed_storage(architecture, tmp_path):
    model = runs.model(architecture)
    options = {"criterion": "magnitude", "allocate": "uniform", "pattern": (2, 4)}
    run(model, tmp_path, rounds=1, steps=0, **options)
    loaded = load_model(tmp_path / "out", device="cpu")
    for component in of(loaded):
        groups = weight_of(loaded.network, component).reshape(-1, 4)
        assert ((groups == 0).sum(1) == 2).all()


def test_parts_of_a_batch_are_the_batch(base, sequences):
    found = []
    for micro in (4, 1):
        network = runs.changed(base, lambda n: n).network
        training = Training(batch_size=4, micro_batch=micro)
        recovery = Recovery(network, base.network, sequences, training, total_steps=9, seed=0)
        with torch.no_grad():
            decoder_layers(network)[1][0].mlp.up_proj.weight.mul_(0.5)
        recovery.run(2, {})
        found.append(decoder_layers(network)[1][1].mlp.up_proj.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_both_is_half_of_each_loss(base, sequences):
    found = {}
    for loss in ("distill", "ce", "both"):
        network = runs.changed(base, lambda n: [p.mul_(1.1) for p in n.parameters()]).network
        training = Training(batch_size=4, loss=loss, learning_rate=0.0)
        recovery = Recovery(network, base.network, sequences, training, total_steps=1, seed=0)
        found[loss] = recovery.run(1, {})
    assert found["distill"] > 1e-3
    assert found["both"] == pytest.approx((found["distill"] + found["ce"]) / 2, rel=1e-5)


def test_the_schedule_takes_large_steps_first_and_ends_at_the_target():
    found = schedule(0.75, 10)
    steps = np.diff([0, *found])
    assert found[-1] == pytest.approx(0.75)
    assert (np.diff(steps) < 0).all()


# --- whole runs ---


TINY = {"n_saliency": 8, "new_tokens": 6}
ROWS = np.random.default_rng(1).integers(4, 200, (12, 16))


def run(base, folder, name="out", *, rounds=2, steps=3, plan=None, **options):
    settings = Settings(
        sparsity=options.pop("sparsity", 0.5),
        rounds=rounds,
        training=Training(
            steps=steps,
            batch_size=4,
            micro_batch=4,
            learning_rate=options.pop("learning_rate", 1e-3),
        ),
        **{**TINY, **options},
    )
    text = " ".join(tiny.SENTENCES * 20)
    return prune(
        base,
        of(base),
        Sequences(ROWS, "random"),
        runs.prompts(4),
        folder / name,
        settings,
        plan=plan,
        text=text,
    )


@pytest.mark.parametrize(
    ("criterion", "allocate"),
    [
        ("magnitude", "uniform"),
        ("magnitude", "kl"),
        ("magnitude", "fdt"),
        ("magnitude", "fdt-threshold"),
        ("wanda", "uniform"),
        ("wanda", "kl"),
        ("fisher", "global"),
        ("fisher", "kl"),
    ],
)
def test_a_pruning_writes_exact_zeros_and_its_record(base, tmp_path, criterion, allocate):
    own = {name: p.detach().clone() for name, p in base.network.named_parameters()}
    record = run(base, tmp_path, criterion=criterion, allocate=allocate)
    assert all(torch.equal(p, own[name]) for name, p in base.network.named_parameters())
    assert [one["round"] for one in record["rounds"]] == [1, 2]
    assert record["rounds"][-1]["sparsity"] == pytest.approx(0.5, abs=0.03)
    assert json.loads((tmp_path / "out" / "pruning.json").read_text()) == record
    assert read_source(tmp_path / "out" / "pruning.json").kind == "pruning"  # by its schema
    loaded = load_model(tmp_path / "out", device="cpu")
    zeros = {c["name"]: c["n_zero"] for c in record["components"]}
    for component in of(loaded):
        assert int((weight_of(loaded.network, component) == 0).sum()) == zeros[component.name]
    share = sum(zeros.values()) / sum(c["n_parameters"] for c in record["components"])
    assert share == pytest.approx(record["rounds"][-1]["sparsity"], abs=1e-3)
    assert not (tmp_path / "out.rounds").exists()
    assert record["metrics"]["kl"]["value"] == pytest.approx(
        record["rounds"][-1]["after"]["kl"], rel=1e-3
    )


def test_a_pattern_is_in_every_matrix(base, tmp_path):
    record = run(base, tmp_path, rounds=1, steps=2, pattern=(2, 4))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for component in record["components"]:
        groups = weights[f"{component['name']}.weight"].view(-1, 4)
        assert ((groups == 0).sum(1) == 2).all()


def test_lifted_masks_let_weights_come_back_before_the_next_cut(base, tmp_path, monkeypatch):
    seen = []
    own = Recovery.run

    def watching(self, n_steps, masks, **options):
        found = own(self, n_steps, masks, **options)
        zeros = sum(int((p == 0).sum()) for p in self._network.parameters() if p.ndim == 2)
        seen.append((n_steps, bool(masks), zeros))
        return found

    monkeypatch.setattr(Recovery, "run", watching)
    settings = Settings(
        sparsity=0.5,
        rounds=2,
        training=Training(steps=5, batch_size=4, micro_batch=4, learning_rate=1e-3, lifted=True),
        **TINY,
    )
    record = prune(
        base, of(base), Sequences(ROWS, "random"), runs.prompts(4), tmp_path / "out", settings
    )
    assert [(n, held) for n, held, _ in seen] == [(5, True), (2, False), (3, True)]
    assert seen[1][2] < 0.1 * seen[0][2]
    assert record["rounds"][-1]["sparsity"] == pytest.approx(0.5, abs=0.01)


def stop_in_round(monkeypatch, number):
    """The next training of this round is interrupted."""
    own = Recovery.run

    def stopping(self, *arguments, **options):
        if options["name"].startswith(f"round {number}"):
            raise KeyboardInterrupt
        return own(self, *arguments, **options)

    monkeypatch.setattr(Recovery, "run", stopping)


def test_what_was_stopped_goes_on_to_the_same_weights(base, tmp_path, monkeypatch):
    whole = run(base, tmp_path, "whole", rounds=3)
    with monkeypatch.context() as patch:
        stop_in_round(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path, "stopped", rounds=3)
    assert not (tmp_path / "stopped").exists()
    assert len(list((tmp_path / "stopped.rounds").glob("*.safetensors"))) == 1
    resumed = run(base, tmp_path, "stopped", rounds=3)
    assert resumed["rounds"] == whole["rounds"]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("whole", "stopped")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_rounds_of_another_run_are_refused(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_round(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path)
    said = r"rounds of another run \(sparsity 0\.5 there, 0\.6 now; repair False there, True now\)"
    with pytest.raises(RecordError, match=said):
        run(base, tmp_path, sparsity=0.6, repair=True)
    with pytest.raises(RecordError, match=r"another run \(base differs\)"):
        run(runs.noisy(base), tmp_path)


def test_a_loss_that_is_no_number_keeps_the_last_good_round(base, tmp_path, monkeypatch):
    own = Recovery._loss

    def wrong(self, *arguments):
        loss = own(self, *arguments)
        return loss * torch.nan if self.step == 4 else loss

    monkeypatch.setattr(Recovery, "_loss", wrong)
    with pytest.raises(DivergentTokensError, match="round 2: the loss is nan at step 5; what was"):
        run(base, tmp_path)
    monkeypatch.undo()
    assert [one["round"] for one in run(base, tmp_path)["rounds"]] == [1, 2]


@needs_llm_compressor
@pytest.mark.parametrize("allocate", ["uniform", "kl", "fdt"])
def test_sparsegpt_cuts_and_repairs_in_rounds(base, tmp_path, monkeypatch, allocate):
    """What is gone stays gone, each matrix gets its share, and what stays is moved."""
    kept = []
    own = Run._by_sparsegpt

    def keeping(self, shares, number):
        found = own(self, shares, number)
        kept.append((shares, found.masks))
        return found

    monkeypatch.setattr(Run, "_by_sparsegpt", keeping)
    record = run(base, tmp_path, steps=0, criterion="sparsegpt", allocate=allocate)
    assert record["rounds"][-1]["sparsity"] == pytest.approx(0.5, abs=0.03)
    for shares, masks in kept:
        for share, mask in zip(shares, masks, strict=True):
            # one more of each block, and here a matrix is one
            assert int((~mask).sum()) == pytest.approx(share * mask.numel(), abs=2)
    for before, after in zip(kept[0][1], kept[1][1], strict=True):
        assert not (after & ~before).any()
    loaded = load_model(tmp_path / "out", device="cpu")
    for component, mask in zip(of(base), kept[1][1], strict=True):
        weight = weight_of(loaded.network, component)
        assert torch.equal(weight != 0, mask)
        if int((~mask).sum()):
            assert not torch.equal(weight[mask], weight_of(base.network, component)[mask])


@needs_llm_compressor
def test_sparsegpt_holds_its_zeros_in_training_and_takes_a_pattern(base, tmp_path):
    run(base, tmp_path, "two", rounds=1, criterion="sparsegpt", pattern=(2, 4), allocate="uniform")
    loaded = load_model(tmp_path / "two", device="cpu")
    for component in of(base):
        zeros = weight_of(loaded.network, component).reshape(-1, 4) == 0
        assert (zeros.sum(1) == 2).all()
    record = run(base, tmp_path, "trained", criterion="sparsegpt", allocate="kl")
    total = sum(one["n_parameters"] for one in record["components"])
    n_zero = sum(one["n_zero"] for one in record["components"])
    assert n_zero / total == pytest.approx(record["rounds"][-1]["sparsity"], abs=1e-6)


@pytest.mark.skipif(find_spec("llmcompressor") is not None, reason="llm-compressor is installed")
def test_sparsegpt_without_llm_compressor_says_what_to_install(base, tmp_path):
    with pytest.raises(SchemeError, match="--criterion sparsegpt is computed by llm-compressor"):
        run(base, tmp_path, criterion="sparsegpt", allocate="kl")
    assert list(tmp_path.iterdir()) == []


def test_bad_settings_are_said(base, tmp_path):
    with pytest.raises(SchemeError, match="sparsegpt cuts each by itself, at a share"):
        Settings(sparsity=0.5, criterion="sparsegpt", allocate="global")
    with pytest.raises(SchemeError, match="sparsegpt moves what stays by itself"):
        Settings(sparsity=0.5, criterion="sparsegpt", allocate="kl", repair=True)
    with pytest.raises(SchemeError, match=r"a sparsity of 1\.5 was asked for"):
        Settings(sparsity=1.5)
    with pytest.raises(SchemeError, match="take --criterion fisher, or --allocate kl"):
        Settings(sparsity=0.5, criterion="wanda")
    with pytest.raises(SchemeError, match=r"knows no level beyond 0\.99"):
        Settings(sparsity=0.995, criterion="wanda", allocate="kl")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    with pytest.raises(RecordError, match="holds no pruned model of ours"):
        run(base, tmp_path, "theirs")
    with pytest.raises(SchemeError, match="which 5 does not divide"):
        run(base, tmp_path, rounds=1, pattern=(2, 5))
    sparse = runs.changed(base, lambda n: [p.zero_() for p in n.parameters() if p.ndim == 2])
    with pytest.raises(SchemeError, match=r"100\.0% of the weights of m are zero already"):
        run(sparse, tmp_path)


def test_a_text_too_short_to_train_on(base, tmp_path):
    path = tmp_path / "short.txt"
    path.write_text("\n".join(tiny.SENTENCES))
    with pytest.raises(PromptError, match="training needs 8 at least"):
        read_sequences(str(path), base, length=64, n_sequences=100)
    with pytest.raises(PromptError, match=r"^4 training sequences .* \(--n-sequences\)$"):
        read_sequences(str(path), base, length=16, n_sequences=4)
    path.write_text("\n".join(tiny.SENTENCES * 20))
    found = read_sequences(str(path), base, length=16, n_sequences=10)
    assert found.ids.shape == (10, 16)


def test_several_sources_give_as_much_each(base, tmp_path):
    for name, sentences in (("a", tiny.SENTENCES[:3]), ("b", tiny.SENTENCES[3:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(sentences * 30))
    paths = [str(tmp_path / "a.txt"), str(tmp_path / "b.txt")]
    found = read_sequences(paths, base, length=16, n_sequences=21)
    for path, own in zip(paths, (found.ids[:10], found.ids[10:]), strict=True):
        alone = read_sequences(path, base, length=16, n_sequences=len(own))
        assert np.array_equal(alone.ids, own)
    assert found.source == ", ".join(paths)


def test_what_is_reported_on_and_was_seen_is_counted_and_said(base, tmp_path, caplog):
    prompts = runs.prompts(40, 20)
    rows = np.random.default_rng(3).integers(4, 200, (30, 40))
    lines = ["A text that is seen in the sequences word for word.", "Another line, and it is not."]
    ids = [base.tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    settings = Settings(sparsity=0.5, **{**TINY, "training": Training(steps=0)})
    text = "\n".join(lines * 30)

    def record(n_seen, settings=settings, prompts=prompts, text=text, name=None):
        own = rows.copy()
        for i in range(n_seen):
            own[i, 3 + i : 19 + i] = prompts.prompts[i].ids[1:17]  # sixteen in a row
        own[9, :20] = ids[0][:20]
        own[10, :15] = runs.prompts(40, 20).prompts[39].ids[:15]
        caplog.clear()
        place = tmp_path / (name or str(n_seen))
        with caplog.at_level(logging.WARNING, "divergent_tokens.pruning.prune"):
            return prune(base, of(base), Sequences(own, "m"), prompts, place, settings, text=text)

    found = record(2)
    assert found["data"]["overlap"] == {"prompts": 0.05, "text": 0.5}
    assert "of the prompts stand in --data" not in caplog.text  # 5 % and no more
    assert "50% of the text stands in --data, too, and 5% at most was expected" in caplog.text
    assert "Of the prompts, 5.00% stand in these sequences" in pruning_markdown(found)
    found = record(3, text=None)
    assert found["data"]["overlap"] == {"prompts": 0.075, "text": None}
    assert "8% of the prompts stand in --data, too, and 5% at most was expected" in caplog.text
    found = record(0, text=None)
    assert found["data"]["overlap"]["prompts"] == 0.0
    assert "stand in these sequences" not in pruning_markdown(found)
    found = record(0, prompts=runs.prompts(3, 12), text=None, name="short")
    assert found["data"]["overlap"]["prompts"] is None  # too short to be told
    unread = replace(settings, criterion="magnitude", allocate="uniform")
    assert record(3, unread, name="unread")["data"]["overlap"] == {"prompts": None, "text": None}
    assert not caplog.text


def test_turns_without_text_are_no_sequences(base, tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello."}]}) + "\n")
    with pytest.raises(PromptError, match="holds the turns of a chat and no text"):
        read_sequences(str(path), base, length=16, n_sequences=8)


def test_what_the_base_draws_is_kept(base, tmp_path, monkeypatch):
    draw = {"length": 8, "n_sequences": 9, "cache": tmp_path}
    first = read_sequences("self", base, **draw)
    monkeypatch.setattr("divergent_tokens.measure.sequences.sample_documents", None)
    assert np.array_equal(read_sequences("self", base, **draw).ids, first.ids)
    with pytest.raises(TypeError):
        read_sequences("self", base, seed=1, **draw)


# --- units, repair, and a plan ---


@pytest.mark.parametrize("granularity", ["head", "rows"])
def test_units_get_a_sparsity_of_their_own(base, tmp_path, granularity, monkeypatch):
    monkeypatch.setattr("divergent_tokens.compress.units.BLOCK_ROWS", 8)
    options = {"criterion": "magnitude", "allocate": "kl", "granularity": granularity}
    record = run(base, tmp_path, rounds=1, steps=0, **options)
    assert record["rounds"][-1]["sparsity"] == pytest.approx(0.5, abs=0.05)
    loaded = load_model(tmp_path / "out", device="cpu")
    components = of(loaded)
    shares = {}
    for unit in find_units(loaded.network, components, granularity):
        part = unit.of(weight_of(loaded.network, unit.component))
        shares.setdefault(unit.owner, set()).add(round(float((part == 0).float().mean()), 2))
    assert max(map(len, shares.values())) > 1  # of one matrix
    with pytest.raises(SchemeError, match="--allocate global gives nothing a sparsity of its own"):
        run(base, tmp_path, "other", granularity=granularity)


def test_fdt_is_measured_unit_by_unit(base, tmp_path):
    options = {"criterion": "magnitude", "allocate": "fdt", "granularity": "head"}
    record = run(base, tmp_path, rounds=1, steps=0, sparsity=0.3, **options)
    assert record["rounds"][-1]["sparsity"] == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize(("criterion", "allocate"), [("fisher", "global"), ("wanda", "uniform")])
def test_repair_brings_the_model_closer(base, tmp_path, criterion, allocate):
    options = {"rounds": 1, "steps": 0, "criterion": criterion, "allocate": allocate}
    options["n_saliency"] = len(ROWS)  # random tokens teach nothing of others
    without = run(base, tmp_path, "without", **options)
    repaired = run(base, tmp_path, "repaired", repair=True, **options)
    zeros = [[c["n_zero"] for c in record["components"]] for record in (without, repaired)]
    assert zeros[0] == zeros[1]
    assert repaired["metrics"]["kl"]["value"] < without["metrics"]["kl"]["value"]


@pytest.mark.parametrize("architecture", ["gpt2", "qwen3-moe", "gpt-oss"])
def test_repair_moves_outputs_less_in_every_storage(architecture, tmp_path):
    base = runs.model(architecture)
    options = {"rounds": 1, "steps": 0, "criterion": "magnitude", "allocate": "uniform"}
    options["n_saliency"] = len(ROWS)
    run(base, tmp_path, "without", **options)
    run(base, tmp_path, "repaired", repair=True, **options)
    without, repaired = (load_model(tmp_path / n, device="cpu") for n in ("without", "repaired"))
    texts = Calibration(tuple(map(tuple, ROWS.tolist())), "the same texts")
    for component, moment in second_moments(base.network, of(base), texts):
        own = weight_of(base.network, component)
        plain, better = (weight_of(m.network, component) for m in (without, repaired))
        assert torch.equal(plain == 0, better == 0)
        errors = [float((((w - own) @ moment) * (w - own)).sum()) for w in (plain, better)]
        assert errors[1] < errors[0]


@pytest.mark.parametrize("n_saliency", [8, 12])  # with sequences to spare, and without
def test_a_repair_that_does_harm_is_not_kept(base, tmp_path, n_saliency, monkeypatch):
    options = {"rounds": 1, "steps": 0, "criterion": "magnitude", "allocate": "uniform"}
    options["n_saliency"] = n_saliency
    record = run(base, tmp_path, "without", **options)
    assert record["rounds"][0]["repaired"] is None
    record = run(base, tmp_path, "repaired", repair=True, **options)
    assert record["rounds"][0]["repaired"]
    monkeypatch.setattr(
        "divergent_tokens.pruning.run.repair", lambda weights, masks, _moments: -weights * masks
    )
    record = run(base, tmp_path, "harmed", repair=True, **options)
    assert record["rounds"][0]["repaired"] is False
    assert "not kept in 1 of 1 rounds (1)" in pruning_markdown({**record, "folder": "out"})
    found = [load_file(tmp_path / n / "model.safetensors") for n in ("without", "harmed")]
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_a_repair_is_judged_on_sequences_that_it_was_not_seen_on(base, tmp_path, monkeypatch):
    texts = {"seen": set(), "judged": set()}
    second_moments_of, judge = run_module.second_moments, run_module.mean_kl

    def seeing(network, components, calibration):
        texts["seen"] |= set(calibration.rows)
        return second_moments_of(network, components, calibration)

    def reading(network, _args, given):
        if "input_ids" in given:
            last.append(tuple(given["input_ids"][0].tolist()))

    def judging(logits, wanted):
        texts["judged"].add(last[-1])
        return judge(logits, wanted)

    last = []
    handle = base.network.register_forward_pre_hook(reading, with_kwargs=True)
    monkeypatch.setattr(run_module, "second_moments", seeing)
    monkeypatch.setattr(run_module, "mean_kl", judging)
    options = {"rounds": 1, "steps": 0, "criterion": "magnitude", "allocate": "uniform"}
    run(base, tmp_path, repair=True, n_saliency=8, **options)
    handle.remove()
    every = {tuple(row) for row in ROWS.tolist()}
    assert texts["seen"] | texts["judged"] == every
    assert len(texts["seen"]) == 8
    assert not texts["seen"] & texts["judged"]


def test_a_plan_is_measured_with_the_zeros(base, tmp_path):
    record = run(base, tmp_path, rounds=2, plan=runs.plan_for(base))
    loaded = load_model(tmp_path / "out", device="cpu")
    path = tmp_path / "out" / "plan.json"
    candidates = plan_candidates(loaded, path)
    found = compare(
        base, candidates, runs.prompts(4), new_tokens=TINY["new_tokens"], seed=0
    ).candidates[0]
    assert found.metrics.kl.value == pytest.approx(record["metrics"]["kl"]["value"], rel=1e-4)
    assert record["rounds"][-1]["after"]["kl"] == pytest.approx(found.metrics.kl.value, rel=1e-4)
    assert record["metrics"]["kl"]["value"] != record["metrics_without_plan"]["kl"]["value"]
    with candidates[str(path)] as model:
        kept = [(weight_of(loaded.network, c) == 0).float().mean() for c in of(model)]
    assert float(torch.stack(kept).mean()) >= 0.45
    (source,) = read_sources([tmp_path / "out"])  # the plan there is for another base
    assert source.kind == "pruning"
    assert "Rounds are measured under the plan" in pruning_markdown({**record, "folder": "out"})


def test_plans_that_hang_on_the_bases_weights_are_refused(base, tmp_path):
    for scheme in ("gptq:int4:g16", "from:elsewhere"):
        with pytest.raises(SchemeError, match="is made once, for the base's own weights"):
            run(base, tmp_path, plan=runs.plan_for(base, scheme))
    with pytest.raises(RecordError, match="is another model"):
        run(runs.noisy(base), tmp_path, plan=runs.plan_for(base))


# --- the rest ---


def test_the_optimizer_of_another_network_is_refused(base, sequences):
    recovery = Recovery(
        runs.changed(base, lambda n: n).network,
        base.network,
        sequences,
        Training(batch_size=4, micro_batch=4),
        total_steps=9,
        seed=0,
    )
    with pytest.raises(RecordError, match="the optimizer state of another network"):
        recovery.load_state({"step": torch.tensor(3)})
    assert recover.WARM_UP > 0
    assert find_head(base.network)
    assert Cut((torch.tensor([[True, False]]),)).sparsity == 0.5


def test_from_the_command_line(base, tmp_path, dtm):
    base.network.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    data = tmp_path / "data.txt"
    data.write_text("\n".join(tiny.SENTENCES * 30))
    arguments = ["prune", str(tmp_path / "base"), "--rounds", "2", "--steps", "2"]
    arguments += ["--data", str(data), "--length", "16", "--n-sequences", "20"]
    arguments += ["--prompts", str(data), "--n-prompts", "3", "--prefix", "8", "--new-tokens", "4"]
    arguments += ["--train-batch", "4", "--device", "cpu", "--cache", str(tmp_path / "cache")]
    out = ["--out", str(tmp_path / "out")]
    done = dtm(*arguments, "--sparsity", "0.5", *out)
    assert done.code == 0, done.err
    assert "Zeros alone make nothing faster" in done.out
    again = dtm(*arguments, "--sparsity", "0.5", *out)
    assert again.code == 2
    assert "--overwrite" in again.err
    corrected = dtm(*arguments, "--sparsity", "0.5", *out, "--overwrite", "--correct", "2")
    assert corrected.code == 0
    assert "made again 2 times by what it costs each matrix" in " ".join(corrected.out.split())
    found = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert [len(one["corrected_from"]) for one in found["rounds"]] == [2, 2]
    (tmp_path / "out" / "notes.txt").write_text("mine")
    mixed = dtm(*arguments, "--sparsity", "0.5", *out, "--overwrite")
    assert mixed.code == 2
    assert "holds notes.txt besides a pruned model" in mixed.err
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    neither = dtm(*arguments, "--out", str(tmp_path / "x"))
    assert neither.code == 2
    assert "expected either a --sparsity such as 0.75" in neither.err
    theirs = dtm(*arguments, "--sparsity", "0.5", "--out", str(tmp_path / "base"))
    assert theirs.code == 2
    assert "holds no pruned model of ours" in theirs.err
    arguments[2:4] = []  # a pattern is cut at once
    arguments += ["--repair", "--n-saliency", "500", "--no-compile", "--format", "json"]
    as_json = dtm(*arguments, "--pattern", "2:4", "--out", str(tmp_path / "p"))
    assert as_json.code == 0
    record = json.loads(as_json.out)
    assert record["settings"]["pattern"] == [2, 4]
    assert record["settings"]["repair"]
    assert record["data"]["n_saliency"] == record["data"]["n_sequences"] == 20
    assert not record["rounds"][0]["compiled"]


def test_options_that_could_not_act_are_refused(dtm, tmp_path):
    command = ["prune", "nowhere", "--out", str(tmp_path / "out")]
    every = ["--lr", "1e-3", "--loss", "ce", "--train-batch", "4", "--micro-batch", "2"]
    every += ["--checkpointing", "--lift"]
    names = "--lr, --loss, --train-batch, --micro-batch, --lift, --checkpointing"
    for arguments, message in (
        (["--sparsity", "0.5", "--steps", "0", *every], f"and {names} would not act"),
        (["--sparsity", "0.5", "--steps", "0", "--compile"], "and --compile would not act"),
        (["--sparsity", "0.5", "--rounds", "1", "--lift"], "give two --rounds or more"),
        (["--sparsity", "0.5", "--steps", "1", "--lift"], "and two --steps, or leave it out"),
        (["--sparsity", "0.5", "--pattern", "2:4"], "found both"),
        (["--pattern", "2:4", "--lift"], "a pattern is cut at once"),
        (["--pattern", "2:4", "--allocate", "kl"], "so that --allocate kl would not act"),
        (["--pattern", "2:4", "--correct", "1"], "leave --correct out"),
    ):
        done = dtm(*command, *arguments)
        assert (done.code, message in done.err) == (2, True), done.err
    for arguments in (
        ["--sparsity", "0.5", "--steps", "0", "--no-compile"],
        ["--pattern", "2:4", "--allocate", "uniform"],
    ):
        assert "nowhere" in dtm(*command, *arguments).err  # no such model, which comes after


def test_experts_of_a_dense_model_are_none(base, tmp_path):
    with pytest.raises(SchemeError, match="none of the 14 components is an expert's"):
        run(base, tmp_path, granularity="expert")
    with pytest.raises(SchemeError, match="leave --granularity expert out"):
        run(base, tmp_path, rounds=1, granularity="expert", pattern=(2, 4))


def test_fdt_by_level_is_that_of_the_slow_loop(base, tmp_path, monkeypatch):
    found = {}
    by_level = Ground.fdt_by_level

    def kept(ground, model, units, *rest):
        found["fdt"] = by_level(ground, model, units, *rest)
        return found["fdt"]

    monkeypatch.setattr(Ground, "fdt_by_level", kept)
    some = find_components(base.network, include=["*layers.1.*_proj"])[:2]
    options = {"criterion": "magnitude", "allocate": "fdt", "rounds": 1}
    settings = Settings(sparsity=0.5, training=Training(steps=0), **TINY, **options)
    prompts = runs.prompts(4)
    prune(base, some, Sequences(ROWS, "r"), prompts, tmp_path / "out", settings)
    for i, component in enumerate(some):
        for j in (0, 3, 10, 21):

            def cut_to(network, component=component, j=j):
                weight = weight_of(network, component)
                weight.mul_(share_mask(weight.abs(), LEVELS[j]))

            candidate = _Held(runs.changed(base, cut_to))
            slow = compare(base, {"c": candidate}, prompts, new_tokens=TINY["new_tokens"])
            fdt = slow.candidates[0].metrics.to_json()["fdt"]["value"]
            assert found["fdt"][i, j] == pytest.approx(fdt), (component.name, LEVELS[j])


def test_a_pattern_on_top_of_zeros_counts_them(base, tmp_path):
    with torch.no_grad():
        own = weight_of(base.network, of(base)[0])
        own[:, :3] = 0.0  # three of the first four in each row
    record = run(base, tmp_path, rounds=1, pattern=(2, 4))
    assert record["components"][0]["n_zero"] > own.numel() / 2
    total = sum(c["n_zero"] for c in record["components"])
    share = total / sum(c["n_parameters"] for c in record["components"])
    assert record["rounds"][0]["sparsity"] == pytest.approx(share)
    assert " pruned to 2:4 by fisher; reported" in pruning_markdown(record)


def test_more_than_was_asked_for_is_said(base, tmp_path):
    with torch.no_grad():
        weight_of(base.network, of(base)[0]).zero_()
    record = run(base, tmp_path, rounds=1, steps=0, criterion="magnitude", allocate="uniform")
    assert record["rounds"][0]["sparsity"] > 0.51
    assert "of the weights are zero where 50.0% were asked for" in pruning_markdown(record)


@pytest.mark.parametrize("granularity", ["component", "rows"])
def test_heads_and_rows_allot_by_kl_if_nothing_is_said(dtm, monkeypatch, tmp_path, granularity):
    asked = []

    def settings(**given):
        asked.append(given)
        raise DivergentTokensError("enough")

    monkeypatch.setattr("divergent_tokens.pruning.settings.Settings", settings)
    out = ["--out", str(tmp_path / "out")]
    dtm("prune", "nowhere", *out, "--sparsity", "0.5", "--granularity", granularity)
    assert asked[0]["allocate"] == {"component": "global", "rows": "kl"}[granularity]


def test_a_disk_that_is_full_is_said(base, tmp_path, monkeypatch):
    def full(*_):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("divergent_tokens.pruning.kept_rounds.save_file", full)
    with pytest.raises(RecordError, match=r"could not write .*No space left .* Free some room"):
        run(base, tmp_path)


def test_folders_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(RecordError, match="no pruned model of ours"):
        check_folder(Path("/"), overwrite=False)
    with pytest.raises(RecordError, match="File name too long"):
        check_folder(tmp_path / ("a" * 300), overwrite=False)


def test_rounds_with_other_tensors_are_damaged(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_round(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path, rounds=3)
    (file,) = (tmp_path / "out.rounds").glob("round-*.safetensors")
    base.network.save_pretrained(tmp_path / "other")
    file.write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    with pytest.raises(RecordError, match="is damaged, and no round can be read"):
        run(base, tmp_path, rounds=3)


def test_a_damaged_record_is_no_pruned_model(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for damaged in ('{"schema": "divergent-tokens/pru', "[]", '{"schema": "another"}', "\x00"):
        (out / "pruning.json").write_text(damaged)
        with pytest.raises(RecordError, match="holds no pruned model of ours"):
            prune(
                base,
                of(base),
                Sequences(ROWS, "r"),
                runs.prompts(2),
                out,
                Settings(0.5),
                overwrite=True,
            )
        assert (out / "pruning.json").read_text() == damaged


def test_a_share_of_some_matrices_is_called_one(base, tmp_path):
    some = find_components(base.network, include=["*q_proj"])
    settings = Settings(sparsity=0.5, rounds=1, training=Training(steps=1), **TINY)
    found = []
    for components, name in ((some, "some"), (of(base), "every")):
        place = tmp_path / name
        data = Sequences(ROWS, "r")
        found.append(prune(base, components, data, runs.prompts(2), place, settings))
    assert [record["n_not_pruned"] for record in found] == [12, 0]
    said = [pruning_markdown(record) for record in found]
    assert "of the 2 matrices that were chosen; 12 others of the layers were not pruned" in said[0]
    assert "that were chosen" not in said[1]


def test_an_interrupt_says_which_rounds_are_kept(base, tmp_path):
    base.network.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    data = tmp_path / "data.txt"
    data.write_text("\n".join(tiny.SENTENCES * 30))
    command = [str(Path(sys.executable).with_name("dtm")), "prune", "base", "--sparsity", "0.5"]
    command += ["--rounds", "400", "--steps", "1", "--data", "data.txt", "--length", "16"]
    command += ["--n-sequences", "20", "--prompts", "data.txt", "--n-prompts", "3", "--prefix", "8"]
    command += ["--new-tokens", "4", "--device", "cpu", "--out", "out", "--cache", "cache"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while process.poll() is None and not list(tmp_path.glob("out.rounds/round-2*")):
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    assert process.returncode == 130, said
    folder = tmp_path / "out.rounds"
    n = len(json.loads((folder / "run.json").read_text())["records"])
    assert said.endswith(
        f"; {n} of 400 rounds are kept in {folder}: run the same command to go on\n"
    )


# --- what was once wrong ---


def test_a_folder_of_somebody_else_is_not_taken_for_rounds(base, tmp_path):
    (tmp_path / "out.rounds").mkdir()
    mine = tmp_path / "out.rounds" / "mine.txt"
    mine.write_text("mine")
    with pytest.raises(RecordError, match="holds something else; move it"):
        run(base, tmp_path)
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"key": {}, "file": "x", "records": []}'])
def test_damaged_rounds_are_said_to_be(base, tmp_path, text):
    (tmp_path / "out.rounds").mkdir()
    (tmp_path / "out.rounds" / "run.json").write_text(text)
    with pytest.raises(RecordError, match=r"is damaged|of another run"):
        run(base, tmp_path)


def test_zeros_of_the_base_stay_from_the_first_round_on(base, tmp_path):
    def sparser(network):
        for component in find_components(network):
            weight = weight_of(network, component)
            weight.mul_(share_mask(weight.abs(), 0.4))

    record = run(runs.changed(base, sparser), tmp_path, rounds=4)
    found = [one["sparsity"] for one in record["rounds"]]
    assert found[0] > 0.4
    assert found[-1] == pytest.approx(0.5, abs=0.01)
    zeros = sum(c["n_zero"] for c in record["components"])
    assert zeros / sum(c["n_parameters"] for c in record["components"]) == pytest.approx(
        found[-1], abs=1e-3
    )


def test_lifting_without_steps_lifts_nothing(base, tmp_path):
    settings = Settings(sparsity=0.5, rounds=3, training=Training(steps=0, lifted=True), **TINY)
    rows = np.random.default_rng(1).integers(4, 200, (12, 16))
    record = prune(
        base, of(base), Sequences(rows, "random"), runs.prompts(4), tmp_path / "out", settings
    )
    zeros = sum(c["n_zero"] for c in record["components"])
    n = sum(c["n_parameters"] for c in record["components"])
    assert zeros / n == pytest.approx(record["rounds"][-1]["sparsity"], abs=1e-6)


def test_a_smaller_learning_rate_goes_on(base, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_round(patch, 2)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path)
    record = run(base, tmp_path, learning_rate=1e-4)
    assert [one["learning_rate"] for one in record["rounds"]] == [1e-3, 1e-4]


def test_what_no_round_could_do_is_said_first(base, tmp_path, monkeypatch):
    monkeypatch.setattr("divergent_tokens.pruning.ground.complete", None)
    with pytest.raises(SchemeError, match="nothing else is left"):
        run(base, tmp_path, criterion="magnitude", allocate="uniform-spared")
    with pytest.raises(SchemeError, match="unknown criterion 'snip'"):
        run(base, tmp_path, criterion="snip", allocate="uniform")
    with pytest.raises(DivergentTokensError, match="a learning rate of nan"):
        run(base, tmp_path, learning_rate=float("nan"))
    wrong = PlanFile(runs.plan_for(base).base, {"model.nothing": "int8"}, 1, 2)
    with pytest.raises(SchemeError, match="is no component"):
        run(base, tmp_path, plan=wrong)


def test_a_plan_may_name_the_head(base, tmp_path):
    (head,) = [c.name for c in find_components(base.network, include=["lm_head"])]
    plan = PlanFile(runs.plan_for(base).base, {head: "int8"}, 1, 2)
    assert run(base, tmp_path, rounds=1, steps=0, plan=plan)["plan"]["digest"] == plan.digest


def test_sequences_beyond_the_models_positions_are_refused(tmp_path):
    model = runs.model("gpt2")
    path = tmp_path / "long.txt"
    path.write_text("\n".join(tiny.SENTENCES * 200))
    with pytest.raises(PromptError, match="positions; give a smaller --length"):
        read_sequences(str(path), model, length=5000, n_sequences=8)


@pytest.mark.parametrize("granularity", ["component", "head"])
def test_wandas_levels_count_what_its_rows_lose(base, tmp_path, granularity):
    options = {"criterion": "wanda", "allocate": "kl", "granularity": granularity}
    record = run(base, tmp_path, rounds=1, steps=0, **options)
    assert record["rounds"][-1]["sparsity"] >= 0.5
