"""What the page needs to choose for any budget by itself: every option, and the law's table."""

from typing import Any

from divergent_tokens.report.tables import Record


def slider(sweep: Record) -> dict[str, Any]:
    """Each component's bytes in the base and its options as [scheme, KL, bytes], and the table.

    Rows of the table are KL, SDT, low, high, FDT, low, high. Page/budget.js chooses from it as
    search/knapsack.py does before it proves: along the convex hull of every component's options.
    """
    schemes = list(sweep["schemes"])
    return {
        "schemes": schemes,
        "components": [
            [
                component["base_size_bytes"],
                [
                    [schemes.index(scheme), option["kl"], option["size_bytes"]]
                    for scheme, option in component["options"].items()
                ],
            ]
            for component in sweep["components"]
        ],
        "n_parameters": sum(component["n_parameters"] for component in sweep["components"]),
        "table": sweep["table"],
        "new_tokens": sweep["new_tokens"],
    }
