import numpy as np
import pytest
import torch
from scipy.special import log_softmax

import runs
import tiny
from divergent_tokens.errors import ModelError, PromptError
from divergent_tokens.measure import scores
from divergent_tokens.measure.head import find_head
from divergent_tokens.measure.perplexity import perplexity, read_text

TEXT = " ".join(tiny.SENTENCES * 3)


def ids_of(text):
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def slow(network, window, context):
    """Mean nats the obvious way, one window and one token at a time."""
    conventional, context_aware = [], []
    ids = ids_of(TEXT)
    for start in range(0, len(ids) - window + 1, window):
        part = ids[start : start + window]
        q = log_softmax(runs.logits_of(network, part), -1)
        for t in range(1, window):
            conventional.append(-q[t - 1, part[t]])
            if t >= context:
                context_aware.append(conventional[-1])
    return np.exp(np.mean(conventional)), np.exp(np.mean(context_aware))


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize(("window", "context"), [(20, 6), (13, 1)])
def test_both_ways_are_the_slow_loop(architecture, window, context):
    model = runs.model(architecture)
    found = perplexity(model, find_head(model.network), TEXT, window=window, context=context)
    assert found.nats.shape == (len(ids_of(TEXT)) // window, window - 1)
    plain = found.to_json(level=0.95, seed=0)
    conventional, context_aware = slow(model.network, window, context)
    assert plain["conventional"]["value"] == pytest.approx(conventional, rel=1e-4)
    assert plain["context_aware"]["value"] == pytest.approx(context_aware, rel=1e-4)
    for way in ("conventional", "context_aware"):
        assert plain[way]["low"] < plain[way]["value"] < plain[way]["high"]
        assert plain[way]["n_prompts"] == len(found.nats)
    assert (plain["window"], plain["n_windows"]) == (window, len(found.nats))
    assert plain["context"] == context


def test_batches_and_chunks_change_nothing(monkeypatch):
    model = runs.model()
    head = find_head(model.network)
    whole = perplexity(model, head, TEXT, window=16)
    monkeypatch.setitem(scores.CHUNK_BYTES, "cpu", 3 * 4 * model.vocabulary_size)
    for size in (1, 3):
        again = perplexity(model, head, TEXT, window=16, batch_size=size)
        np.testing.assert_allclose(again.nats, whole.nats, rtol=1e-4, atol=1e-5)


def test_running_out_of_memory_loses_nothing():
    error = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    limited = runs.changed(runs.model(), runs.failing_above(2, error))
    found = perplexity(limited, find_head(limited.network), TEXT, window=16)
    whole = perplexity(runs.model(), find_head(runs.model().network), TEXT, window=16)
    np.testing.assert_allclose(found.nats, whole.nats, rtol=1e-4, atol=1e-5)


def test_a_window_is_no_longer_than_the_models_positions():
    text = " ".join(tiny.SENTENCES * 20)
    model = runs.model("gpt2")
    assert perplexity(model, find_head(model.network), text).nats.shape[1] == 255


def test_at_least_half_of_a_window_counts():
    model = runs.model()
    assert perplexity(model, find_head(model.network), TEXT, window=20, context=64).context == 10


def test_progress_and_other_failures():
    model, seen = runs.model(), []
    perplexity(
        model,
        find_head(model.network),
        TEXT,
        window=20,
        batch_size=2,
        progress=lambda *call: seen.append(call),
    )
    n = len(ids_of(TEXT)) // 20
    assert seen[-1] == ("perplexity", n, n, "windows")
    with pytest.raises(PromptError, match="needs one window of 256 at least"):
        perplexity(model, find_head(model.network), "short")

    def plant(network):
        network.model.norm.weight[0] = float("nan")

    broken = runs.changed(model, plant, "broken")
    with torch.no_grad(), pytest.raises(ModelError, match="broken gives NaN"):
        perplexity(broken, find_head(broken.network), TEXT, window=16)


def test_texts_are_read_whole(tmp_path):
    path = tmp_path / "text.md"
    path.write_text("\ufeffone\n\ntwo ", encoding="utf-8")
    assert read_text(str(path)) == "one\n\ntwo "


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "does not exist"), (b"", "is empty"), (b" \n", "is empty"), (b"\xff", "not a UTF-8")],
)
def test_texts_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PromptError, match=message):
        read_text(str(path))
    with pytest.raises(PromptError, match="not a UTF-8 text file"):
        read_text(str(tmp_path))
