"""Pruning in rounds: look what matters, cut, train what is left, measure; each round is kept."""

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from divergent_tokens.allocation import ALLOCATIONS, MEASURED, Allocate, Cut, cut
from divergent_tokens.compress.apply import lent_plan
from divergent_tokens.compress.calibration import Calibration, second_moments
from divergent_tokens.compress.components import Component, component_view, weight_of
from divergent_tokens.compress.donors import Donor
from divergent_tokens.compress.gptq import check_llm_compressor
from divergent_tokens.compress.plan import Plan
from divergent_tokens.compress.plan_file import PlanFile, check_base, write_plan
from divergent_tokens.compress.prune import check_pattern, rows_mask, share_mask
from divergent_tokens.compress.repair import repair
from divergent_tokens.compress.sparsegpt import prune_by_sparsegpt
from divergent_tokens.compress.units import GRANULARITIES, Granularity, Unit, find_units
from divergent_tokens.errors import DivergentTokensError, RecordError, SchemeError
from divergent_tokens.measure.batches import BatchSize, first_batch_size
from divergent_tokens.measure.comparison import compare, divergence_of, versions
from divergent_tokens.measure.completions import Completions, complete
from divergent_tokens.measure.head import Head, find_head
from divergent_tokens.measure.layer_runs import LayerRuns
from divergent_tokens.measure.metrics import Divergence
from divergent_tokens.measure.perplexity import perplexity
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.measure.scores import BaseLogits, score, score_hidden
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.measure.states import States, base_states
from divergent_tokens.models import Model, outline_model
from divergent_tokens.quiet import quietly
from divergent_tokens.recover import NotFiniteError, Recovery, Training, hold, schedule
from divergent_tokens.saliencies import (
    LEVELS,
    Criterion,
    check_components,
    find_saliencies,
)
from divergent_tokens.store import clear_disk_errors, replacing_file, replacing_folder, write_text

SCHEMA = "divergent-tokens/pruning/1"
RECORD = "pruning.json"


@dataclass(frozen=True)
class Settings:
    """What is asked of a pruning; all of it decides the result."""

    sparsity: float
    """The share of all weights of the components that is zero at the end."""
    rounds: int = 10
    criterion: Criterion | Literal["sparsegpt"] = "fisher"
    allocate: Allocate = "global"
    pattern: tuple[int, int] | None = None
    """n of m neighbours stay; the sparsity is 1 − n / m then, and there is one round."""
    n_saliency: int = 64
    """Sequences that saliencies are seen on."""
    granularity: Granularity = "component"
    """What gets a sparsity of its own."""
    repair: bool = False
    """What stays of a matrix makes up for what goes, before it is trained."""
    training: Training = field(default_factory=Training)
    new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise SchemeError for what makes no sense."""
        if not 0 < self.sparsity < 1:
            raise SchemeError(
                f"a sparsity of {self.sparsity} was asked for; expected a share of the weights "
                "above 0 and below 1, such as 0.5"
            )
        if self.rounds < 1:
            raise SchemeError(f"{self.rounds} rounds were asked for; expected 1 at least")
        if self.allocate not in ALLOCATIONS:
            raise SchemeError(
                f"unknown allocation {self.allocate!r}; expected one of {', '.join(ALLOCATIONS)}"
            )
        if self.allocate == "global" and self.criterion == "sparsegpt":
            raise SchemeError(
                "--allocate global has one threshold for all matrices, and sparsegpt cuts each by "
                "itself, at a share that it is given; take --allocate kl, uniform or uniform-spared"
            )
        if self.repair and self.criterion == "sparsegpt":
            raise SchemeError(
                "sparsegpt moves what stays by itself, towards weights that are not there "
                "afterwards; leave --repair out, or take --criterion wanda"
            )
        if self.allocate == "global" and self.criterion != "fisher":
            raise SchemeError(
                f"--allocate global compares weights of different matrices, and {self.criterion} "
                "has another unit in each; take --criterion fisher, or --allocate kl"
            )
        by_levels = ("kl", *MEASURED)
        if self.allocate in by_levels and self.pattern is None and self.sparsity > LEVELS[-1]:
            raise SchemeError(
                f"--allocate {self.allocate} knows no level beyond {LEVELS[-1]}, and a sparsity of "
                f"{self.sparsity} was asked for; take another allocation, or a lower sparsity"
            )
        if self.granularity not in GRANULARITIES:
            raise SchemeError(
                f"unknown granularity {self.granularity!r}; expected one of "
                f"{', '.join(GRANULARITIES)}"
            )
        if self.granularity in ("head", "rows") and self.criterion == "sparsegpt":
            raise SchemeError(
                "sparsegpt cuts a matrix as a whole; leave --granularity out, or take --criterion "
                "wanda with --repair"
            )
        if self.granularity in ("head", "rows") and (
            self.allocate == "global" or self.pattern is not None
        ):
            what = "a pattern" if self.pattern is not None else "--allocate global"
            raise SchemeError(
                f"{what} gives nothing a sparsity of its own; leave --granularity "
                f"{self.granularity} out, or take --allocate kl"
            )
        if self.pattern is not None and self.rounds > 1:
            raise SchemeError("a pattern such as 2:4 is cut at once; give --rounds 1")

    @property
    def saliency(self) -> Criterion:
        """What levels are told by: SparseGPT's are Wanda's, which has no more than its diagonal."""
        return "wanda" if self.criterion == "sparsegpt" else self.criterion

    @property
    def by_rows(self) -> bool:
        """Whether each row loses the same share at a level."""
        return self.saliency == "wanda"

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "pattern": list(self.pattern) if self.pattern else None}


def prune(
    base: Model,
    components: Sequence[Component],
    sequences: Sequences,
    prompts: PromptSet,
    out: Path,
    settings: Settings,
    *,
    plan: PlanFile | None = None,
    text: str | None = None,
    devices: Sequence[torch.device | str] = (),
    batch_size: int | None = None,
    overwrite: bool = False,
    cache: Path | None = None,
    progress: Progress = silent,
    command: Sequence[str] = (),
) -> dict[str, Any]:
    """The record of a pruning, and in the folder `out` the pruned model with that record.

    What matters is seen, and trained, on the sequences; FDT, SDT and KL are against the base on the
    prompts, PPL on the text. With a `plan` for the base all of this is of the pruned model under
    the plan, whose weights are trained as they are without it; a plan.json for what was written
    lies beside it. The base's network is not changed. Rounds are kept beside `out` until it is
    there, so that a pruning that was stopped goes on. `devices` train together (see `Recovery`);
    everything else is done on the first, the base's own.

    Raises RecordError where `out` holds anything, unless it is a pruned model and to be
    overwritten, and where kept rounds are of another run; SchemeError where a criterion or pattern
    does not fit a component or the base is sparser already; DivergentTokensError for a loss that is
    no number: the last good round stays kept.
    """
    out = out.resolve()
    check_folder(out, overwrite=overwrite)
    if Path(base.reference).is_dir() and out == Path(base.reference).resolve():
        raise RecordError(f"{out} is the base itself; write to another folder")
    by_kl = settings.allocate == "kl" and settings.pattern is None
    check_components(base.network, components, settings.criterion, with_harm=by_kl)
    if settings.criterion == "sparsegpt":
        check_llm_compressor("--criterion sparsegpt", "--criterion wanda")
    if settings.pattern is not None:
        check_pattern(*settings.pattern, components)
    stacked = [c.name for c in components if c.stack_index is not None]
    if stacked and (settings.repair or settings.criterion == "sparsegpt"):
        raise SchemeError(
            f"{stacked[0]}, an expert of a fused stack, is not repaired, since its inputs are not "
            "collected; exclude it, or take --criterion wanda or fisher without --repair"
        )
    _check_target(base, components, settings.sparsity)
    served = None if plan is None else _checked(plan, base)
    ground = _Ground.of(base, served, prompts, settings, text, batch_size, cache, progress)
    network = copy.deepcopy(base.network)
    model = replace(base, network=network, reference=f"{base.reference} (pruned)")
    run = _Run(model, base, components, sequences, settings, ground, devices, progress)
    kept = _Rounds(out.with_name(f"{out.name}.rounds"), run.key(prompts, text, plan))
    records = kept.load(run)
    for number, target in enumerate(run.targets):
        if number < len(records):
            continue
        records.append(run.round(number, target))
        kept.save(run, records)
    record = {
        "schema": SCHEMA,
        "versions": versions(),
        "command": list(command),
        "settings": settings.to_json(),
        "base": {
            "reference": base.reference,
            "fingerprint": base.fingerprint,
            "dtype": base.dtype_name,
            "device": str(base.device),
        },
        "data": {
            "source": sequences.source,
            "digest": sequences.digest,
            "n_sequences": len(sequences.ids),
            "length": int(sequences.ids.shape[1]),
        },
        "prompts": {
            "source": prompts.source,
            "digest": prompts.digest,
            "n_prompts": len(prompts),
            "skipped": prompts.skipped,
            "prefix": prompts.prefix,
            "new_tokens": settings.new_tokens,
        },
        "trained_on": [str(device) for device in devices or (base.device,)],
        "base_ppl": ground.base_ppl,
        "plan": None if plan is None else {"digest": plan.digest, "size_bytes": plan.size_bytes},
        "rounds": records,
        "components": run.components_json(),
        **run.final_metrics(prompts, text, batch_size, cache),
    }
    _write(out, model, record, plan)
    kept.clear()
    return record


def check_folder(out: Path, *, overwrite: bool) -> None:
    """RecordError where something would be replaced that this did not write, or nobody asked."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / RECORD).is_file():
        raise RecordError(f"{out} exists and holds no pruned model of ours; name another folder")
    if not overwrite:
        raise RecordError(
            f"{out} holds a pruned model already; give --overwrite to replace it, or name another "
            "folder"
        )


def _check_target(base: Model, components: Sequence[Component], sparsity: float) -> None:
    zeros = sum(int((weight_of(base.network, c) == 0).sum()) for c in components)
    share = zeros / sum(c.n_parameters for c in components)
    if share >= sparsity:
        raise SchemeError(
            f"{share:.1%} of the weights of {base.reference} are zero already; expected a "
            f"--sparsity above that, and {sparsity} was asked for"
        )


def _checked(plan: PlanFile, base: Model) -> Plan:
    """The plan, of which nothing is made from the base's own weights or inputs."""
    check_base(plan, base, "the plan")
    found = plan.plan()
    for name, scheme in found.schemes.items():
        if scheme.is_calibrated or any(isinstance(step, Donor) for step in scheme.steps):
            raise SchemeError(
                f"{name}: {scheme} is made once, for the base's own weights, and pruning changes "
                "them; expected schemes of any weights, such as int8 or int4:g64"
            )
    return found


# --- measuring ---


@dataclass(frozen=True)
class _Ground:
    """The base's side of every measurement."""

    base: Model
    plan: Plan | None
    """What every measurement is under."""
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
    ) -> "_Ground":
        completions = complete(
            base, prompts, new_tokens=settings.new_tokens, cache=cache, progress=progress
        )
        size = BatchSize(batch_size) if batch_size else first_batch_size(base.device)
        head = find_head(base.network)
        states = base_states(
            base, head, completions, batch_size=size, cache=cache, progress=progress
        )
        found = cls(base, plan, head, completions, states, text, None, states.batch_size)
        return replace(found, base_ppl=found.perplexity(base, head))

    def served(self, model: Model) -> AbstractContextManager[Model]:
        """The model under the plan, for a while."""
        return nullcontext(model) if self.plan is None else lent_plan(model, self.plan)

    def divergence(self, model: Model) -> Divergence:
        head = find_head(model.network)
        scores = score(model, head, self.completions, self.head, self.states)
        return divergence_of(scores, self.completions)

    def perplexity(self, model: Model, head: Head) -> float | None:
        if self.text is None:
            return None
        found = perplexity(model, head, self.text, batch_size=self.batch_size)
        return float(np.exp(found.nats.mean()))

    def metrics(self, model: Model) -> dict[str, float | None]:
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
        mask_at: Callable[[int, float], Tensor],
        progress: Progress,
    ) -> NDArray[np.float64]:
        """FDT with one unit cut, everything else as it is now. [unit, level]"""
        runs = LayerRuns(
            model, find_head(model.network), self.completions, batch_size=self.batch_size
        )
        base = BaseLogits(self.head, self.states)
        found = np.zeros((len(units), len(LEVELS)))
        order = sorted(range(len(units)), key=lambda i: units[i].component.layer or 0)
        for done, i in enumerate(order):
            component = units[i].component
            layer = component.layer
            assert layer is not None
            runs.go_to(layer)
            parameter = model.network.get_parameter(component.parameter)
            own = parameter.data
            for j, level in enumerate(LEVELS):
                parameter.data = own.clone()
                units[i].of(component_view(parameter.data, component)).mul_(mask_at(i, level))
                try:
                    scores = score_hidden(
                        runs.hidden(layer), model, find_head(model.network), self.completions, base
                    )
                finally:
                    parameter.data = own
                found[i, j] = divergence_of(scores, self.completions).fdt.mean()
            progress("levels", done + 1, len(order), "units")
        return found


# --- rounds ---


class _Run:
    """A pruning under way: the network as it has become, its masks, its training."""

    def __init__(
        self,
        model: Model,
        base: Model,
        components: Sequence[Component],
        sequences: Sequences,
        settings: Settings,
        ground: _Ground,
        devices: Sequence[torch.device | str],
        progress: Progress,
    ) -> None:
        self.model, self.base, self.components = model, base, components
        self.sequences, self.settings = sequences, settings
        self._units = find_units(model.network, components, settings.granularity)
        self._ground, self._progress = ground, progress
        self.targets = (
            [settings.sparsity]
            if settings.rounds == 1
            else list(schedule(settings.sparsity, settings.rounds))
        )
        self.cut: Cut | None = None
        self._unseen: tuple[str, ...] = ()
        self.masks: dict[str, Tensor] = {}
        """Of parameters as they are stored."""
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
            )

    def key(self, prompts: PromptSet, text: str | None, plan: PlanFile | None) -> dict[str, Any]:
        """Everything that must be the same to go on."""
        return {
            "base": self.base.fingerprint,
            "dtype": self.base.dtype_name,
            "settings": self.settings.to_json(),
            "components": [component.name for component in self.components],
            "data": self.sequences.digest,
            "prompts": prompts.digest,
            "plan": None if plan is None else plan.digest,
            "text": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
        }

    def round(self, number: int, target: float) -> dict[str, Any]:
        """Cut, train, measure."""
        steps = self.settings.training.steps
        if self.settings.training.lifted and self.cut is not None:
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
            "before": before,
            "after": after,
            "unseen": list(self._unseen),
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
            raise DivergentTokensError(
                f"round {number + 1}: {error}; what was kept of the rounds before is kept "
                "still. Give a smaller --lr, or more --rounds"
            ) from error

    def _cut_to(self, target: float, number: int) -> None:
        with self._ground.served(self.model) as model:
            self.cut = self._found_cut(model, target, number)
        if self.settings.criterion == "sparsegpt":
            self.cut = self._by_sparsegpt(self.cut.sparsities, number)
        self._set_masks()
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

            def mask_at(i: int, level: float) -> Tensor:
                unit = self._units[i]
                saliency = unit.of(found.values[unit.owner])
                return (rows_mask if settings.by_rows else share_mask)(saliency, level)

            fdt = self._ground.fdt_by_level(model, self._units, mask_at, self._progress)
        return cut(
            found,
            settings.allocate,
            target,
            by_rows=settings.by_rows and settings.criterion != "sparsegpt",  # takes shares of all
            pattern=settings.pattern,
            before=self.cut,
            fdt=fdt,
        )

    @torch.no_grad()
    def _by_sparsegpt(self, shares: Sequence[float], number: int) -> Cut:
        """Matrices cut at their shares and repaired, in place; what was zero stays zero."""
        network, pattern = self.model.network, self.settings.pattern
        moments = second_moments(network, self.components, self._calibration(number))
        masks = []
        for share, (component, moment) in zip(shares, moments, strict=True):
            weight = weight_of(network, component)
            weight.copy_(prune_by_sparsegpt(weight, moment, pattern or share, keep_zeros=True))
            masks.append(weight != 0)
        return Cut(tuple(masks))

    def _calibration(self, number: int) -> Calibration:
        rng = np.random.default_rng([self.settings.seed, number])
        rows = rng.permutation(len(self.sequences.ids))[: self.settings.n_saliency]
        return Calibration(
            tuple(tuple(self.sequences.ids[row].tolist()) for row in rows), self.sequences.source
        )

    @torch.no_grad()
    def _repair(self, number: int) -> None:
        assert self.cut is not None
        network = self.model.network
        moments = second_moments(network, self.components, self._calibration(number))
        for mask, (component, moment) in zip(self.cut.masks, moments, strict=True):
            weight = weight_of(network, component)
            weight.copy_(repair(weight, mask, moment))

    def _set_masks(self) -> None:
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


class _Rounds:
    """The last finished round, beside the folder that is to come."""

    def __init__(self, folder: Path, key: dict[str, Any]) -> None:
        self._folder, self._key = folder, json.loads(json.dumps(key))

    def load(self, run: _Run) -> list[dict[str, Any]]:
        """Records of the finished rounds, the run set to where they ended."""
        if not (self._folder / "run.json").is_file():
            return []
        kept = json.loads((self._folder / "run.json").read_text(encoding="utf-8"))
        differing = [name for name in self._key if kept["key"].get(name) != self._key[name]]
        if differing:
            raise RecordError(
                f"{self._folder} holds rounds of another run (another {', '.join(differing)}); "
                "delete it, or give another --out"
            )
        tensors = load_file(self._folder / kept["file"])
        network = run.model.network
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                parameter.copy_(tensors[f"weight.{name}"])
        run.cut = Cut(
            tuple(
                tensors[f"mask.{c.name}"].bool().to(weight_of(network, c).device)
                for c in run.components
            )
        )
        run._set_masks()
        if run.recovery is not None:
            of_optimizer = {
                name.removeprefix("optimizer."): tensor
                for name, tensor in tensors.items()
                if name.startswith("optimizer.")
            }
            run.recovery.load_state(of_optimizer)
        found: list[dict[str, Any]] = kept["records"]
        return found

    def save(self, run: _Run, records: list[dict[str, Any]]) -> None:
        """Keep a round; the one before goes when this one is there."""
        assert run.cut is not None
        network = run.model.network
        tensors = {
            f"weight.{name}": parameter.detach().cpu().contiguous().clone()
            for name, parameter in network.named_parameters()
        }
        for component, mask in zip(run.components, run.cut.masks, strict=True):
            tensors[f"mask.{component.name}"] = mask.to("cpu", torch.uint8).contiguous()
        if run.recovery is not None:
            for name, tensor in run.recovery.state().items():
                tensors[f"optimizer.{name}"] = tensor.contiguous().clone()
        file = f"round-{len(records)}.safetensors"
        with clear_disk_errors(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
            with replacing_file(self._folder / file) as path:
                save_file(tensors, path)
            written = {"key": self._key, "file": file, "records": records}
            write_text(self._folder / "run.json", json.dumps(written))
        for old in self._folder.glob("round-*.safetensors"):
            if old.name != file:
                old.unlink()

    def clear(self) -> None:
        """The folder is there: nothing has to go on."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _write(out: Path, model: Model, record: dict[str, Any], plan: PlanFile | None) -> None:
    """Dense safetensors with exact zeros, the tokenizer, the record, and a plan for all that."""
    with clear_disk_errors(out), replacing_folder(out) as folder:
        with quietly():
            model.network.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)
        write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")
        if plan is not None:
            written = outline_model(folder)
            base = {**plan.base, "reference": str(out), "fingerprint": written.fingerprint}
            step = {"step": "prune", "sparsity": record["rounds"][-1]["sparsity"]}
            own = replace(plan, base=base, trail=(*plan.trail, step))
            write_plan(folder / "plan.json", own)
