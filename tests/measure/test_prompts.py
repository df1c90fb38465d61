import hashlib
import json

import numpy as np
import pytest

import runs
import tiny
from divergent_tokens.errors import PromptError
from divergent_tokens.measure import prompts as prompts_module
from divergent_tokens.measure.prompts import Prompt, PromptSet, read_prompts
from divergent_tokens.models import Model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def chat_model() -> Model:
    tokenizer = tiny.tokenizer.__wrapped__()
    tokenizer.chat_template = TEMPLATE
    base = runs.model()
    return Model(base.network, tokenizer, "chat", base.fingerprint)


@pytest.fixture
def source(tmp_path):
    """Documents of 1 to 9 words, each word one token or more."""
    path = tmp_path / "a.txt"
    path.write_text("".join(f"{' '.join(['the'] * n)} {n}\n" for n in range(1, 10)))
    return str(path)


def test_a_prompt_is_the_beginning_of_a_document(source):
    model = runs.model()
    found = read_prompts(source, model, n_prompts=100, prefix=4)
    whole = [model.tokenizer(f"{' '.join(['the'] * n)} {n}")["input_ids"] for n in range(1, 10)]
    assert [p.ids for p in found.prompts] == [tuple(ids[:4]) for ids in whole if len(ids) >= 4]
    assert found.left_out == sum(len(ids) < 4 for ids in whole) > 0
    assert found.prompts[0].text == model.tokenizer.decode(found.prompts[0].ids)
    assert (found.source, found.prefix, found.skipped) == (source, 4, 0)


def test_special_tokens_count(source):
    tokenizer = tiny.tokenizer.__wrapped__()
    tokenizer.add_bos_token = True
    tokenizer.update_post_processor()
    model = Model(runs.model().network, tokenizer, "m", "f")
    if tokenizer("the")["input_ids"][0] != tokenizer.bos_token_id:
        pytest.skip("this transformers adds no special token here")
    assert {p.ids[0] for p in read_prompts(source, model, prefix=4).prompts} == {0}


def test_skipped_prompts_are_the_first_that_fit(source):
    model = runs.model()
    all_of_them = read_prompts(source, model, prefix=4)
    held_out = read_prompts(source, model, prefix=4, skip=2, n_prompts=3)
    assert held_out.prompts == all_of_them.prompts[2:5]
    assert held_out.skipped == 2
    assert held_out.left_out == all_of_them.left_out
    with pytest.raises(PromptError, match=r"has \d documents that fit, and 50 are to be skipped"):
        read_prompts(source, model, prefix=4, skip=50)


def test_none_long_enough(source):
    with pytest.raises(PromptError, match=r"has 40 tokens or more \(left out: 9\)"):
        read_prompts(source, runs.model(), prefix=40)


@pytest.mark.parametrize("wrong", [{"n_prompts": 0}, {"prefix": 0}, {"skip": -1}])
def test_numbers_that_make_no_sense(source, wrong):
    with pytest.raises(PromptError, match="expected at least 1, 1 and 0"):
        read_prompts(source, runs.model(), **wrong)


@pytest.mark.parametrize("source", ["builtin", "self"])
@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_a_prefix_beyond_the_models_positions(source, architecture):
    for prefix in (256, 10_000):
        with pytest.raises(
            PromptError, match=f"a prefix of {prefix} tokens leaves no room in the 256"
        ):
            read_prompts(source, runs.model(architecture), prefix=prefix)


def test_domains_and_languages_come_along():
    found = read_prompts("builtin", runs.model(), n_prompts=40, prefix=8)
    assert len({p.domain for p in found.prompts}) > 4
    assert len({p.language for p in found.prompts}) > 4


def test_the_digest_is_over_the_ids_in_order():
    a, b = Prompt((1, 2), "one"), Prompt((1, 3), "two")
    assert a.digest == Prompt((1, 2), "other text", "d").digest != b.digest
    assert a.digest == hashlib.sha256(np.array([1, 2], "<i4").tobytes()).hexdigest()
    digests = {PromptSet(p, "s", 2, 0, 0).digest for p in [(a, b), (b, a), (a,), (a, a)]}
    assert len(digests) == 4


def test_chat_prompts_are_whole_rendered_turns(source):
    model = chat_model()
    found = read_prompts(source, model, chat=True, prefix=3)
    assert found.prefix is None
    assert len(found) == 9
    assert found.prompts[0].text == "<s>user: the 1</s>assistant:"
    ids = model.tokenizer("<s>user: the 1</s>assistant:", add_special_tokens=False)["input_ids"]
    assert found.prompts[0].ids == tuple(ids)
    assert ids[0] == model.tokenizer.bos_token_id  # once


def test_chat_prompts_of_several_turns(tmp_path):
    path = tmp_path / "a.jsonl"
    turns = [
        {"role": r, "content": c} for r, c in [("user", "a"), ("assistant", "b"), ("user", "c")]
    ]
    path.write_text(json.dumps({"messages": turns}))
    found = read_prompts(str(path), chat_model(), chat=True)
    assert found.prompts[0].text == "<s>user: a</s>assistant: b</s>user: c</s>assistant:"


def test_a_template_that_refuses_its_turns_is_one_message(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "tool", "content": "a"}]}))
    with pytest.raises(PromptError, match=r"chat template of chat refuses.*tool.*no tools here"):
        read_prompts(str(path), chat_model(), chat=True)


def test_chat_turns_longer_than_the_models_positions_are_left_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("the " * 300 + "\nshort\n")
    found = read_prompts(str(path), chat_model(), chat=True)
    assert (len(found), found.left_out) == (1, 1)
    path.write_text("the " * 300)
    with pytest.raises(PromptError, match="fits the model's positions"):
        read_prompts(str(path), chat_model(), chat=True)


@pytest.mark.parametrize("source", ["self", "builtin"])
def test_chat_without_a_template(source):
    with pytest.raises(PromptError, match="no chat template; leave out --chat"):
        read_prompts(source, runs.model(), chat=True)


@pytest.mark.parametrize("chat", [False, True])
def test_self_needs_no_data_and_depends_on_its_seed(chat):
    model = chat_model() if chat else runs.model()

    def draw(**options):
        return read_prompts("self", model, prefix=8, chat=chat, **{"n_prompts": 5, **options})

    found = draw()
    assert len(found) == 5
    assert found.source == "self"
    if not chat:
        assert {len(p.ids) for p in found.prompts} == {8}
    assert draw() == found
    assert draw(seed=1).digest != found.digest
    assert draw(n_prompts=3, skip=2).prompts == found.prompts[2:]


def test_self_prompts_are_kept_in_the_cache(tmp_path, monkeypatch):
    model = runs.model()
    found = read_prompts("self", model, n_prompts=4, prefix=8, cache=tmp_path)
    monkeypatch.setattr(prompts_module, "sample_documents", None)  # nothing is drawn again
    assert read_prompts("self", model, n_prompts=4, prefix=8, cache=tmp_path) == found
    with pytest.raises(TypeError):
        read_prompts("self", model, n_prompts=4, prefix=9, cache=tmp_path)


def test_self_gives_up_on_a_model_that_only_writes_short_texts():
    model = runs.with_ends(runs.model(), range(256))
    with pytest.raises(PromptError, match="no document of self has 8 tokens or more"):
        read_prompts("self", model, n_prompts=2, prefix=8)
