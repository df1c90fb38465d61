"""One page of all records: self-contained, offline, and safe whatever the records hold.

Text of records comes in by two ways only: through Jinja2, which escapes it, and as JSON in which
no `<` is left, which the page's script shows by textContent. The page names the scripts that may
run by their hashes, and allows no request.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from typing import Any

from divergent_tokens.errors import DivergentTokensError
from divergent_tokens.report.chapters import chapters
from divergent_tokens.report.making import making
from divergent_tokens.report.records import Source
from divergent_tokens.report.slider import slider
from divergent_tokens.report.tables import harmless
from divergent_tokens.report.text_view import text_view
from divergent_tokens.report.verdict import headline, verdicts

SCRIPTS = ("theme.js", "figures.js", "budget.js", "texts.js", "copying.js")
_FOLDER = resources.files("divergent_tokens") / "data" / "page"


def page(sources: Sequence[Source]) -> str:
    """The HTML. Raises DivergentTokensError where the extra `report` is not installed."""
    check_extra()
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    found = chapters(sources)
    figures = [f.plot() for chapter in found for part in chapter.parts for f in part.figures]
    sweeps = [slider(source.record) for source in sources if source.kind == "sweep"]
    texts = text_view(sources)
    # Plotly last: what is read and what is filtered need not wait for it.
    scripts = [*(_script(_read(name)) for name in SCRIPTS), _script(get_plotlyjs())]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    html = environment.from_string(_read("page.html")).render(
        base=harmless(sources[0].record["base"]["reference"]),
        headline=headline(sources),
        verdicts=verdicts(sources),
        chapters=found,
        n_prompts=[len(one["texts"]) for one in texts["comparisons"]],
        has_texts=bool(texts["comparisons"]),
        makings=[making(source) for source in sources],
        version=version("divergent-tokens"),
        style=Markup(_read("page.css")),
        scripts=[Markup(script) for script in scripts],
        hashes=[_hash(script) for script in scripts],
        data=Markup(_embedded({"figures": figures, "sweeps": sweeps, "texts": texts})),
    )
    return html.encode("utf-8", "replace").decode("utf-8")  # names may hold what no text can


def check_extra() -> None:
    """Raise DivergentTokensError where what a page is made with is not installed."""
    try:
        import jinja2  # noqa: F401
        import jsonschema  # noqa: F401
        import plotly  # noqa: F401
    except ImportError as error:
        raise DivergentTokensError(
            f"a page needs {error.name}: pip install 'divergent-tokens[report]'"
        ) from error


def _read(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8")


def _script(text: str) -> str:
    """As it may stand in a page: line ends as HTML reads them, and no end of the element."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    for end in ("</script", "<script", "<!--"):
        assert end not in text.lower(), f"{end} would end the element, or hide its end"
    return text


def _hash(script: str) -> str:
    digest = hashlib.sha256(script.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _embedded(value: Any) -> str:
    """JSON in ASCII that no parser of HTML takes for anything else."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
