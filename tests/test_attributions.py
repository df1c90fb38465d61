"""Shares of a cut's cost against slow loops and what it really costs; corrections in whole runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import runs
from divergent_tokens import attributions
from divergent_tokens.attributions import DOUBT, LEAST, MOST, costs_of, scales
from divergent_tokens.compress.components import component_view, find_components, weight_of
from divergent_tokens.compress.prune import share_mask
from divergent_tokens.errors import SchemeError
from divergent_tokens.layers import decoder_layers
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.models import load_model
from divergent_tokens.pruning import run as run_module
from divergent_tokens.pruning.prune import prune
from divergent_tokens.pruning.settings import Settings
from divergent_tokens.recover import Training

SEQUENCES = Sequences(np.random.default_rng(1).integers(4, 200, (12, 16)), "random")
IDS = torch.from_numpy(SEQUENCES.ids[:6])
N_LOOKS = 2


@pytest.fixture
def model():
    """A copy, since it changes on the way and its teacher does not."""
    return runs.changed(runs.model(), lambda network: network)


def of(model, *patterns):
    return find_components(model.network, include=patterns)


def least_of(model, components, share):
    """The smallest weights of each."""
    return [~share_mask(weight_of(model.network, c).float().abs(), share) for c in components]


def kl_of(network, teacher, ids):
    """KL(teacher ‖ network) in nats per predicted token."""
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    logps = network(input_ids=ids, use_cache=False).logits[:, :-1].log_softmax(-1)
    return (wanted.exp() * (wanted - logps)).sum() / ids[:, 1:].numel()


def part_gone(model, components, gone, place):
    """A copy in which this part of what goes is gone."""

    def shrink(network):
        for component, mask in zip(components, gone, strict=True):
            weight = weight_of(network, component)
            weight.copy_(torch.where(mask, weight - place * weight, weight))

    return runs.changed(model, shrink).network


def slow_costs(model, components, gone, teacher, ids):
    """The mean of both ends' slopes, by autograd on the stored parameters."""
    found = np.zeros(len(components))
    for place in (0, 1):
        network = part_gone(model, components, gone, place).requires_grad_(True)
        kl_of(network, teacher.network, ids).backward()
        for i, (component, mask) in enumerate(zip(components, gone, strict=True)):
            gradient = network.get_parameter(component.parameter).grad
            own = component_view(gradient, component) * weight_of(model.network, component)
            found[i] -= float(own[mask].double().sum()) / 2
    return found


def without(model, expert, layer=1):
    """The model with a router that never chooses an expert of a layer."""

    def close(network):
        def never(_module, _inputs, output):
            logits = output[0].clone()
            logits[:, expert] = -1e9
            scores, index = logits.softmax(-1).topk(2)
            return logits, scores / scores.sum(-1, keepdim=True), index

        decoder_layers(network)[1][layer].mlp.gate.register_forward_hook(never)

    return runs.changed(model, close)


# --- costs ---


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3-moe", "gpt-oss"])
def test_costs_are_those_of_the_slow_loop(architecture):
    base = runs.model(architecture)
    moved = runs.noisy(base, 0.1)  # or nothing would be lost at the start of the way
    components = of(moved)
    gone = least_of(moved, components, 0.2)
    expected = slow_costs(moved, components, gone, base, IDS)
    found = costs_of(moved, components, gone, base, IDS)
    seen = np.isfinite(found)
    assert seen.sum() > len(components) / 2
    assert np.all(expected[~seen] == 0)
    scale = float(np.abs(expected).max())
    np.testing.assert_allclose(found[seen], expected[seen], rtol=1e-3, atol=1e-4 * scale)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_costs_add_up_to_what_the_cut_adds(architecture, monkeypatch):
    base = runs.model(architecture)
    moved = runs.noisy(base, 0.1)
    components = of(moved)
    gone = least_of(moved, components, 0.2)
    before, after = (
        float(kl_of(part_gone(moved, components, gone, place), base.network, IDS).detach())
        for place in (0, 1)
    )
    points = [((k + 0.5) / 40, 1 / 40) for k in range(40)]
    monkeypatch.setattr(attributions, "POINTS", points)
    found = costs_of(moved, components, gone, base, IDS).sum()
    assert after - before > 0.02
    assert found == pytest.approx(after - before, rel=0.01)


def test_two_points_are_enough_for_a_small_cut(model):
    components = of(model)
    gone = least_of(model, components, 0.05)
    added = float(kl_of(part_gone(model, components, gone, 1), runs.model().network, IDS).detach())
    found = costs_of(model, components, gone, runs.model(), IDS).sum()
    assert found == pytest.approx(added, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_left_bit_for_bit(dtype):
    model, teacher = (runs.changed(runs.model(), lambda n: n.to(dtype)) for _ in range(2))
    before = [p.detach().clone() for p in model.network.parameters()]
    components = of(model)
    costs_of(model, components, least_of(model, components, 0.5), teacher, IDS[:2])
    for own, parameter in zip(before, model.network.parameters(), strict=True):
        assert torch.equal(own, parameter)


@pytest.mark.parametrize("place", [0.0, 0.3, 1.0])
def test_a_failure_on_the_way_leaves_the_model_bit_for_bit(model, place, monkeypatch):
    components = of(model)
    gone = least_of(model, components, 0.5)
    before = [p.detach().clone() for p in model.network.parameters()]
    met = []

    def failing(model, *_):
        met.extend(weight_of(model.network, c).clone() for c in components)
        raise KeyboardInterrupt

    monkeypatch.setattr(attributions, "sequence_gradients", failing)
    monkeypatch.setattr(attributions, "POINTS", [(place, 1.0)])
    with pytest.raises(KeyboardInterrupt):
        costs_of(model, components, gone, runs.model(), IDS)
    for own, parameter in zip(before, model.network.parameters(), strict=True):
        assert torch.equal(own, parameter)
    for component, mask, weight in zip(components, gone, met, strict=True):
        own = weight_of(model.network, component)
        torch.testing.assert_close(weight[mask], own[mask] * (1 - place))
        assert torch.equal(weight[~mask], own[~mask])


def test_what_stays_whole_costs_nothing_at_all(model):
    components = of(model)
    gone = least_of(model, components, 0.3)
    gone[3] = torch.zeros_like(gone[3])
    found = costs_of(model, components, gone, runs.model(), IDS)
    assert found[3] == 0
    assert (np.delete(found, 3) != 0).all()


def test_costs_are_of_a_token_however_many_there_are(model):
    components = of(model)
    gone = least_of(model, components, 0.3)
    once, thrice = (
        costs_of(model, components, gone, runs.model(), ids)
        for ids in (IDS, torch.cat([IDS, IDS, IDS]))
    )
    np.testing.assert_allclose(once, thrice, rtol=1e-3, atol=1e-5 * np.abs(once).max())


def test_nothing_is_known_of_an_expert_without_tokens():
    model, teacher = (without(runs.model("qwen3-moe"), 2) for _ in range(2))
    components = of(model, "*.layers.1.*")
    found = costs_of(model, components, least_of(model, components, 0.3), teacher, IDS)
    assert any(c.expert == 2 for c in components)
    for component, cost in zip(components, found, strict=True):
        assert np.isnan(cost) == (component.expert == 2), component.name
    assert np.nansum(found) > 0


# --- scales ---


SHARES = st.floats(1e-3, 1e3)
COSTS = st.integers(-(10**6), 10**6).map(lambda n: n / 1e3)


def pairs(costs=SHARES, told=SHARES):
    """Costs and what was told, of the same components."""
    rows = st.lists(st.tuples(costs, told), min_size=1, max_size=12)
    return rows.map(lambda found: tuple(np.array(found).T))


@given(st.lists(SHARES, min_size=1, max_size=12), SHARES)
def test_what_costs_as_it_was_told_is_not_scaled(told, factor):
    np.testing.assert_allclose(scales(np.array(told) * factor, np.array(told)), 1, rtol=1e-9)


@given(pairs(COSTS))
def test_scales_stay_within_their_bounds(pair):
    found = scales(*pair)
    assert (found >= 0.25).all()
    assert (found <= MOST).all()


def test_both_bounds_are_met():
    told = np.full(1000, 1e-6)
    told[0] = 1.0
    costs = np.zeros(1000)
    costs[1] = 1.0
    assert scales(costs, told)[:2].tolist() == [LEAST, MOST]


@given(pairs(COSTS), SHARES, SHARES)
def test_only_shares_count(pair, a, b):
    costs, told = pair
    assume(abs(costs.sum()) > 1e-6 * np.abs(costs).sum())
    np.testing.assert_allclose(scales(a * costs, b * told), scales(costs, told), rtol=1e-6)


@given(pairs(), st.data(), SHARES)
def test_what_costs_more_is_not_scaled_less(pair, data, more):
    costs, told = pair
    i = data.draw(st.integers(0, len(costs) - 1))
    dearer = costs.copy()
    dearer[i] += more
    found, before = scales(dearer, told), scales(costs, told)
    assert found[i] >= before[i] * (1 - 1e-9)
    assert (np.delete(found, i) <= np.delete(before, i) * (1 + 1e-9)).all()


@given(st.lists(COSTS, min_size=2, max_size=12))
def test_of_what_was_told_alike_the_dearer_is_not_scaled_less(costs):
    found = scales(np.array(costs), np.ones(len(costs)))
    assert (np.diff(found[np.argsort(costs, kind="stable")]) >= 0).all()


def test_what_costs_more_than_it_was_told_is_scaled_up_and_the_rest_down():
    found = scales(np.array([3.0, 1.0]), np.array([2.0, 2.0]))
    doubt = DOUBT / 2
    expected = [(0.75 + doubt) / (0.5 + doubt), (0.25 + doubt) / (0.5 + doubt)]
    np.testing.assert_allclose(found, expected)


@given(pairs(), st.data())
def test_an_expert_that_saw_nothing_is_not_scaled_and_changes_no_other(pair, data):
    costs, told = pair
    unseen = np.array(data.draw(st.lists(st.booleans(), min_size=len(costs), max_size=len(costs))))
    found = scales(np.where(unseen, np.nan, costs), told)
    assert (found[unseen] == 1).all()
    np.testing.assert_allclose(found[~unseen], scales(costs[~unseen], told[~unseen]))


@given(pairs(COSTS, COSTS))
def test_where_nothing_is_seen_nothing_is_scaled(pair):
    costs, told = pair
    nothing, something = -np.abs(costs), np.abs(told) + 1
    for found in (
        scales(nothing, something),
        scales(something, nothing),
        scales(0 * costs, something),
        scales(something, 0 * costs),
        scales(np.nan * costs, something),
    ):
        assert (found == 1).all()


@given(pairs())
def test_without_doubt_it_is_the_ratio_of_the_shares(pair):
    costs, told = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributions, "DOUBT", 0)
        found = scales(costs, told)
    ratio = (costs / costs.sum()) / (told / told.sum())
    np.testing.assert_allclose(found, ratio.clip(0.25, MOST), rtol=1e-9)


def test_where_nothing_is_seen_a_scale_stays():
    before = np.array([4.0, 0.5, 9.0])
    told = np.array([1.0, 1.0, 1.0])
    assert scales(np.zeros(3), told, before).tolist() == before.tolist()
    assert scales(np.array([1.0, 1.0, np.nan]), told, before)[2] == 9.0
    np.testing.assert_allclose(scales(told, told, before)[:2], scales(told, told / before)[:2])


# --- corrections ---


def run(base, out, *, corrections, rounds=2, steps=0, lifted=False, repair=False, plan=None):
    training = Training(steps=steps, batch_size=4, micro_batch=4, learning_rate=1e-3, lifted=lifted)
    settings = Settings(
        sparsity=0.5,
        rounds=rounds,
        corrections=corrections,
        n_saliency=8,
        repair=repair,
        new_tokens=6,
        training=training,
    )
    components = find_components(base.network)
    return prune(base, components, SEQUENCES, runs.prompts(3), out, settings, plan=plan)


def n_zeros(record):
    return sum(component["n_zero"] for component in record["components"])


@pytest.fixture
def watched(monkeypatch):
    """What is cut by which saliencies, and what is asked of costs, which are drawn at random."""
    seen = SimpleNamespace(cuts=[], looks=[])
    own_cut = run_module.cut
    rng = np.random.default_rng(0)

    def cut(found, *arguments, before, **options):
        values = [value.clone() for value in found.values]
        new = own_cut(found, *arguments, before=before, **options)
        seen.cuts.append((values, before, new))
        return new

    def costs(model, components, gone, teacher, ids, **_):
        drawn = rng.exponential(size=len(components)) ** 2
        seen.looks.append((model, list(gone), teacher, ids, drawn))
        return drawn

    monkeypatch.setattr(run_module, "cut", cut)
    monkeypatch.setattr(run_module, "costs_of", costs)
    return seen


def by_round(found, n):
    return [found[a : a + n] for a in range(0, len(found), n)]


def test_corrections_take_as_many_weights_as_without(tmp_path):
    base = runs.model()
    records = [run(base, tmp_path / str(n), corrections=n) for n in (0, N_LOOKS)]
    assert n_zeros(records[0]) == n_zeros(records[1])
    for plain, corrected in zip(*(record["rounds"] for record in records), strict=True):
        assert plain["sparsity"] == corrected["sparsity"]
        assert plain["sparsities"] != corrected["sparsities"]
        assert plain["corrected_from"] == []
        assert len(corrected["corrected_from"]) == N_LOOKS
        assert all(cost > 0 for cost in corrected["corrected_from"])
    assert records[1]["settings"]["corrections"] == N_LOOKS


def test_the_base_and_what_stays_are_as_they_were(tmp_path):
    base = runs.changed(runs.model(), lambda network: network)
    own = [p.detach().clone() for p in base.network.parameters()]
    run(base, tmp_path / "out", corrections=N_LOOKS)
    for before, after in zip(own, base.network.parameters(), strict=True):
        assert torch.equal(before, after)
    loaded = load_model(tmp_path / "out", device="cpu")
    for component in find_components(base.network):
        weight = weight_of(loaded.network, component)
        assert torch.equal(weight[weight != 0], weight_of(base.network, component)[weight != 0])


def test_a_matrix_that_was_told_too_little_of_is_spared(tmp_path, monkeypatch):
    base = runs.model()
    i = 4
    name = find_components(base.network)[i].name
    own = run_module.find_saliencies

    def understating(*arguments, **options):
        found = own(*arguments, **options)
        found.values[i].mul_(0.02)
        return found

    monkeypatch.setattr(run_module, "find_saliencies", understating)
    plain, corrected = (run(base, tmp_path / str(n), corrections=n, rounds=1) for n in (0, N_LOOKS))
    found = [record["rounds"][-1]["sparsities"][name] for record in (plain, corrected)]
    assert found[1] < found[0] - 0.1
    assert corrected["rounds"][0]["after"]["kl"] < plain["rounds"][0]["after"]["kl"]


def test_a_matrix_whose_part_of_the_cut_costs_much_is_spared(tmp_path, monkeypatch):
    base = runs.model()
    names = [component.name for component in find_components(base.network)]

    def costs(_model, components, *_, **__):
        return np.array([100.0 if c.name == names[2] else 1.0 for c in components])

    monkeypatch.setattr(run_module, "costs_of", costs)
    plain, corrected = (run(base, tmp_path / str(n), corrections=n) for n in (0, 1))
    found = [record["rounds"][-1]["sparsities"][names[2]] for record in (plain, corrected)]
    assert found[1] < found[0] - 0.1


def test_what_was_gone_stays_gone_and_is_not_asked_for_again(tmp_path, watched):
    run(runs.model(), tmp_path / "out", corrections=N_LOOKS)
    rounds = by_round(watched.cuts, N_LOOKS + 1)
    looks = by_round(watched.looks, N_LOOKS)
    assert len(rounds) == len(looks) == 2
    last = rounds[0][-1][2]
    for _, before, new in rounds[1]:
        assert before is last
        assert not any((mask & ~old).any() for mask, old in zip(new.masks, last.masks, strict=True))
    for cuts, asked in zip(rounds, looks, strict=True):
        for (_, before, new), (_, gone, *_) in zip(cuts, asked, strict=False):
            for i, mask in enumerate(gone):
                there = torch.ones_like(mask) if before is None else before.masks[i]
                assert torch.equal(mask, there & ~new.masks[i])


def test_saliencies_are_scaled_whole_at_first_and_halfway_then(tmp_path, watched):
    """By what the cuts cost over what the saliencies told before they were scaled."""
    record = run(runs.model(), tmp_path / "out", corrections=3)
    looks = by_round(watched.looks, 3)
    for cuts, asked, one in zip(by_round(watched.cuts, 4), looks, record["rounds"], strict=True):
        plain = cuts[0][0]
        scale = np.ones(len(plain))
        for look, (_, gone, _, _, costs) in enumerate(asked):
            told = [float(value[mask].sum()) for value, mask in zip(plain, gone, strict=True)]
            wanted = scales(costs, np.array(told))
            scale = wanted if look == 0 else np.sqrt(scale * wanted)
            for value, factor, own in zip(cuts[look + 1][0], scale, plain, strict=True):
                torch.testing.assert_close(value, own * float(factor), rtol=1e-4, atol=0)
        assert one["corrected_from"] == pytest.approx([float(costs.sum()) for *_, costs in asked])


def test_looks_are_at_other_sequences_and_from_the_base(tmp_path, watched, monkeypatch):
    monkeypatch.setattr(run_module, "N_SEQUENCES", 5)
    base = runs.model()
    run(base, tmp_path / "out", corrections=N_LOOKS)
    drawn = []
    for model, _, teacher, ids, _ in watched.looks:
        assert teacher is base
        assert model.network is not base.network
        rows = {tuple(row) for row in ids.tolist()}
        assert len(rows) == len(ids) == 5
        assert rows <= {tuple(row) for row in SEQUENCES.ids.tolist()}
        drawn.append(frozenset(rows))
    assert len(set(drawn)) == 2 * N_LOOKS


def test_training_between_corrected_rounds_keeps_the_zeros(tmp_path):
    record = run(runs.model(), tmp_path / "out", corrections=1, steps=2)
    total = sum(component["n_parameters"] for component in record["components"])
    assert n_zeros(record) == round(0.5 * total)


def test_experts_without_tokens_do_not_spoil_what_a_cut_costs(tmp_path):
    model = without(runs.model("qwen3-moe"), 2)
    (one,) = run(model, tmp_path / "out", corrections=N_LOOKS, rounds=1)["rounds"]
    assert len(one["unseen"]) == 3
    assert len(one["corrected_from"]) == N_LOOKS
    assert np.isfinite(one["corrected_from"]).all()
    assert one["sparsity"] == pytest.approx(0.5, abs=1e-4)


def test_corrections_that_could_not_act_are_refused():
    for n in (-1, 21):
        with pytest.raises(
            SchemeError, match=rf"{n} corrections were asked for .* expected 0 to 20"
        ):
            Settings(sparsity=0.5, corrections=n)
    assert Settings(sparsity=0.5, corrections=20).corrections == 20
    with pytest.raises(SchemeError, match=r"--correct scales .* and --allocate kl does not"):
        Settings(sparsity=0.5, corrections=1, allocate="kl")
    with pytest.raises(SchemeError, match=r"--correct scales .* and a pattern does not"):
        Settings(sparsity=0.5, corrections=1, pattern=(2, 4), rounds=1)
    assert Settings(sparsity=0.5, corrections=1).corrections == 1
    with pytest.raises(SchemeError, match="leave --correct out, or have one threshold"):
        Settings(sparsity=0.5, corrections=1, criterion="wanda", allocate="uniform")


def test_one_matrix_has_nothing_to_be_compared_with(tmp_path):
    base = runs.model()
    one = of(base)[:1]
    settings = Settings(sparsity=0.5, rounds=1, corrections=1, training=Training(steps=0))
    with pytest.raises(SchemeError, match=f"--correct compares matrices, and {one[0].name}"):
        prune(base, one, SEQUENCES, runs.prompts(3), tmp_path / "out", settings)


@pytest.mark.parametrize(("lifted", "repair"), [(False, False), (True, False), (False, True)])
def test_a_corrected_run_that_was_stopped_goes_on_to_the_same_weights(
    tmp_path, monkeypatch, lifted, repair
):
    base = runs.model()
    options = {"corrections": N_LOOKS, "rounds": 3, "steps": 2, "lifted": lifted, "repair": repair}
    whole = run(base, tmp_path / "whole", **options)
    own = run_module.Run.round

    def stop(self, number, target):
        if number == 2:
            raise KeyboardInterrupt
        return own(self, number, target)

    with monkeypatch.context() as patch:
        patch.setattr(run_module.Run, "round", stop)
        with pytest.raises(KeyboardInterrupt):
            run(base, tmp_path / "parts", **options)
    parts = run(base, tmp_path / "parts", **options)
    assert parts["rounds"] == whole["rounds"]
    pair = [load_model(tmp_path / name, device="cpu").network for name in ("whole", "parts")]
    for one, other in zip(*(network.parameters() for network in pair), strict=True):
        assert torch.equal(one, other)


def test_under_a_plan_a_model_has_moved_from_the_first_round_on(tmp_path, monkeypatch):
    base = runs.changed(runs.model(), lambda network: network)
    own = [p.detach().clone() for p in base.network.parameters()]
    asked = []

    def costs(*arguments, moved, **options):
        asked.append(moved)
        return costs_of(*arguments, moved=moved, **options)

    monkeypatch.setattr(run_module, "costs_of", costs)
    planned = run(base, tmp_path / "planned", corrections=1, plan=runs.plan_for(base))
    run(base, tmp_path / "plain", corrections=1)
    assert asked == [True, True, False, True]
    assert [len(one["corrected_from"]) for one in planned["rounds"]] == [1, 1]
    for before, after in zip(own, base.network.parameters(), strict=True):
        assert torch.equal(before, after)


def test_without_a_move_the_way_starts_without_a_slope(model):
    base = runs.model()
    components = of(model)
    gone = least_of(model, components, 0.3)
    whole = costs_of(model, components, gone, base, IDS)
    np.testing.assert_allclose(
        costs_of(model, components, gone, base, IDS, moved=False), whole, atol=1e-7 * whole.max()
    )
