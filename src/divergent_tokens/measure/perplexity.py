"""Perplexity of given text, the two ways that people mean by it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from divergent_tokens.errors import ModelError, PromptError
from divergent_tokens.measure.batches import BatchSize, first_batch_size, in_batches, run_batches
from divergent_tokens.measure.head import Head
from divergent_tokens.measure.intervals import estimate_ratio
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.scores import chunk_tokens
from divergent_tokens.measure.segments import walk, walks
from divergent_tokens.models import Model

WINDOW = 512
"""Tokens a window, as in llama-perplexity; fewer where the model has fewer positions."""


@dataclass(frozen=True)
class Perplexity:
    """Nats of a text under a model, window by window."""

    nats: NDArray[np.float64]
    """−log q of each token given those before it in its window. [window, token − 1]"""
    context: int
    """Tokens at a window's start that the context-aware perplexity does not count."""

    def to_json(self, *, level: float, seed: int) -> dict[str, Any]:
        """Both perplexities as ESTIMATEs; here the window is the unit that is resampled."""
        ways = {
            "conventional": self.nats,
            "context_aware": self.nats[:, max(self.context - 1, 0) :],
        }
        return {
            way: estimate_ratio(
                nats.sum(1),
                np.full(len(nats), nats.shape[1]),
                unit="perplexity",
                level=level,
                seed=seed,
            ).to_json()
            for way, nats in ways.items()
        } | {"window": self.nats.shape[1] + 1, "n_windows": len(self.nats), "context": self.context}


def read_text(path: str) -> str:
    """A whole UTF-8 text; PromptError where it is not there, or something else."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise PromptError(f"the text file {path} does not exist; check the path") from error
    except (UnicodeDecodeError, OSError) as error:
        raise PromptError(f"{path} is not a UTF-8 text file that can be read: {error}") from error
    if not text.strip():
        raise PromptError(f"the text file {path} is empty; perplexity needs a text")
    return text


@torch.no_grad()
def perplexity(
    model: Model,
    head: Head,
    text: str,
    *,
    window: int = WINDOW,
    context: int = 64,
    batch_size: int | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    name: str = "perplexity",
    progress: Progress = silent,
) -> Perplexity:
    """Perplexity over non-overlapping windows of the text; what is left at its end is not read.

    Conventional: every token of a window but its first. Context-aware: only the tokens after the
    first `context` of each window. No special token is put at a window's start. The tokens are the
    model's own, or those of the `tokenizer` given (a comparison gives the base's, so that all
    candidates read the same).
    Raises PromptError for a text shorter than one window.
    """
    window = min(window, model.max_positions or window)
    encode = tokenizer or model.tokenizer
    ids: list[int] = encode(text, add_special_tokens=False, verbose=False)["input_ids"]
    n_windows = len(ids) // window
    if n_windows == 0:
        raise PromptError(
            f"the text has {len(ids)} tokens; perplexity needs one window of {window} at least"
        )
    context = min(context, window // 2)
    windows = torch.tensor(ids[: n_windows * window]).view(n_windows, window)
    size = BatchSize(batch_size) if batch_size else first_batch_size(model.device)
    nats = np.zeros((n_windows, window - 1))
    for batch, values in _batches(head, windows, size, model.device):
        nats[list(batch)] = values.cpu().numpy()
        progress(name, batch[-1] + 1, n_windows, "windows")
    if not np.isfinite(nats).all():
        raise ModelError(f"{model.reference} gives NaN or infinite log-probabilities on the text")
    return Perplexity(nats, context)


def _batches(
    head: Head, windows: Tensor, size: BatchSize, device: torch.device
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Windows with their nats; where weights wait elsewhere, layer after layer for all of them."""
    rows = range(len(windows))
    if walks(head, windows[:1].to(device)):
        batches = in_batches(rows, size)
        ids = [windows[list(batch)].to(device) for batch in batches]
        for batch, own, hidden in zip(batches, ids, walk(head, ids, size), strict=True):
            yield batch, _nats(head, own, hidden)
        return

    def run(batch: Sequence[int]) -> Tensor:
        ids = windows[list(batch)].to(device)
        return _nats(head, ids, head.hidden(ids))

    yield from run_batches(rows, size, run)


def _nats(head: Head, ids: Tensor, states: Tensor) -> Tensor:
    hidden = states[:, :-1].flatten(0, 1)
    targets = ids[:, 1:].flatten()
    n = chunk_tokens(head, hidden)
    nats = [
        torch.nn.functional.cross_entropy(
            head.logits(hidden[a : a + n]), targets[a : a + n], reduction="none"
        )
        for a in range(0, len(hidden), n)
    ]
    return torch.cat(nats).view(len(ids), -1).double()
