"""A pruning under way: look what matters, cut, train what is left, measure."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from divergent_tokens.allocation import MEASURED, Cut, cut, spared
from divergent_tokens.attributions import N_SEQUENCES, costs_of, scales
from divergent_tokens.compress.calibration import (
    Calibration,
    in_blocks,
    moment_bytes,
    second_moments,
)
from divergent_tokens.compress.components import Component, component_view, weight_of
from divergent_tokens.compress.repair import repair
from divergent_tokens.compress.sparsegpt import prune_by_sparsegpt
from divergent_tokens.compress.units import Unit, find_units
from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.measure.comparison import compare
from divergent_tokens.measure.progress import Progress
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.models import Model
from divergent_tokens.pruning.ground import Ground
from divergent_tokens.pruning.settings import Settings
from divergent_tokens.recover import NotFiniteError, Recovery, hold, mean_kl, schedule
from divergent_tokens.saliencies import Saliencies, find_saliencies, levels_of

TOGETHER_BYTES = 256 * 2**20
"""Of one of the arrays that a repair works on; more are repaired one after the other."""

N_UNSEEN = 16
"""Sequences that tell whether a repair is kept."""


class Run:
    """A pruning under way: the network as it has become, its masks, its training."""

    def __init__(
        self,
        model: Model,
        base: Model,
        components: Sequence[Component],
        sequences: Sequences,
        settings: Settings,
        devices: Sequence[torch.device | str],
        progress: Progress,
        compiled: bool | None = None,
    ) -> None:
        """Nothing is cut yet; the model's network is what changes, the base's never."""
        self.model, self.base, self.components = model, base, components
        self.sequences, self.settings = sequences, settings
        self._units = find_units(model.network, components, settings.granularity)
        if settings.allocate == "uniform-spared":
            spared(self._units, settings.sparsity)
        self.ground: Ground | None = None
        """To be there before the first round."""
        self._progress = progress
        there = Cut(tuple(weight_of(base.network, c) != 0 for c in components))
        self.cut = there if there.sparsity else None
        self.targets = list(schedule(settings.sparsity, settings.rounds, there.sparsity))
        self._unseen: tuple[str, ...] = ()
        self.masks: dict[str, Tensor] = {}
        """Of parameters as they are stored."""
        self.repaired: bool | None = None
        """Whether the last repair was kept; None where none was made."""
        self._seen_costs: list[float] = []
        """KL in nats per token that the last cut was found to cost, before each correction; without
        experts that no token was sent to."""
        self.recovery: Recovery | None = None
        if settings.training.steps:
            self.recovery = Recovery(
                model.network,
                base.network,
                sequences,
                settings.training,
                total_steps=settings.rounds * settings.training.steps,
                seed=settings.seed,
                devices=devices,
                compiles=compiled,
            )

    @property
    def _ground(self) -> Ground:
        assert self.ground is not None
        return self.ground

    def round(self, number: int, target: float) -> dict[str, Any]:
        """Cut, train, measure."""
        steps = self.settings.training.steps
        if self.settings.training.lifted and number and steps > 1:
            self.cut = None
            self._train(number, steps // 2, {}, "masks lifted")
            steps -= steps // 2
        self._cut_to(target, number)
        assert self.cut is not None
        before = self._ground.metrics(self.model)
        loss = self._train(number, steps, self.masks, _in_words(self.cut.sparsity, before))
        after = before if self.recovery is None else self._ground.metrics(self.model)
        return {
            "round": number + 1,
            "target": target,
            "sparsity": self.cut.sparsity,
            "loss": loss,
            "compiled": self.recovery is not None and self.recovery.compiles,
            "learning_rate": None if loss is None else self.settings.training.learning_rate,
            "before": before,
            "after": after,
            "unseen": list(self._unseen),
            "repaired": self.repaired,
            "corrected_from": self._seen_costs,
            "sparsities": {
                c.name: share for c, share in zip(self.components, self.cut.sparsities, strict=True)
            },
        }

    def _train(self, number: int, steps: int, masks: dict[str, Tensor], what: str) -> float | None:
        """The mean loss; None without training."""
        if self.recovery is None:
            return None
        name = f"round {number + 1} of {len(self.targets)}, {what}"
        try:
            return self.recovery.run(steps, masks, name=name, progress=self._progress)
        except NotFiniteError as error:
            kept = "what was kept of the rounds before is kept still: " if number else ""
            raise DivergentTokensError(
                f"round {number + 1}: {error}; {kept}run again with a smaller --lr"
            ) from error

    def _cut_to(self, target: float, number: int) -> None:
        with self._ground.served(self.model) as model:
            self.cut = self._found_cut(model, target, number)
        if self.settings.criterion == "sparsegpt":
            self.cut = self._by_sparsegpt(self.cut.sparsities, number)
        self.set_masks()
        if self.settings.repair:
            self._repair(number)
        hold(self.model.network, self.masks)

    def _found_cut(self, model: Model, target: float, number: int) -> Cut:
        """Of the model as it is measured: what a plan makes zero goes first."""
        settings = self.settings
        moved = number > 0
        self._progress(f"saliency, round {number + 1}", 0, 1, "")
        found = find_saliencies(
            model,
            self.components,
            settings.saliency,
            self.sequences,
            n_sequences=settings.n_saliency,
            units=self._units,
            by_rows=settings.by_rows,
            with_harm=settings.allocate == "kl" and settings.pattern is None,
            teacher=self.base if moved else None,
            seed=settings.seed * 1000 + number,
        )
        self._progress(f"saliency, round {number + 1}", 1, 1, "")
        self._unseen = found.unseen
        fdt = None
        if settings.allocate in MEASURED and settings.pattern is None:

            def levels(unit: Unit) -> Tensor:
                return levels_of(unit.of(found.values[unit.owner]), settings.by_rows)

            fdt = self._ground.fdt_by_level(model, self._units, levels, self._progress)
        new = cut(
            found,
            settings.allocate,
            target,
            by_rows=settings.by_rows and settings.criterion != "sparsegpt",  # takes shares of all
            pattern=settings.pattern,
            before=self.cut,
            fdt=fdt,
        )
        return self._corrected(model, found, new, target, number)

    @torch.no_grad()
    def _corrected(
        self, model: Model, found: Saliencies, new: Cut, target: float, number: int
    ) -> Cut:
        """Looked at as a whole, so often as is asked; the saliencies are scaled on the way."""
        scale = np.ones(len(self.components))
        self._seen_costs = []
        for look in range(self.settings.corrections):
            gone = [~mask for mask in new.masks]
            if self.cut is not None:
                gone = [own & old for own, old in zip(gone, self.cut.masks, strict=True)]
            told = [float(v[own].sum()) for v, own in zip(found.values, gone, strict=True)]
            rng = np.random.default_rng([self.settings.seed, number, look])
            rows = rng.permutation(len(self.sequences.ids))[:N_SEQUENCES]
            ids = torch.from_numpy(self.sequences.ids[rows])
            costs = costs_of(
                model,
                self.components,
                gone,
                self.base,
                ids,
                moved=number > 0 or self._ground.plan is not None,
                progress=self._progress,
            )
            self._seen_costs.append(float(np.nansum(costs)))
            step = scales(costs, np.array(told), scale) / scale
            if look:  # halfway, or what is spared now would be the first to go next
                step **= 0.5
            scale *= step
            for value, factor in zip(found.values, step, strict=True):
                value.mul_(float(factor))
            new = cut(found, self.settings.allocate, target, before=self.cut)
            name = f"corrections, round {number + 1}"
            self._progress(name, look + 1, self.settings.corrections, "")
        return new

    @torch.no_grad()
    def _by_sparsegpt(self, shares: Sequence[float], number: int) -> Cut:
        """Matrices cut at their shares and repaired, in place; what was zero stays zero."""
        network, pattern = self.model.network, self.settings.pattern
        moments = second_moments(network, self.components, self._calibration(number))
        found = [
            prune_by_sparsegpt(weight_of(network, c), moment, pattern or share, keep_zeros=True)
            for share, (c, moment) in zip(shares, moments, strict=True)
        ]
        self._write(found)
        return Cut(tuple(weight != 0 for weight in found))

    def _order(self, number: int) -> NDArray[np.int64]:
        """Of sequences: the first are seen in this round."""
        rng = np.random.default_rng([self.settings.seed, number])
        return rng.permutation(len(self.sequences.ids))

    def _calibration(self, number: int) -> Calibration:
        rows = self._order(number)[: self.settings.n_saliency]
        return Calibration(
            tuple(tuple(self.sequences.ids[row].tolist()) for row in rows), self.sequences.source
        )

    @torch.no_grad()
    def _repair(self, number: int) -> None:
        """Matrices of one shape together: a GPU is quicker with few large products."""
        assert self.cut is not None
        network, calibration = self.model.network, self._calibration(number)
        masks = dict(zip(self.components, self.cut.masks, strict=True))
        found: dict[Component, Tensor] = {}
        for block in in_blocks(self.components, moment_bytes):
            moments = dict(second_moments(network, block, calibration))
            for alike in _alike(network, block):
                weights = torch.stack([weight_of(network, c) for c in alike])
                repaired = repair(
                    weights,
                    torch.stack([masks[c] for c in alike]),
                    torch.stack([moments[c] for c in alike]),
                )
                found.update(zip(alike, repaired, strict=True))
        self._write_if_closer([found[component] for component in self.components], number)

    def _write_if_closer(self, weights: Sequence[Tensor], number: int) -> None:
        """Now and then what fits the inputs that were seen moves the model away on others."""
        hold(self.model.network, self.masks)
        cut_only = self._kl_on_unseen(number)
        self._swap(weights)
        self.repaired = self._kl_on_unseen(number) <= cut_only
        if not self.repaired:
            self._swap(weights)

    def _swap(self, weights: Sequence[Tensor]) -> None:
        for component, other in zip(self.components, weights, strict=True):
            own = weight_of(self.model.network, component)
            before = own.clone()
            own.copy_(other)
            other.copy_(before)

    def _kl_on_unseen(self, number: int) -> float:
        """KL(base ‖ model) in nats per token, on sequences that were not seen, if there are any."""
        order = self._order(number)
        seen = self.settings.n_saliency if len(order) > self.settings.n_saliency else 0
        rows = order[seen:][:N_UNSEEN]
        total = 0.0
        with self._ground.served(self.model) as model:
            for row in rows:
                ids = torch.from_numpy(self.sequences.ids[row])[None].to(model.device)
                logits, wanted = (
                    network(input_ids=ids, use_cache=False).logits
                    for network in (model.network, self.base.network)
                )
                total += float(mean_kl(logits, wanted))
        return total / len(rows)

    def _write(self, weights: Sequence[Tensor]) -> None:
        """All at the end: how many moments have room at once must not decide what they see."""
        for component, weight in zip(self.components, weights, strict=True):
            weight_of(self.model.network, component).copy_(weight)

    def set_masks(self) -> None:
        """Masks of the parameters, as they are stored, from those of the cut."""
        assert self.cut is not None
        self.masks = {}
        for component, mask in zip(self.components, self.cut.masks, strict=True):
            parameter = self.model.network.get_parameter(component.parameter)
            if component.parameter not in self.masks:
                self.masks[component.parameter] = torch.ones_like(parameter, dtype=torch.bool)
            component_view(self.masks[component.parameter], component).copy_(mask)

    def components_json(self) -> list[dict[str, Any]]:
        """Each component, and the share of it that is zero."""
        return [
            {
                "name": c.name,
                "kind": c.kind,
                "layer": c.layer,
                "n_parameters": c.n_parameters,
                "n_zero": int((weight_of(self.model.network, c) == 0).sum()),
            }
            for c in self.components
        ]

    def final_metrics(
        self, prompts: PromptSet, text: str | None, batch_size: int | None, cache: Path | None
    ) -> dict[str, Any]:
        """With intervals: as served, and where a plan is kept without it too."""
        self.model.network.requires_grad_(False)
        candidates: dict[str, AbstractContextManager[Model]] = {"pruned": _Held(self.model)}
        if self._ground.plan is not None:
            candidates["under the plan"] = self._ground.served(self.model)
        found = compare(
            self.base,
            candidates,
            prompts,
            new_tokens=self.settings.new_tokens,
            text=text,
            batch_size=batch_size,
            seed=self.settings.seed,
            cache=cache,
        )
        dense, *under = [one.metrics.to_json() for one in found.candidates]
        return {"metrics": under[0], "metrics_without_plan": dense} if under else {"metrics": dense}


def _alike(network: PreTrainedModel, block: Sequence[Component]) -> Iterator[list[Component]]:
    """Components of one shape on one device, as many as are to be repaired at once."""
    groups: dict[Any, list[Component]] = defaultdict(list)
    for component in block:
        groups[component.shape, weight_of(network, component).device].append(component)
    for (shape, _), group in groups.items():
        n = max(1, TOGETHER_BYTES // (4 * max(shape) * shape[1]))
        yield from (group[i : i + n] for i in range(0, len(group), n))


def _in_words(sparsity: float, metrics: dict[str, float | None]) -> str:
    """Where a round stands before it is trained, for the progress bar."""
    ppl = metrics["ppl"]
    found = f"sparsity {sparsity:.2f}, FDT {metrics['fdt']:.3g}"
    return found if ppl is None else f"{found}, PPL {ppl:.4g}"


class _Held:
    """A model that is there already, as a candidate."""

    def __init__(self, model: Model) -> None:
        self._model = model

    def __enter__(self) -> Model:
        return self._model

    def __exit__(self, *_: object) -> None:
        return None
