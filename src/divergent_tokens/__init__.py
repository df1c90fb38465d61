"""Find out, token by token, how far a compressed language model has moved from its base."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from divergent_tokens.candidates import model_candidates as model_candidates
    from divergent_tokens.candidates import scheme_candidates as scheme_candidates
    from divergent_tokens.errors import DivergentTokensError as DivergentTokensError
    from divergent_tokens.measure.comparison import Comparison as Comparison
    from divergent_tokens.measure.comparison import compare as compare
    from divergent_tokens.measure.completions import complete as complete
    from divergent_tokens.measure.metrics import divergence as divergence
    from divergent_tokens.measure.prompts import read_prompts as read_prompts
    from divergent_tokens.models import Model as Model
    from divergent_tokens.models import load_model as load_model
    from divergent_tokens.report.text import comparison_markdown as comparison_markdown
    from divergent_tokens.store import default_cache as default_cache
    from divergent_tokens.tasks import read_tasks as read_tasks

_HOMES = {
    "Comparison": "measure.comparison",
    "DivergentTokensError": "errors",
    "Model": "models",
    "compare": "measure.comparison",
    "comparison_markdown": "report.text",
    "complete": "measure.completions",
    "default_cache": "store",
    "divergence": "measure.metrics",
    "load_model": "models",
    "model_candidates": "candidates",
    "read_prompts": "measure.prompts",
    "read_tasks": "tasks",
    "scheme_candidates": "candidates",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: `dtm --help` need not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
