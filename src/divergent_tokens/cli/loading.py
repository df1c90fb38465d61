"""The base that a command works on."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from divergent_tokens.measure.progress import Progress
    from divergent_tokens.models import Model


def load_base(reference: str, progress: "Progress", **loading: Any) -> "Model":
    """The model of a reference, its loading a stage of the progress; see `load_model`."""
    from divergent_tokens.models import load_model

    progress(f"loading {reference}", 0, 1, "")
    model = load_model(reference, **loading)
    progress(f"loading {reference}", 1, 1, "")
    return model
