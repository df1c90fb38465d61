"""Documents that a model writes itself, so that any model can be measured with no data at all."""

from collections.abc import Iterator

import torch

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.generation import generate
from divergent_tokens.models import Model

BATCH = 16
"""Documents drawn at once; fixed, since what is drawn depends on it."""
MAX_TURN_TOKENS = 256
"""A user's turn that is longer than this is cut here."""
_MARK = "\u2063mark\u2063"


def sample_ids(model: Model, *, n_tokens: int, seed: int) -> Iterator[list[int]]:
    """Endless token ids drawn from the model at temperature 1, up to `n_tokens` with the opening's.

    A model with a chat template writes the user's turn after its template's own opening (as in
    Magpie, Xu et al. 2024, arXiv 2406.08464); another one starts from its first special token.
    A draw that ends early is shorter, and has no end-of-sequence token.
    """
    opening = chat_opening(model) or _start(model)
    ends = set(model.eos_ids) | {model.tokenizer.eos_token_id}
    prompt = torch.tensor([opening] * BATCH, device=model.device)
    while True:
        rows = generate(
            model.network,
            prompt,
            new_tokens=max(1, n_tokens - len(opening)),
            eos_ids=sorted(end for end in ends if end is not None),
            sample=True,
            seed=seed,
        )
        seed += 1
        for row in rows:
            yield opening + [token for token in row if token not in ends]


def sample_turns(model: Model, *, seed: int) -> Iterator[str]:
    """Endless user's turns, as text, of a model with a chat template."""
    opening = chat_opening(model)
    if opening is None:
        raise PromptError(f"{model.reference} has no chat template; leave out --chat")
    for ids in sample_ids(model, n_tokens=len(opening) + MAX_TURN_TOKENS, seed=seed):
        yield str(model.tokenizer.decode(ids[len(opening) :], skip_special_tokens=True)).strip()


def chat_opening(model: Model) -> list[int] | None:
    """What the model's chat template puts before a user's first word; None without a template."""
    if not model.tokenizer.chat_template:
        return None
    text = model.tokenizer.apply_chat_template([{"role": "user", "content": _MARK}], tokenize=False)
    before = str(text).partition(_MARK)[0]
    return list(model.tokenizer(before, add_special_tokens=False)["input_ids"]) or None


def _start(model: Model) -> list[int]:
    tokenizer = model.tokenizer
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id, *model.eos_ids):
        if token is not None:
            return [int(token)]
    raise PromptError(f"{model.reference} has no token to start a text from; use another --prompts")
