"""`dtm components`: the weight matrices that a scheme can be chosen for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from divergent_tokens.cli.loading import load_base
from divergent_tokens.cli.options import (
    AllowPickle,
    Base,
    Cache,
    Device,
    Dtype,
    Format,
    Quiet,
    TrustRemoteCode,
)
from divergent_tokens.cli.output import (
    print_record,
    progress_bar,
)
from divergent_tokens.cli.signals import on_signals, tidy_up

if TYPE_CHECKING:
    from divergent_tokens.compress.components import Component
    from divergent_tokens.compress.schemes import Scheme


def components(
    base: Base,
    include: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="List only components that match (glob, or re:...)."),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Leave out components that match (glob, or re:...)."),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(metavar="SCHEME", help="Also tell the bytes under this: int8, int4:g64, ..."),
    ] = None,
    format: Annotated[
        Format, typer.Option("--format", help="How the list is printed.")
    ] = Format.text,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cache: Cache = None,
    quiet: Quiet = False,
    allow_pickle: AllowPickle = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """List a model's weight matrices: name, kind, layer, shape, parameters, bytes."""
    from divergent_tokens.compress.components import find_components
    from divergent_tokens.compress.schemes import parse_scheme
    from divergent_tokens.report.components import components_markdown, components_text
    from divergent_tokens.store import default_cache

    on_signals(tidy_up)
    schemes = list(dict.fromkeys(map(parse_scheme, scheme or ())))
    with progress_bar(quiet) as progress:
        model = load_base(
            base,
            progress,
            dtype=dtype,
            device=device,
            cache=cache or default_cache(),
            allow_pickle=allow_pickle,
            trust_remote_code=trust_remote_code,
        )
    chosen = find_components(model.network, include=include or (), exclude=exclude or ())
    for one in schemes:
        one.check(chosen)
    names = {component.name for component in chosen}
    listed = chosen
    if not include:  # the embeddings and the head are named, though only --include brings them in
        everything = find_components(model.network, include=["*"], exclude=exclude or ())
        listed = tuple(c for c in everything if c.name in names or c.is_end)
    record = {
        "base": {"reference": model.reference, "fingerprint": model.fingerprint},
        "schemes": list(map(str, schemes)),
        "components": [_json(c, schemes, included=c.name in names) for c in listed],
    }
    print_record(
        record,
        format,
        text=lambda _width: components_text(record),
        markdown=lambda: components_markdown(record),
    )


def _json(component: "Component", schemes: "Sequence[Scheme]", *, included: bool) -> dict[str, Any]:
    sizes = {str(scheme): scheme.size_bytes(component) for scheme in schemes} if included else {}
    return {
        "name": component.name,
        "kind": component.kind,
        "layer": component.layer,
        "shape": list(component.shape),
        "n_parameters": component.n_parameters,
        "base_size_bytes": component.base_size_bytes,
        "size_bytes": sizes,
        "included": included,
    }
