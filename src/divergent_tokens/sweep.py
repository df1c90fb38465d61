"""A sweep: how much harm every component does under every scheme, kept row by row in a file."""

import dataclasses
import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from divergent_tokens.compiled import can_compile, compiled_layers, compiler_works, compiling_pays
from divergent_tokens.compress.apply import check_waiting, lent_plan
from divergent_tokens.compress.components import Component, weight_of
from divergent_tokens.compress.plan import Plan
from divergent_tokens.compress.schemes import Scheme
from divergent_tokens.errors import DivergentTokensError, ModelError, RecordError
from divergent_tokens.layers import decoder_layers, operations_a_token
from divergent_tokens.measure.batches import BatchSize, first_batch_size
from divergent_tokens.measure.comparison import divergence_of, versions
from divergent_tokens.measure.completions import Completions, complete
from divergent_tokens.measure.head import Head, find_head, kept_head
from divergent_tokens.measure.intervals import pooled
from divergent_tokens.measure.layer_runs import LayerRuns
from divergent_tokens.measure.metrics import Divergence
from divergent_tokens.measure.perplexity import perplexity
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.measure.rounding import lent_rounding
from divergent_tokens.measure.scores import (
    BaseLogits,
    TokenScores,
    room_for_logits,
    score_base,
    score_hidden,
)
from divergent_tokens.measure.states import States, base_states, device_name
from divergent_tokens.models import Model
from divergent_tokens.offload import is_offloaded
from divergent_tokens.probe import kl_of, probe
from divergent_tokens.sensitivities import (
    ComponentRow,
    Method,
    Pair,
    PromptRow,
    Sensitivities,
    Sensitivity,
    SensitivityWriter,
    open_sensitivities,
    read_sensitivities,
    resumed_run,
)
from divergent_tokens.store import content_key

VARIANT_BYTES = 8 * 2**30
"""Where weights are read from elsewhere: hidden states of rows that go through together."""

Todo = list[tuple[Component, Scheme]]
_Row = tuple[Sensitivity, NDArray[Any]]
"""With its KL in nats by prompt."""


def sweep(
    base: Model,
    components: Sequence[Component],
    schemes: Sequence[Scheme],
    prompts: PromptSet,
    out: Path,
    *,
    method: Method = "probe",
    only: Collection[Pair] | None = None,
    n_draws: int = 1,
    new_tokens: int = 128,
    ignore_eos: bool = False,
    by_vllm: bool = False,
    text: str | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    compiled: bool | None = None,
    cache: Path | None = None,
    progress: Progress = silent,
    command: Sequence[str] = (),
) -> Sensitivities:
    """All that the file `out` holds, once every component has its row under every scheme.

    What the file has already is not done again, so that a sweep that was stopped goes on, and
    further schemes, components or the other method add their rows. The file's batch size is used
    rather than `batch_size`. A probe's rows come all at once, at the end; measured ones one by one,
    from the first layer on. With a `text` its perplexity is measured too. `only` narrows the work
    to some pairs; with none of them a measured sweep finds the rounding floor and nothing else.
    Where it pays (on a GPU, for long work) or `compiled` asks for it, layers (the probe: what lies
    between their products) run compiled; never with schemes that quantize inputs, and a file goes
    on as it began.

    Raises RecordError for a file that is not ours or of another run, and SchemeError where a
    scheme does not fit a component, before any work is done.
    """
    if text is not None and method == "probe":
        raise DivergentTokensError(
            "a probe reads no text: perplexity needs the method 'measure'; choose it, or leave the "
            "text out"
        )
    for scheme in schemes:
        scheme.check(components)
    if method == "measure":
        check_waiting(base.network, components)
    run = _run_keys(base, prompts, new_tokens, ignore_eos, seed)
    sources = {str(scheme): scheme.source for scheme in schemes if scheme.source is not None}
    if sources:
        run["sources"] = sources
    run |= {"n_draws": n_draws} if method == "probe" else {"text": _digest(text)}
    resumed = resumed_run(out, run)
    todo = _todo(set() if resumed is None else _done(out, method), components, schemes, only)
    if (
        resumed is not None
        and not todo
        and (method == "probe" or resumed.get("rounding_kl") is not None)
    ):
        return read_sensitivities(out)
    completions = complete(
        base,
        prompts,
        new_tokens=new_tokens,
        ignore_eos=ignore_eos,
        batch_size=batch_size,
        by_vllm=by_vllm,
        cache=cache,
        progress=progress,
    )
    size = BatchSize(batch_size) if batch_size else first_batch_size(base.device)
    if resumed is not None:
        size.value = resumed["batch_size"]
    head = find_head(base.network)
    in_layers = method == "measure" and _compiles(
        base,
        compiled,
        resumed,
        [scheme for _, scheme in todo],
        len(components) * len(schemes),
        completions,
    )
    with compiled_layers(base.network, in_layers):
        states = base_states(
            base,
            head,
            completions,
            batch_size=size,
            compiled=in_layers,
            cache=cache,
            progress=progress,
        )
        own = score_base(base, head, completions, states)
        run |= {
            "completions": content_key(ids=completions.ids.tolist()),
            "batch_size": states.batch_size,
            "command": list(command),
        }
        margins = [row[:n] for row, n in zip(own.margins, completions.lengths, strict=True)]
        with open_sensitivities(
            out, run, list(map(_component_row, components)), _prompt_rows(prompts), margins
        ) as writer:
            if method == "probe":
                _probe(
                    base,
                    todo,
                    completions,
                    writer,
                    n_draws=n_draws,
                    seed=seed,
                    batch_size=batch_size,
                    compiled=compiled,
                    progress=progress,
                )
            else:
                layer_runs = LayerRuns(base, head, completions, batch_size=states.batch_size)
                kept = kept_head(head, states.of(0, base.device)[:1])
                logits = BaseLogits(kept, states, room=room_for_logits(base.device))
                ground = _Ground(base, head, logits, completions, states, layer_runs, text)
                _measure(ground, own, todo, writer, seed=seed, progress=progress)
    return read_sensitivities(out)


def _compiles(
    base: Model,
    asked: bool | None,
    resumed: Mapping[str, Any] | None,
    schemes: Sequence[Scheme],
    n_rows: int,
    completions: Completions,
) -> bool:
    """Whether measured rows run compiled layers: as those of the file do, if it has any.

    `schemes` are those of the rows to come. Hooks that quantize inputs do not reach into what is
    compiled. Of at most `n_rows` rows each runs half of the layers on average.
    """
    quantizes_inputs = any(scheme.activations is not None for scheme in schemes)
    if resumed is not None and resumed.get("compiled") is not None:
        able = can_compile(base.network) and compiler_works(base.device)
        if resumed["compiled"] and (quantizes_inputs or not able):
            why = "schemes that quantize inputs cannot" if quantizes_inputs else "nothing can here"
            raise RecordError(
                f"the rows of this file were measured with compiled layers, and {why}; give "
                "another --out, or begin it with --no-compile"
            )
        return bool(resumed["compiled"])
    if quantizes_inputs:
        return False
    if asked is not None:
        return asked and can_compile(base.network) and compiler_works(base.device)
    n_tokens = int(completions.sequence_lengths.sum())
    return compiling_pays(base.network, n_rows * n_tokens * operations_a_token(base.network) / 2)


# --- all at once ---


def _probe(
    base: Model,
    todo: Todo,
    completions: Completions,
    writer: SensitivityWriter,
    *,
    n_draws: int,
    seed: int,
    batch_size: int | None,
    compiled: bool | None,
    progress: Progress,
) -> None:
    """Rows of the probe in one transaction."""
    started = time.perf_counter()
    components = list(dict.fromkeys(component for component, _ in todo))
    schemes = list(dict.fromkeys(scheme for _, scheme in todo))
    found = probe(
        base,
        components,
        schemes,
        completions,
        n_draws=n_draws,
        seed=seed,
        batch_size=batch_size,
        compiled=compiled,
        progress=progress,
    )
    seconds = (time.perf_counter() - started) / len(todo)
    number = {component.name: i for i, component in enumerate(components)}
    rows = []
    for component, scheme in todo:
        at = number[component.name], schemes.index(scheme)
        draws = found.draws[at]  # [prompt, draw]
        if not np.isfinite(draws).all():
            raise ModelError(
                f"the probe of {component.name} under {scheme} is not finite; run the model in "
                "another --dtype (float16 overflows where bfloat16 does not)"
            )
        kl, error = kl_of(draws, found.lengths)
        row = Sensitivity(
            component=component.name,
            scheme=str(scheme),
            method="probe",
            kl=kl,
            kl_se=error,
            fdt=None,
            sdt=None,
            dppl=None,
            acceptance=None,
            ppl=None,
            weight_error=float(found.weight_errors[at]),
            n_prompts=len(draws),
            size_bytes=scheme.size_bytes(component),
            seconds=seconds,
        )
        rows.append((row, draws))
    writer.add_all(rows)


# --- one by one ---


@dataclass(frozen=True)
class _Ground:
    """What every measured row stands on."""

    base: Model
    head: Head
    """Of the base's network as it is at any moment."""
    base_logits: BaseLogits
    """The base's own, also while its weights are lent."""
    completions: Completions
    states: States
    layer_runs: LayerRuns
    text: str | None

    def divergence(self, layer: int | None) -> Divergence:
        """Of the network as it is now, which is the base's before this layer; None: nowhere."""
        scores = score_hidden(
            self.layer_runs.hidden(layer),
            self.base,
            self.head,
            self.completions,
            self.base_logits,
        )
        return divergence_of(scores, self.completions)

    def perplexity(self) -> float | None:
        """Of the network as it is now on the text, conventional."""
        if self.text is None:
            return None
        found = perplexity(self.base, self.head, self.text, batch_size=self.states.batch_size)
        return float(np.exp(found.nats.mean()))

    def row(self, component: Component, scheme: Scheme) -> _Row:
        """The measured row of a component under a scheme, and its KL in nats by prompt."""
        errors: dict[Pair, float | None] = {}
        with self._lent(component, scheme, errors), _naming(component, scheme):
            found = self.divergence(component.layer)
            ppl = self.perplexity()
        return _row(component, scheme, found, ppl, errors.get((component.name, str(scheme))))

    def rows(self, layer: int, todo: Todo) -> Iterator[_Row]:
        """Rows of several pairs of one layer: the layers' weights are read once for all of them."""
        errors: dict[Pair, float | None] = {}
        lent = [partial(self._lent, component, scheme, errors) for component, scheme in todo]
        for (component, scheme), batches in zip(
            todo, self.layer_runs.hidden_of_each(layer, lent), strict=True
        ):
            with _naming(component, scheme):
                scores = score_hidden(
                    batches, self.base, self.head, self.completions, self.base_logits
                )
            found = divergence_of(scores, self.completions)
            ppl = None
            if self.text is not None:
                with self._lent(component, scheme, {}):
                    ppl = self.perplexity()
            yield _row(component, scheme, found, ppl, errors[component.name, str(scheme)])

    @contextmanager
    def _lent(
        self, component: Component, scheme: Scheme, errors: dict[Pair, float | None]
    ) -> Iterator[None]:
        """The base with one component changed; how far goes into `errors`."""
        before = weight_of(self.base.network, component)
        plan = Plan({component.name: scheme})
        with lent_plan(self.base, plan, components=[component]):
            after = weight_of(self.base.network, component)
            if not after.is_meta:
                errors[component.name, str(scheme)] = _relative_error(before, after)
            yield


def _row(
    component: Component, scheme: Scheme, found: Divergence, ppl: float | None, error: float | None
) -> _Row:
    assert found.kl is not None
    assert found.nats is not None
    assert found.acceptance is not None
    n_tokens = int(found.n_tokens.sum())
    kl, kl_se = pooled(found.kl, found.n_tokens)
    row = Sensitivity(
        component=component.name,
        scheme=str(scheme),
        method="measure",
        kl=kl,
        kl_se=kl_se,
        fdt=float(found.fdt.mean()),
        sdt=float(found.n_divergent.sum() / n_tokens),
        dppl=float(np.exp(found.nats.sum() / n_tokens)),
        acceptance=float(found.acceptance.sum() / n_tokens),
        ppl=ppl,
        weight_error=error,
        n_prompts=len(found.fdt),
        size_bytes=scheme.size_bytes(component),
        seconds=0.0,
    )
    return row, found.kl


@contextmanager
def _naming(component: Component, scheme: Scheme) -> Iterator[None]:
    """What goes wrong with the model says under which pair."""
    try:
        yield
    except ModelError as wrong:
        raise ModelError(
            f"{component.name} under {scheme}: {wrong}; or exclude the component"
        ) from wrong


def _measure(
    ground: _Ground,
    own: TokenScores,
    todo: Todo,
    writer: SensitivityWriter,
    *,
    seed: int,
    progress: Progress,
) -> None:
    """Measured rows, each kept as it is finished, layer by layer from the first."""
    if not writer.done("measure") or writer.run.get("rounding_kl") is None:
        writer.set(**_floors(ground, own, seed))
    todo = sorted(todo, key=lambda pair: -1 if pair[0].layer is None else pair[0].layer)
    costs = _costs(ground, [component for component, _ in todo])
    before = time.perf_counter()
    done = 0
    for rows in _rows(ground, todo):
        now = time.perf_counter()
        for row, prompt_kl in rows:
            share = (now - before) / len(rows)
            writer.add(dataclasses.replace(row, seconds=share), prompt_kl=prompt_kl)
        before = now
        done += len(rows)
        progress("sweep", int(costs[done - 1]), int(costs[-1]), "layers")


def _rows(ground: _Ground, todo: Todo) -> Iterator[list[_Row]]:
    """Rows one by one; where weights wait elsewhere, those of a layer as many at once as may be."""
    runs = ground.layer_runs
    together = is_offloaded(ground.base.network) and runs.refusal is None
    for layer, group in groupby(todo, key=lambda pair: pair[0].layer):
        pairs = list(group)
        if layer is not None:
            runs.go_to(layer)
        if layer is None or not together:
            yield from ([ground.row(*pair)] for pair in pairs)
            continue
        hidden_bytes = runs.n_tokens * ground.states.array.shape[1] * ground.base.dtype.itemsize
        n = max(1, VARIANT_BYTES // hidden_bytes)
        for start in range(0, len(pairs), n):
            yield list(ground.rows(layer, pairs[start : start + n]))


def _floors(ground: _Ground, own: TokenScores, seed: int) -> dict[str, Any]:
    """Run keys that measured rows are read against."""
    base = divergence_of(own, ground.completions)
    base_ppl = ground.perplexity()
    with lent_rounding(ground.base, seed=seed):
        rounded = ground.divergence(None)
    assert base.nats is not None
    assert rounded.kl is not None
    n_tokens = base.n_tokens.sum()
    return {
        "rounding_kl": float(rounded.kl.sum() / n_tokens),
        "base_dppl": float(np.exp(base.nats.sum() / n_tokens)),
        "base_ppl": base_ppl,
        "compiled": ground.states.compiled,
        "passes": ground.layer_runs.refusal or "from the changed layer on",
    }


def _costs(ground: _Ground, components: Sequence[Component]) -> NDArray[np.int64]:
    """Layers that will have run after each row, so that the time left can be told. [row]"""
    n_layers = len(decoder_layers(ground.base.network)[1])
    from_the_start = ground.layer_runs.refusal is not None
    layers = [0 if from_the_start or c.layer is None else c.layer for c in components]
    of_text = 0.0
    if ground.text is not None:
        ids = ground.base.tokenizer(ground.text, add_special_tokens=False, verbose=False)
        n_tokens = int(ground.completions.sequence_lengths.sum())
        of_text = n_layers * len(ids["input_ids"]) / n_tokens
    found: NDArray[np.int64] = np.ceil(
        np.cumsum([n_layers - layer + of_text for layer in layers])
    ).astype(np.int64)
    return found


@torch.no_grad()
def _relative_error(before: torch.Tensor, after: torch.Tensor) -> float | None:
    """‖W′ − W‖ / ‖W‖, Frobenius, in float64; None for a matrix of zeros."""
    norm = torch.linalg.matrix_norm
    size = float(norm(before.double()))
    return float(norm((after.float() - before.float()).double())) / size if size else None


# --- what the file says of the run ---


def _run_keys(
    base: Model, prompts: PromptSet, new_tokens: int, ignore_eos: bool, seed: int
) -> dict[str, Any]:
    """All that is known before any work is done, and must be the same to go on."""
    config = base.network.config
    return {
        "base": {
            "reference": base.reference,
            "fingerprint": base.fingerprint,
            "model_type": config.model_type,
            "config": json.loads(config.to_json_string(use_diff=False)),
        },
        "dtype": base.dtype_name,
        "device": device_name(base.device),
        "versions": versions(),
        "prompts": {
            "source": prompts.source,
            "digest": prompts.digest,
            "prefix": prompts.prefix,
            "n_prompts": len(prompts),
            "skipped": prompts.skipped,
            "left_out": prompts.left_out,
        },
        "new_tokens": new_tokens,
        "ignore_eos": ignore_eos,
        "seed": seed,
    }


def _digest(text: str | None) -> str | None:
    return None if text is None else hashlib.sha256(text.encode()).hexdigest()


def _done(out: Path, method: Method) -> set[tuple[str, str]]:
    rows = read_sensitivities(out).rows
    return {(row.component, row.scheme) for row in rows if row.method == method}


def _todo(
    done: Collection[Pair],
    components: Sequence[Component],
    schemes: Sequence[Scheme],
    only: Collection[Pair] | None,
) -> Todo:
    every = {
        (component.name, str(scheme)): (component, scheme)
        for component in components
        for scheme in schemes
    }
    return [
        found
        for pair, found in every.items()
        if pair not in done and (only is None or pair in only)
    ]


def _component_row(component: Component) -> ComponentRow:
    return ComponentRow(
        name=component.name,
        kind=component.kind,
        layer=component.layer,
        out_features=component.shape[0],
        in_features=component.shape[1],
        n_parameters=component.n_parameters,
        base_size_bytes=component.base_size_bytes,
    )


def _prompt_rows(prompts: PromptSet) -> list[PromptRow]:
    return [
        PromptRow(i, prompt.digest, prompt.domain, prompt.language)
        for i, prompt in enumerate(prompts.prompts)
    ]
