import gc
import shutil
import weakref

import pytest
import torch
import transformers

import runs
import tiny
from divergent_tokens import candidates
from divergent_tokens.candidates import (
    joined,
    model_candidates,
    plan_candidates,
    scheme_candidates,
)
from divergent_tokens.compress.plan_file import PlanFile, write_plan
from divergent_tokens.errors import DivergentTokensError, ModelError, RecordError, SchemeError
from divergent_tokens.measure.comparison import compare
from divergent_tokens.measure.prompts import read_prompts
from divergent_tokens.models import load_model


@pytest.fixture(scope="module")
def base():
    return runs.changed(runs.model(), lambda network: None, "base")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "one"
    base.network.save_pretrained(folder)
    base.tokenizer.save_pretrained(folder)
    return folder


def weights(model):
    return {name: tensor.clone() for name, tensor in model.network.state_dict().items()}


def differing(before, model):
    return {n for n, t in model.network.state_dict().items() if not torch.equal(t, before[n])}


def test_a_scheme_is_lent_under_its_canonical_name_and_comes_back(base):
    before = weights(base)
    found = scheme_candidates(base, "int4:g8", " int8 ")
    assert list(found) == ["int4:g8", "int8"]
    for name, candidate in found.items():
        assert not differing(before, base)
        with candidate as model:
            assert model.network is base.network
            assert name in model.reference
            changed = differing(before, base)
            assert len(changed) == 14
            assert not {n for n in changed if "lm_head" in n or "embed" in n or "norm" in n}
    assert not differing(before, base)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_weights_come_back_after_an_exception_and_an_interrupt(error, base):
    before, within = weights(base), []

    def fail():
        within.extend(differing(before, base))
        raise error

    with pytest.raises(error), scheme_candidates(base, "int2")["int2"]:
        fail()
    assert within
    assert not differing(before, base)


def test_only_what_matches_is_touched(base):
    before = weights(base)
    patterns = {"include": ["*.mlp.*"], "exclude": ["re:layers.0"]}
    with scheme_candidates(base, "int4:g8", **patterns)["int4:g8"]:
        assert differing(before, base) == {
            f"model.layers.1.mlp.{part}_proj.weight" for part in ("gate", "up", "down")
        }


@pytest.mark.parametrize(
    ("schemes", "message"),
    [
        (["int8", "imt4"], "unknown scheme 'imt4'; did you mean 'int4'"),
        (["int8", "int4:g64"], "groups of 64 do not divide the 32 input columns"),
    ],
)
def test_a_bad_scheme_is_refused_before_any_is_lent(schemes, message, base):
    with pytest.raises(SchemeError, match=message):
        scheme_candidates(base, *schemes)


def test_patterns_that_match_nothing_are_refused(base):
    with pytest.raises(ModelError, match="nothing"):
        scheme_candidates(base, "int8", include=["nothing"])


def test_one_candidate_a_name(base, folder):
    with pytest.raises(DivergentTokensError, match="two candidates are called 'int8'"):
        scheme_candidates(base, "int8", "int4:g8", " int8")
    with pytest.raises(DivergentTokensError, match=r"two candidates are called '.*one'"):
        model_candidates(str(folder), str(folder))
    one = scheme_candidates(base, "int8")
    with pytest.raises(DivergentTokensError, match="two candidates are called 'int8'"):
        joined(one, scheme_candidates(base, "int4:g8"), one)
    assert list(joined(one, scheme_candidates(base, "int4:g8"))) == ["int8", "int4:g8"]
    assert joined() == {}


def write(path, base, components, fingerprint=None):
    identity = {"reference": "base", "model_type": "llama", "config": {}}
    identity["fingerprint"] = fingerprint or base.fingerprint
    write_plan(path, PlanFile(identity, components, 1, 2))
    return path


def test_a_plan_is_lent_under_its_files_name(base, tmp_path):
    before, names = weights(base), [f"model.layers.{i}.mlp.up_proj" for i in (0, 1)]
    path = write(tmp_path / "plan.json", base, dict(zip(names, ("int4:g8", "int8"), strict=True)))
    found = plan_candidates(base, path)
    assert list(found) == [str(path)]
    for _ in range(2):
        with found[str(path)] as model:
            assert model.network is base.network
            assert differing(before, base) == {f"{name}.weight" for name in names}
        assert not differing(before, base)


def test_a_plan_that_is_not_for_this_base_is_refused_by_its_file(base, tmp_path):
    gone = {"model.layers.7.mlp.up_proj": "int8"}
    path = write(tmp_path / "plan.json", base, gone)
    with pytest.raises(SchemeError, match=r"plan\.json: the plan names 'model\.layers\.7\.mlp"):
        plan_candidates(base, path)
    write(path, base, {"model.layers.0.mlp.up_proj": "int4:g64"})
    with pytest.raises(SchemeError, match=r"plan\.json: int4:g64: groups of 64 do not divide"):
        plan_candidates(base, path)
    write(path, base, {}, fingerprint="0" * 64)
    with pytest.raises(RecordError, match=r"plan\.json was made for base \(fingerprint 0000"):
        plan_candidates(base, path)
    with pytest.raises(DivergentTokensError, match=r"two candidates are called '.*plan\.json'"):
        plan_candidates(base, path, path)


def test_a_checkpoint_is_loaded_at_its_turn_and_let_go_of(folder, monkeypatch):
    loaded = []
    load = candidates.load_model

    def watched(reference, **settings):
        model = load(reference, **settings)
        loaded.append(weakref.ref(model.network))
        return model

    monkeypatch.setattr(candidates, "load_model", watched)
    found = model_candidates(str(folder), dtype="bfloat16")
    assert not loaded
    with found[str(folder)] as model:
        assert model.dtype == torch.bfloat16
        assert len(loaded) == 1
    del model
    gc.collect()
    assert loaded[0]() is None


def test_what_is_not_there_or_not_whole_is_refused_at_once(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "load_model", None)
    model_candidates(str(folder))
    with pytest.raises(ModelError, match="does not exist"):
        model_candidates(str(folder), str(tmp_path / "gone"))
    copy = shutil.copytree(folder, tmp_path / "copy")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(ModelError, match="truncated"):
        model_candidates(str(copy))
    weights.rename(copy / "pytorch_model.bin")
    with pytest.raises(ModelError, match="--allow-pickle"):
        model_candidates(str(copy))
    model_candidates(str(copy), allow_pickle=True)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        model_candidates(str(copy), allow_pickle=True)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(ModelError, match="truncated or corrupt"):
        model_candidates(str(tmp_path / "cut.gguf"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning:bitsandbytes")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_bitsandbytes_checkpoint_is_a_candidate_as_it_is(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[bnb]'")
    config = tiny.CONFIGS["llama"]()
    # On a CPU it takes multiples of 64 only.
    config.hidden_size, config.intermediate_size = 64, 128
    config.num_key_value_heads, config.head_dim = 4, 16
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    packed = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=settings, dtype=torch.float32
    )
    packed.save_pretrained(tmp_path / "packed")
    for name in ("dense", "packed"):
        tiny.tokenizer().save_pretrained(tmp_path / name)
    base = load_model(tmp_path / "dense")
    found = compare(
        base,
        model_candidates(str(tmp_path / "packed"), dtype=base.dtype),
        read_prompts("builtin", base, n_prompts=3, prefix=8),
        new_tokens=6,
    )
    assert 0 < found.candidates[0].metrics.kl.value < 0.1
