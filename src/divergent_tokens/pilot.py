"""A small trial of a base and its candidates: how many prompts, which prefix, how many new tokens.

A run for each prefix, all on the beginnings of the same documents. Fewer new tokens need none: the
completions are cut, since greedy ones of fewer tokens are the beginnings of longer ones.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from divergent_tokens.errors import PromptError
from divergent_tokens.measure.comparison import compare, versions
from divergent_tokens.measure.completions import check_positions
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import Prompt, PromptSet, read_prompts
from divergent_tokens.measure.trials import Cell, judge
from divergent_tokens.measure.widths import Width
from divergent_tokens.models import Model

SCHEMA = "divergent-tokens/pilot/1"
LEAST_PROMPTS = 8
"""Of fewer, a variance says next to nothing."""
ALL = 10**9


@dataclass(frozen=True)
class Pilot:
    """What `pilot` found; `to_json` is the content of pilot.json."""

    base: Model
    prompts: PromptSet
    """At the longest prefix."""
    ignore_eos: bool
    widths: tuple[Width, ...]
    cells: tuple[Cell, ...]
    level: float
    seed: int
    available: int | None = None
    """Prompts that the source has, where that is known."""
    comparing: tuple[str, ...] = ()
    """The command line of the comparison to run next, without its three numbers."""
    command: tuple[str, ...] = ()

    @property
    def recommended(self) -> Cell | None:
        """The cheapest cell that nothing spoils; of spoiled ones, the one that is least so.

        None where no cell's number of prompts is known.
        """
        known = [cell for cell in self.cells if cell.forward_tokens is not None]

        def badness(cell: Cell) -> tuple[int, float]:
            assert cell.forward_tokens is not None
            return len(cell.spoiled_by), cell.forward_tokens["all"]

        return min(known, key=badness, default=None)

    def to_json(self) -> dict[str, Any]:
        """Plain values in the form of the JSON Schema that comes with the package."""
        return {
            "schema": SCHEMA,
            "versions": versions(),
            "command": list(self.command),
            "seed": self.seed,
            "level": self.level,
            "base": {
                "reference": self.base.reference,
                "fingerprint": self.base.fingerprint,
                "dtype": self.base.dtype_name,
                "device": str(self.base.device),
            },
            "trial": {
                "source": self.prompts.source,
                "digest": self.prompts.digest,
                "n_prompts": len(self.prompts),
                "left_out": self.prompts.left_out,
                "skipped": self.prompts.skipped,
                "wanted": self.prompts.wanted,
                "available": self.available,
                "prefix": self.prompts.prefix,
                "ignore_eos": self.ignore_eos,
            },
            "widths": [width.to_json() for width in self.widths],
            "cells": [cell.to_json() for cell in self.cells],
            "recommended": self._recommended_json(),
        }

    def _recommended_json(self) -> dict[str, Any] | None:
        cell = self.recommended
        if cell is None:
            return None
        numbers = {"--n-prompts": cell.n_prompts, "--prefix": cell.prefix}
        numbers["--new-tokens"] = cell.new_tokens
        given = [(name, str(number)) for name, number in numbers.items() if number is not None]
        return {
            "prefix": cell.prefix,
            "new_tokens": cell.new_tokens,
            "n_prompts": cell.n_prompts,
            "command": [*self.comparing, *itertools.chain(*given)],
        }


def pilot(
    base: Model,
    candidates: Mapping[str, AbstractContextManager[Model]],
    prompts: PromptSet,
    widths: Sequence[Width],
    *,
    prefixes: Sequence[int] = (),
    new_tokens: Sequence[int] = (32, 64, 128),
    ignore_eos: bool = False,
    available: int | None = None,
    level: float = 0.95,
    seed: int = 0,
    batch_size: int | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
    comparing: Sequence[str] = (),
    command: Sequence[str] = (),
) -> Pilot:
    """How many prompts each prefix and number of new tokens needs, by a run for each prefix.

    `prompts` have the longest prefix (or are whole chat turns, with no `prefixes`); shorter ones
    are their beginnings. The candidates are entered once a prefix. Raises PromptError for a trial
    too small to say how prompts differ, before anything runs.
    """
    _check_trial(prompts)
    longest = max(new_tokens)
    check_positions(base, prompts, longest)
    cells: list[Cell] = []
    places: list[int | None] = [*sorted(set(prefixes))] or [None]
    for prefix in places:
        shorter = prompts if prefix is None else beginnings(prompts, prefix, base)
        found = compare(
            base,
            candidates,
            shorter,
            new_tokens=longest,
            ignore_eos=ignore_eos,
            level=level,
            seed=seed,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
        )
        cells += [judge(found, n, widths) for n in sorted(set(new_tokens))]
    return Pilot(
        base=base,
        prompts=prompts,
        ignore_eos=ignore_eos,
        widths=tuple(widths),
        cells=tuple(cells),
        level=level,
        seed=seed,
        available=available,
        comparing=tuple(comparing),
        command=tuple(command),
    )


def beginnings(prompts: PromptSet, prefix: int, model: Model) -> PromptSet:
    """The same prompts with the first `prefix` tokens of each."""

    def shorter(prompt: Prompt) -> Prompt:
        ids = prompt.ids[:prefix]
        return dataclasses.replace(prompt, ids=ids, text=str(model.tokenizer.decode(list(ids))))

    return dataclasses.replace(prompts, prompts=tuple(map(shorter, prompts.prompts)), prefix=prefix)


def available(source: str, model: Model, *, skip: int = 0, **reading: Any) -> int | None:
    """How many prompts a source has, where that is quickly known: of the built-in one."""
    if source != "builtin":
        return None
    return len(read_prompts(source, model, n_prompts=ALL, skip=skip, **reading))


def _check_trial(prompts: PromptSet) -> None:
    n = len(prompts)
    if n >= LEAST_PROMPTS:
        return
    found = f"the trial has {n} prompt{'' if n == 1 else 's'}"
    if prompts.wanted and prompts.prefix is None:
        found += f", all that {prompts.source} has"
    elif prompts.wanted:
        found += (
            f", all that {prompts.source} has ({prompts.left_out} documents are too short for a "
            f"prefix of {prompts.prefix})"
        )
    raise PromptError(
        f"{found}; how much prompts differ can be told from {LEAST_PROMPTS} or more, and roughly "
        "from 32. "
        + (
            f"Use {'' if prompts.prefix is None else 'a smaller --prefix or '}another --prompts"
            if prompts.wanted
            else "Use more --n-prompts"
        )
    )
