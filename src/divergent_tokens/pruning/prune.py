"""Pruning in rounds, each of them kept; and the folder that comes of it."""

import copy
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from divergent_tokens.compress.components import (
    Component,
    count_matrices,
    find_components,
    weight_of,
)
from divergent_tokens.compress.donors import Donor
from divergent_tokens.compress.plan import Plan, check_plan
from divergent_tokens.compress.plan_file import PlanFile, check_base, write_plan
from divergent_tokens.compress.prune import check_pattern
from divergent_tokens.errors import RecordError, SchemeError
from divergent_tokens.measure.comparison import versions
from divergent_tokens.measure.overlap import overlap
from divergent_tokens.measure.progress import Progress, silent
from divergent_tokens.measure.prompts import PromptSet
from divergent_tokens.measure.sequences import Sequences
from divergent_tokens.models import Model, outline_model
from divergent_tokens.pruning.ground import Ground
from divergent_tokens.pruning.kept_rounds import KeptRounds, rounds_folder
from divergent_tokens.pruning.run import Run
from divergent_tokens.pruning.settings import Settings
from divergent_tokens.quiet import quietly
from divergent_tokens.saliencies import check_components, check_whole
from divergent_tokens.store import clear_disk_errors, replacing_folder, write_text

SCHEMA = "divergent-tokens/pruning/1"
RECORD = "pruning.json"
WRITTEN = (
    *("*.json", "*.safetensors", "*.jinja", "*.model", "*.tiktoken", "*.py"),
    *("vocab.txt", "merges.txt"),
)
"""Patterns of what a pruned model's folder holds: weights, tokenizer, code and records."""
PIECE = 64
"""Tokens of a line that are looked for among the sequences at once."""
TOO_MUCH = 0.05
"""A greater share of prompts or text that is trained on is warned of."""

_log = logging.getLogger(__name__)


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
    compiled: bool | None = None,
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
    everything else is done on the first, the base's own. Training runs compiled where that pays, or
    `compiled` asks for it.

    Prompts and text that stand in the sequences are counted (`data.overlap`), and a warning is
    logged where they are many.

    Raises RecordError where `out` holds anything, unless it is a pruned model and to be
    overwritten, and where kept rounds are of another run; SchemeError where a criterion or pattern
    does not fit a component or the base is sparser already; DivergentTokensError for a loss that is
    no number: the last good round stays kept.
    """
    out = out.resolve()
    check_folder(out, overwrite=overwrite)
    if Path(base.reference).is_dir() and out == Path(base.reference).resolve():
        raise RecordError(f"{out} is the base itself; write to another folder")
    check_whole(base)
    _check_components(base, components, settings)
    served = None if plan is None else _checked(plan, base)
    key = _key(base, components, sequences, prompts, settings, plan, text)
    kept = KeptRounds(rounds_folder(out), key)
    kept.check()
    shared = _overlap(base, sequences, prompts, text, settings)
    network = copy.deepcopy(base.network)
    model = replace(base, network=network, reference=f"{base.reference} (pruned)")
    run = Run(model, base, components, sequences, settings, devices, progress, compiled)
    ground = Ground.of(base, served, prompts, settings, text, batch_size, cache, progress)
    run.ground = ground
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
        **_asked(base, sequences, prompts, settings, shared),
        "trained_on": [str(device) for device in devices or (base.device,)],
        "base_ppl": ground.base_ppl,
        "plan": None if plan is None else {"digest": plan.digest, "size_bytes": plan.size_bytes},
        "rounds": records,
        "components": run.components_json(),
        "n_not_pruned": count_matrices(base.network) - len(components),
        **run.final_metrics(prompts, text, batch_size, cache),
    }
    _write(out, model, record, plan)
    kept.clear()
    return record


def _asked(
    base: Model,
    sequences: Sequences,
    prompts: PromptSet,
    settings: Settings,
    shared: dict[str, float | None],
) -> dict[str, Any]:
    """What was pruned, how, and on what."""
    return {
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
            "n_saliency": min(settings.n_saliency, len(sequences.ids)),
            "overlap": shared,
        },
        "prompts": {
            "source": prompts.source,
            "digest": prompts.digest,
            "n_prompts": len(prompts),
            "skipped": prompts.skipped,
            "prefix": prompts.prefix,
            "new_tokens": settings.new_tokens,
        },
    }


def _overlap(
    base: Model, sequences: Sequences, prompts: PromptSet, text: str | None, settings: Settings
) -> dict[str, float | None]:
    """Shares of the prompts, and of the text line by line, that stand in the sequences too."""
    found: dict[str, float | None] = {"prompts": None, "text": None}
    if settings.reads_sequences:
        found["prompts"] = overlap(sequences.ids, [prompt.ids for prompt in prompts.prompts])
        found["text"] = overlap(sequences.ids, list(_pieces(base, text or "")))
    for name, share in found.items():
        if share is not None and share > TOO_MUCH:
            _log.warning(
                "%s of the %s in --data, too, and %s at most was expected: results will look too "
                "good; give --data another source",
                f"{share:.0%}",
                {"prompts": "prompts stand", "text": "text stands"}[name],
                f"{TOO_MUCH:.0%}",
            )
    return found


def _pieces(base: Model, text: str) -> Iterator[list[int]]:
    """Token ids of the text's lines, which are documents in `--data`; long lines in parts."""
    for line in text.splitlines():
        ids = base.tokenizer(line.strip(), add_special_tokens=False, verbose=False)["input_ids"]
        yield from (ids[i : i + PIECE] for i in range(0, len(ids), PIECE))


def check_folder(out: Path, *, overwrite: bool) -> None:
    """RecordError where something would be replaced that this did not write, or nobody asked."""
    with clear_disk_errors(out):  # such as a name that is too long
        is_there = out.exists()
    above = next(place for place in (*out.parents, out) if place.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise RecordError(f"{out} cannot be written, since {above} is no folder that can be")
    if not is_there or (out.is_dir() and not any(out.iterdir())):
        return
    if not _is_ours(out / RECORD):
        raise RecordError(f"{out} exists and holds no pruned model of ours; name another folder")
    if not overwrite:
        raise RecordError(
            f"{out} holds a pruned model already; give --overwrite to replace it, or name another "
            "folder"
        )
    theirs = sorted(p.name for p in out.iterdir() if p.is_dir() or not any(map(p.match, WRITTEN)))
    if theirs:
        raise RecordError(
            f"{out} holds {', '.join(theirs[:3])} besides a pruned model, which replacing it would "
            "delete; move what is yours, or name another folder"
        )


def _is_ours(path: Path) -> bool:
    """Whether this is the record of a pruning, and whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("schema") == SCHEMA


def _key(
    base: Model,
    components: Sequence[Component],
    sequences: Sequences,
    prompts: PromptSet,
    settings: Settings,
    plan: PlanFile | None,
    text: str | None,
) -> dict[str, Any]:
    """Everything that must be the same to go on; the learning rate may be another one."""
    asked = settings.to_json()
    asked["training"].pop("learning_rate")
    return {
        "base": base.fingerprint,
        "dtype": base.dtype_name,
        "settings": asked,
        "components": [component.name for component in components],
        "data": sequences.digest,
        "prompts": prompts.digest,
        "plan": None if plan is None else plan.digest,
        "text": None if text is None else hashlib.sha256(text.encode()).hexdigest(),
    }


def _check_components(base: Model, components: Sequence[Component], settings: Settings) -> None:
    """SchemeError for what the settings do not fit; what no round could do is said before one."""
    if settings.granularity == "expert" and all(c.expert is None for c in components):
        raise SchemeError(
            f"--granularity expert was asked for, and none of the {len(components)} components is "
            "an expert's; leave it out"
        )
    if settings.corrections and len(components) == 1:
        raise SchemeError(
            f"--correct compares matrices, and {components[0].name} is the only one that was "
            "chosen; leave --correct out, or choose others too"
        )
    sees = settings.repair or (settings.allocate == "kl" and settings.pattern is None)
    check_components(base.network, components, settings.criterion, sees_inputs=sees)
    if settings.pattern is not None:
        check_pattern(*settings.pattern, components)
    zeros = sum(int((weight_of(base.network, c) == 0).sum()) for c in components)
    share = zeros / sum(c.n_parameters for c in components)
    if share >= settings.sparsity:
        raise SchemeError(
            f"{share:.1%} of the weights of {base.reference} are zero already; expected a "
            f"--sparsity above that, and {settings.sparsity} was asked for"
        )


def _checked(plan: PlanFile, base: Model) -> Plan:
    """The plan, of which nothing is made from the base's own weights or inputs."""
    check_base(plan, base, "the plan")
    if getattr(base.network.config, "auto_map", None):
        raise SchemeError(
            f"{base.reference} brings code of its own, and no plan can be written for what is "
            "pruned of it; leave --plan out"
        )
    found = plan.plan()
    for name, scheme in found.schemes.items():
        if scheme.is_calibrated or any(isinstance(step, Donor) for step in scheme.steps):
            raise SchemeError(
                f"{name}: {scheme} is made once, for the base's own weights, and pruning changes "
                "them; expected schemes of any weights, such as int8 or int4:g64"
            )
    check_plan(found, find_components(base.network, include=["*"]))
    return found


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
