"""The base's side of every measurement of a pruning."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.components import Component, component_view, find_components
from divergent_tokens.compress.plan import Plan
from divergent_tokens.compress.units import Unit
from divergent_tokens.measure.batches import BatchSize, first_batch_size
from divergent_tokens.measure.comparison import divergence_of
from divergent_tokens.measure.completions import Completions, complete
from divergent_tokens.measure.head import Head, find_head
from divergent_tokens.measure.layer_runs import LayerRuns
from divergent_tokens.measure.metrics import Divergence
from divergent_tokens.measure.perplexity import perplexity
from divergent_tokens.measure.progress import Progress
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.measure.scores import BaseLogits, score, score_hidden
from divergent_tokens.measure.states import States, base_states
from divergent_tokens.models import Model
from divergent_tokens.pruning.settings import Settings
from divergent_tokens.saliencies import LEVELS


@dataclass(frozen=True)
class Ground:
    """The base's side of every measurement."""

    base: Model
    plan: Plan | None
    """What every measurement is under."""
    every: tuple[Component, ...]
    """What a plan may name: embeddings and head too."""
    head: Head
    completions: Completions
    states: States
    text: str | None
    base_ppl: float | None
    batch_size: int

    @classmethod
    def of(
        cls,
        base: Model,
        plan: Plan | None,
        prompts: PromptSet,
        settings: Settings,
        text: str | None,
        batch_size: int | None,
        cache: Path | None,
        progress: Progress,
    ) -> "Ground":
        """The base's completions and states on the prompts, and its perplexity on the text."""
        completions = complete(
            base,
            prompts,
            new_tokens=settings.new_tokens,
            batch_size=batch_size,
            cache=cache,
            progress=progress,
        )
        size = BatchSize(batch_size) if batch_size else first_batch_size(base.device)
        head = find_head(base.network)
        states = base_states(
            base, head, completions, batch_size=size, cache=cache, progress=progress
        )
        every = () if plan is None else find_components(base.network, include=["*"])
        found = cls(base, plan, every, head, completions, states, text, None, states.batch_size)
        return replace(found, base_ppl=found.perplexity(base, head))

    def served(self, model: Model) -> AbstractContextManager[Model]:
        """The model under the plan, for a while."""
        return (
            nullcontext(model)
            if self.plan is None
            else lent_plan(model, self.plan, components=self.every)
        )

    def divergence(self, model: Model) -> Divergence:
        """From the base, a row a prompt."""
        head = find_head(model.network)
        scores = score(model, head, self.completions, self.head, self.states)
        return divergence_of(scores, self.completions)

    def perplexity(self, model: Model, head: Head) -> float | None:
        """Conventional, on the text; None without one."""
        if self.text is None:
            return None
        found = perplexity(model, head, self.text, batch_size=self.batch_size)
        return float(np.exp(found.nats.mean()))

    def metrics(self, model: Model) -> dict[str, float | None]:
        """FDT, SDT, KL and PPL of the model under the plan."""
        with self.served(model) as own:
            found = self.divergence(own)
            ppl = self.perplexity(own, find_head(own.network))
        assert found.kl is not None
        n_tokens = int(found.n_tokens.sum())
        return {
            "fdt": float(found.fdt.mean()),
            "sdt": float(found.n_divergent.sum() / n_tokens),
            "kl": float(found.kl.sum() / n_tokens),
            "ppl": ppl,
        }

    def fdt_by_level(
        self,
        model: Model,
        units: Sequence[Unit],
        find_levels: Callable[[Unit], Tensor],
        progress: Progress,
    ) -> NDArray[np.float64]:
        """FDT with one unit cut, everything else as it is now. [unit, level]

        `find_levels`: the number of the level at which each weight of a unit goes.
        """
        runs = LayerRuns(
            model, find_head(model.network), self.completions, batch_size=self.batch_size
        )
        base = BaseLogits(self.head, self.states)
        found = np.zeros((len(units), len(LEVELS)))
        order = sorted(range(len(units)), key=lambda i: units[i].component.layer or 0)
        for done, i in enumerate(order):
            component, levels = units[i].component, find_levels(units[i])
            layer = component.layer
            assert layer is not None
            runs.go_to(layer)
            parameter = model.network.get_parameter(component.parameter)
            own = parameter.data
            for j in range(len(LEVELS)):
                parameter.data = own.clone()
                units[i].of(component_view(parameter.data, component)).mul_(levels > j)
                try:
                    scores = score_hidden(
                        runs.hidden(layer), model, find_head(model.network), self.completions, base
                    )
                finally:
                    parameter.data = own
                found[i, j] = divergence_of(scores, self.completions).fdt.mean()
            progress("levels", done + 1, len(order), "units")
        return found
