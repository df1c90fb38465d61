"""Wanda and Fisher as schemes: the masks against those made by hand, kept, and what is refused."""

import numpy as np
import pytest
import torch

import runs
import tiny
from divergent_tokens import calibrated
from divergent_tokens.calibrated import joined, read_calibration, ready_plan, ready_schemes
from divergent_tokens.compress.calibration import Calibration, second_moments
from divergent_tokens.compress.components import find_components, weight_of
from divergent_tokens.compress.kept import Kept
from divergent_tokens.compress.plan import uniform_plan
from divergent_tokens.compress.prune import rows_mask, share_mask
from divergent_tokens.compress.schemes import parse_scheme
from divergent_tokens.errors import PromptError, SchemeError
from divergent_tokens.saliencies import find_saliencies

MLP = ["*.1.mlp.*"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text("\n".join(tiny.SENTENCES * 5))
    return str(path)


def made(text, name, cache, include=MLP):
    """A scheme made ready, the components, and the weights that it makes of each."""
    model = runs.model()
    components = find_components(model.network, include=include)
    (scheme,) = ready_schemes(model, components, [parse_scheme(name)], source=text, cache=cache)
    weights = [weight_of(model.network, c) for c in components]
    found = [scheme.compress(w, c) for w, c in zip(weights, components, strict=True)]
    return scheme, components, weights, found


@pytest.mark.parametrize("name", ["wanda:0.5", "wanda:2:4", "fisher:0.25", "fisher:2:4"])
def test_its_text(name):
    scheme = parse_scheme(name)
    assert str(scheme) == name
    assert (scheme.is_calibrated, scheme.is_ready, scheme.is_packable) == (True, False, False)
    assert not scheme.by_rows
    assert scheme.source is None


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wanda", "'wanda' names no share .* as in 'wanda:0.5'"),
        ("fisher:1", "'fisher:1' names no share .* as in 'fisher:0.5'"),
        ("fisher:4:2", "'4:2' is no pattern"),
        ("int8+wanda:0.5", "takes a step before 'wanda:'.* let 'wanda:' stand first"),
        ("wanda:0.5+fisher:0.5", "let 'fisher:' stand first, and the only one"),
        ("wanda:0.5+gptq:int4", "let 'gptq:' stand alone"),
    ],
)
def test_texts_that_say_too_much_or_too_little(name, said):
    with pytest.raises(SchemeError, match=said):
        parse_scheme(name)


def test_wanda_zeroes_the_least_of_each_row_by_weight_times_input_norm(text, tmp_path):
    _, components, weights, found = made(text, "wanda:0.25", tmp_path)
    model = runs.model()
    seen = []
    module = model.network.get_submodule("model.layers.1.mlp.down_proj")
    hook = module.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0][0]))
    with torch.no_grad():
        for row in read_calibration(text, model).rows:
            model.network(torch.tensor([row]))
    hook.remove()
    norms = torch.cat(seen).norm(dim=0)
    at = [c.kind for c in components].index("down")
    weight, pruned = weights[at], found[at]
    for row, own in zip(weight, pruned, strict=True):
        lowest = sorted(range(48), key=lambda i: float(row[i].abs() * norms[i]))[:12]
        assert sorted((own == 0).nonzero().flatten().tolist()) == sorted(lowest)
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])
    for matrix in found:
        assert ((matrix == 0).sum(1) == round(0.25 * matrix.shape[1])).all()


def test_fisher_zeroes_the_least_of_the_whole_matrix(text, tmp_path):
    _, components, weights, found = made(text, "fisher:0.3", tmp_path)
    model = runs.model()
    sequences = joined(read_calibration(text, model), model)
    values = find_saliencies(model, components, "fisher", sequences).values
    for weight, pruned, value in zip(weights, found, values, strict=True):
        n_gone = round(0.3 * weight.numel())
        assert int((pruned == 0).sum()) == n_gone
        assert float(value[pruned == 0].max()) <= float(value[pruned != 0].min())
        assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


@pytest.mark.parametrize("name", ["wanda:2:4", "fisher:2:4"])
def test_two_of_four_neighbours_stay(name, text, tmp_path):
    _, _, _, found = made(text, name, tmp_path)
    for pruned in found:
        assert ((pruned.reshape(-1, 4) == 0).sum(1) == 2).all()


def test_what_wanda_is_given_differs_from_what_magnitude_and_fisher_choose(text, tmp_path):
    masks = [made(text, name, tmp_path)[3] for name in ("wanda:0.5", "fisher:0.5", "magnitude:0.5")]
    for a, b in ((0, 1), (0, 2), (1, 2)):
        assert any(not torch.equal(x, y) for x, y in zip(masks[a], masks[b], strict=True))


def test_a_chain_rounds_what_stays(text, tmp_path):
    _, _, _, pruned = made(text, "wanda:0.5", tmp_path)
    scheme, components, weights, found = made(text, "wanda:0.5+int4:g8", tmp_path)
    assert scheme.is_packable
    for component, weight, zeros, both in zip(components, weights, pruned, found, strict=True):
        assert (both[zeros == 0] == 0).all()
        rounded = parse_scheme("int4:g8").compress(zeros, component)
        assert torch.equal(both, rounded)
        assert not torch.equal(both, weight)


@pytest.mark.parametrize("name", ["wanda:0.5", "fisher:0.5"])
def test_masks_of_matrices_that_are_stored_transposed(name, text, tmp_path):
    """GPT-2's lie [in, out]; what goes is told by rows of outputs all the same."""
    model = runs.model("gpt2")
    (component,) = find_components(model.network, include=["*.1.mlp.c_proj"])
    calibration = read_calibration(text, model)
    (scheme,) = ready_schemes(model, [component], [parse_scheme(name)], source=text, cache=tmp_path)
    weight = weight_of(model.network, component)
    assert not weight.is_contiguous()
    if name.startswith("wanda"):
        ((_, moment),) = second_moments(model.network, [component], calibration)
        mask = rows_mask(weight.abs() * moment.diagonal().sqrt(), 0.5)
    else:
        sequences = joined(calibration, model)
        mask = share_mask(find_saliencies(model, [component], "fisher", sequences).values[0], 0.5)
    assert torch.equal(scheme.compress(weight, component), weight * mask)


@pytest.mark.parametrize("architecture", ["qwen3-moe", "gpt-oss"])
def test_wanda_of_single_experts(architecture, tmp_path):
    """Each by the tokens that are sent to it; one that none is sent to, by magnitude."""
    text = str(tmp_path / "short.txt")
    (tmp_path / "short.txt").write_text("the\n")
    model = runs.model(architecture)
    components = find_components(model.network, include=["*experts*"])
    moments = dict(second_moments(model.network, components, read_calibration(text, model)))
    (scheme,) = ready_schemes(
        model, components, [parse_scheme("wanda:0.5")], source=text, cache=tmp_path
    )
    differs = 0
    assert not all(moment.any() for moment in moments.values())
    for component in components:
        weight = weight_of(model.network, component)
        moment = moments[component]
        norms = moment.diagonal().sqrt() if moment.any() else torch.ones(weight.shape[1])
        expected = weight * rows_mask(weight.abs() * norms, 0.5)
        assert torch.equal(scheme.compress(weight, component), expected)
        differs += not torch.equal(expected, weight * rows_mask(weight.abs(), 0.5))
    assert differs


def test_masks_are_made_once_and_kept_as_bits(text, tmp_path, monkeypatch):
    first = made(text, "fisher:0.5", tmp_path)
    sizes = [np.load(path).nbytes for path in sorted(tmp_path.rglob("mask.npy"))]
    assert sorted(sizes) == sorted(c.n_parameters // 8 for c in first[1])
    monkeypatch.setattr("divergent_tokens.calibrated.find_saliencies", None)
    second = made(text, "fisher:0.5", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(first[3], second[3], strict=True))
    assert first[0].source == second[0].source


def test_masks_in_several_readings_are_the_same(text, tmp_path, monkeypatch):
    whole = made(text, "fisher:0.5", tmp_path / "a")[3]
    monkeypatch.setattr("divergent_tokens.compress.calibration.ROOM_BYTES", 1)
    apart = made(text, "fisher:0.5", tmp_path / "b")[3]
    assert all(torch.equal(a, b) for a, b in zip(whole, apart, strict=True))


def test_a_plan_is_made_ready_for_its_components(text, tmp_path):
    model = runs.model()
    components = find_components(model.network, include=MLP)
    plan = uniform_plan(components, parse_scheme("wanda:0.5"))
    ready = ready_plan(model, components, plan, source=text, cache=tmp_path)
    assert all(scheme.is_ready for scheme in ready.schemes.values())
    assert ready.digest != plan.digest


def test_several_plans_read_the_text_once_and_make_each_step_once(text, tmp_path, monkeypatch):
    model = runs.model()
    components = find_components(model.network, include=MLP)
    names = ("wanda:0.5", "wanda:0.5+int4:g8", "wanda:2:4", "int8")
    plans = {name: uniform_plan(components, parse_scheme(name)) for name in names}
    readings, written = [], []
    own, write = calibrated.second_moments, Kept.write

    def counting(network, wanted, calibration):
        readings.append(len(wanted))
        return own(network, wanted, calibration)

    def writing(self, step, component, entry):
        written.append((step, component.name))
        write(self, step, component, entry)

    monkeypatch.setattr(calibrated, "second_moments", counting)
    monkeypatch.setattr(Kept, "write", writing)
    found = calibrated.ready_plans(model, components, plans, source=text, cache=tmp_path)
    assert list(found) == list(plans)
    assert found["int8"] is plans["int8"]
    assert all(s.is_ready for plan in found.values() for s in plan.schemes.values())
    assert readings == [len(components)]
    assert sorted(written) == sorted(
        (step, c.name) for step in ("wanda:0.5", "wanda:2:4") for c in components
    )


def test_what_was_not_made_is_asked_for():
    component = find_components(tiny.network("llama"))[0]
    with pytest.raises(SchemeError, match=r"zeros of .*q_proj under wanda:0\.5 were not made"):
        parse_scheme("wanda:0.5").compress(torch.zeros(32, 32), component)


def test_what_the_text_does_not_show_whole_is_refused():
    experts = find_components(tiny.network("qwen3-moe"))
    with pytest.raises(SchemeError, match=r"expert.*exclude it, or take magnitude:0\.5"):
        parse_scheme("fisher:0.5").check(experts)
    with pytest.raises(SchemeError, match="which 5 does not divide"):
        parse_scheme("wanda:2:5").check(find_components(tiny.network("llama")))
    head = find_components(tiny.network("llama"), include=["lm_head"])
    with pytest.raises(SchemeError, match=r"lm_head is looked up or shared"):
        parse_scheme("fisher:0.5").check(head)


def test_texts_are_joined_and_cut_to_equal_length():
    model = runs.model()
    end = model.eos_ids[0]
    found = joined(Calibration(((5, 6, 7), (8, 9)), "two"), model)
    assert found.ids.tolist() == [[5, 6, 7, end, 8, 9, end]]
    long = joined(Calibration((tuple(range(4, 254)),) * 3, "long"), model)
    assert long.ids.shape == (2, 256)
    assert long.ids[0, 249:252].tolist() == [253, end, 4]


def test_a_text_of_less_than_two_tokens_teaches_no_gradient():
    model = runs.with_ends(runs.model(), [])
    with pytest.raises(PromptError, match="one holds 1 tokens, and fisher: needs two"):
        joined(Calibration(((5,),), "one"), model)


def test_wanda_needs_no_more_than_the_diagonal():
    model = runs.model()
    (component,) = find_components(model.network, include=["*.1.mlp.down_proj"])
    rows = Calibration((tuple(range(4, 40)),), "row")
    ((_, moment),) = second_moments(model.network, [component], rows)
    (step,) = parse_scheme("wanda:0.5").steps
    weight = weight_of(model.network, component)
    alone = step.make(weight, moment.diagonal().diag()).arrays["mask"]
    assert torch.equal(step.make(weight, moment).arrays["mask"], alone)
