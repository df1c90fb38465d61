import itertools

import pytest

import runs
import tiny
from divergent_tokens.errors import PromptError
from divergent_tokens.measure.samples import BATCH as BATCHES
from divergent_tokens.measure.samples import chat_opening, sample_documents
from divergent_tokens.models import Model

BATCH = BATCHES["cpu"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }} says: {{ m.content }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant says: {% endif %}"
)


def chat_model(template: str = TEMPLATE) -> Model:
    """The shared network with a tokenizer of its own that has a chat template."""
    tokenizer = tiny.tokenizer.__wrapped__()
    tokenizer.chat_template = template
    base = runs.model()
    return Model(base.network, tokenizer, "chat", base.fingerprint)


def draw(model, *, seed=0, n_tokens=12, n_draws=3):
    return [d.text for d in sample_documents(model, n_tokens=n_tokens, n_draws=n_draws, seed=seed)]


@pytest.mark.parametrize("make", [runs.model, chat_model])
def test_the_same_seed_draws_the_same_and_another_seed_does_not(make):
    model = make()
    first, again, other = draw(model), draw(model), draw(model, seed=1)
    assert first == again
    assert not set(first) & set(other)


def test_batches_of_one_seed_are_not_those_of_the_next():
    """A seed for choosing and the next one for reporting must not share documents."""
    long = draw(runs.model(), n_draws=3 * BATCH)
    assert len(set(long)) > 2.5 * BATCH
    shared = set(long) & set(draw(runs.model(), n_draws=3 * BATCH, seed=1))
    assert all(len(text) < 4 for text in shared)  # where both drew an early end


def test_a_longer_draw_begins_with_the_shorter_one():
    long = draw(runs.model(), n_draws=2 * BATCH)
    assert long[:5] == draw(runs.model(), n_draws=BATCH)[:5]


def test_a_chat_model_writes_a_users_turn():
    model = chat_model()
    opening = chat_opening(model)
    assert model.tokenizer.decode(opening) == "<s>user says: "
    for text in draw(model):
        assert "says" not in text
        assert "</s>" not in text
    assert chat_opening(runs.model()) is None


def test_a_template_without_a_users_turn_in_it_is_not_followed():
    assert chat_opening(chat_model("{{ messages[0].content }}")) is None


def test_draws_stay_within_the_models_positions():
    base = runs.model("gpt2")  # learned positions: one too many is an IndexError
    texts = draw(base, n_tokens=1000, n_draws=1)
    ids = base.tokenizer(texts[0])["input_ids"]
    assert len(ids) > 20


def test_text_ends_with_the_models_own_ends():
    model = runs.with_ends(runs.model(), range(4, 250, 2))
    lengths = [len(model.tokenizer(text)["input_ids"]) for text in draw(model, n_draws=BATCH)]
    assert max(lengths) < 12
    documents = sample_documents(model, n_tokens=12, n_draws=BATCH, seed=0)
    assert all(document.text for document in itertools.islice(documents, BATCH))


def test_a_model_without_any_first_token_is_refused(monkeypatch):
    tokenizer = tiny.tokenizer.__wrapped__()
    tokenizer.bos_token = tokenizer.eos_token = None
    base = runs.changed(runs.model(), lambda network: None)
    base.network.generation_config.eos_token_id = None
    base.network.config.eos_token_id = None
    with pytest.raises(PromptError, match="no token to start"):
        draw(Model(base.network, tokenizer, "m", "f"))
