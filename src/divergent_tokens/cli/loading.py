"""The base that a command works on, and the candidates that it is compared with."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from divergent_tokens.candidates import Candidates
    from divergent_tokens.measure.progress import Progress
    from divergent_tokens.models import Model


def load_base(reference: str, progress: "Progress", **loading: Any) -> "Model":
    """The model of a reference, its loading a stage of the progress; see `load_model`."""
    from divergent_tokens.models import load_model

    progress(f"loading {reference}", 0, 1, "")
    model = load_model(reference, **loading)
    progress(f"loading {reference}", 1, 1, "")
    return model


@dataclass(frozen=True)
class Asked:
    """Candidates as a command line names them."""

    models: Sequence[str]
    schemes: Sequence[str]
    plans: Sequence[Path]
    include: Sequence[str]
    exclude: Sequence[str]
    calibration: str
    """What schemes and plans that need it are calibrated on."""

    def check(self, *others: str) -> None:
        """Raise for what is wrong with them, and with `others`' names, before a base is loaded."""
        from divergent_tokens.candidates import check_names
        from divergent_tokens.compress.plan_file import read_plan
        from divergent_tokens.compress.schemes import parse_scheme

        schemes = map(str, map(parse_scheme, self.schemes))
        check_names(*self.models, *schemes, *map(str, self.plans), *others)
        for path in self.plans:
            read_plan(path)

    def candidates(self, base: "Model", **loading: Any) -> "Candidates":
        """Models, schemes on the base, and plans; models in the base's dtype and on its device.

        Other rounding would be counted as harm.
        """
        from divergent_tokens.candidates import (
            joined,
            model_candidates,
            plan_candidates,
            scheme_candidates,
        )

        loading |= {"dtype": base.dtype, "device": base.device}
        made: dict[str, Any] = {"calibration": self.calibration, "cache": loading["cache"]}
        touched: dict[str, Any] = {"include": self.include, "exclude": self.exclude}
        return joined(
            model_candidates(*self.models, **loading),
            scheme_candidates(base, *self.schemes, **touched, **made) if self.schemes else {},
            plan_candidates(base, *self.plans, **made) if self.plans else {},
        )
