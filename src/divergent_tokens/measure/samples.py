"""Documents that a model writes itself, so that any model can be measured with no data at all."""

from collections.abc import Iterator

import numpy as np
import torch

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.documents import Document
from divergent_tokens.measure.generation import generate
from divergent_tokens.models import Model

BATCH = {"cpu": 16, "cuda": 128}
"""Documents drawn at once, by kind of device; fixed, since what is drawn depends on both."""
_MARK = "\u2063mark\u2063"


def sample_documents(model: Model, *, n_tokens: int, n_draws: int, seed: int) -> Iterator[Document]:
    """Documents drawn from the model at temperature 1, of `n_tokens` at most; no empty ones.

    A model with a chat template writes a user's turn after its template's own opening (as in
    Magpie, Xu et al. 2024, arXiv 2406.08464); another one starts from its first special token.
    The document is the text without either. Raises PromptError where nothing can start it.
    """
    opening = chat_opening(model) or _start(model)
    ends = {*model.eos_ids, model.tokenizer.eos_token_id} - {None}
    room = (model.max_positions or len(opening) + n_tokens) - len(opening)
    n_rows = BATCH.get(model.device.type, BATCH["cpu"])
    prompt = torch.tensor([opening] * n_rows, device=model.device)
    for batch in range(-(-n_draws // n_rows)):
        rows = generate(
            model.network,
            prompt,
            new_tokens=min(n_tokens, room),
            eos_ids=sorted(ends),
            sample=True,
            # Not seed + batch: the second batch of one seed would be the first of the next.
            seed=int(np.random.SeedSequence([seed, batch]).generate_state(1)[0]),
        )
        for row in rows:
            text = str(model.tokenizer.decode(row, skip_special_tokens=True)).strip()
            if text:
                yield Document(text)


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
