"""The house: imports go downhill only, the lanes do not know each other, reports need no torch."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from xml.etree import ElementTree

import divergent_tokens

PACKAGE = "divergent_tokens"
ROOT = Path(divergent_tokens.__file__).parent
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

# What stands beside models.py and does its work.
MODEL_FILES = "quiet", "hub", "vocabularies", "gguf_files", "model_files", "network_checks"
FLOORS = [
    {"errors"},
    {"store"},
    {"fingerprints", "layers", "compiled", "offload", "models", *MODEL_FILES},
    {"measure", "compress"},
    {"watched"},
    {"attributions", "backward", "gradients", "labels", "saliencies"},
    {"calibrated"},
    {"candidates", "conditions", "tasks", "task_files", "task_samples"},
    {"layerwise", "sensitivities"},
    {"noise"},
    {"pilot", "probe", "sweep", "search"},
    {"allocation"},
    {"recover", "replicas"},
    {"pruning"},
    {"settle", "reload"},
    {"verify"},
    {"report"},
    {"cli", "__init__"},
]
"""From the ground up: a module, or a package as a whole. None knows one above it."""
APART = {
    "measure": {"compress", "candidates", "report"},
    "compress": {"measure", "report"},
    "report": {"measure", "compress", "models", "candidates"},
    "conditions": {"measure", "compress", "models", "report"},
    "models": {"measure", "compress"},
}
"""Who does not import whom, though the floors may allow it."""
HEAVY = {"torch", "transformers", "numpy", "scipy"}


def imports(path, *, at_import_time=False):
    """Modules that a file imports, and of packages what it takes from them.

    With `at_import_time` those within functions and for type checkers are left out.
    """
    found = set()

    def visit(node):
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            if not at_import_time:
                found.update(*(imports_of(child) for child in node.body))
            return
        found.update(imports_of(node))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def imports_of(node):
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute here"
        return {f"{node.module}.{alias.name}" for alias in node.names}
    return set()


def own(names):
    """The files of this package among imported names: `measure.metrics` of `….metrics.sdt`."""
    inner = [name.removeprefix(f"{PACKAGE}.") for name in names if name.startswith(f"{PACKAGE}.")]
    return {
        next(file for file in (name, name.rpartition(".")[0]) if file in FILES) for name in inner
    }


def top(module):
    return module.partition(".")[0]


def floor(module):
    (found,) = [i for i, members in enumerate(FLOORS) if top(module) in members]
    return found


EDGES = {module: own(imports(path)) - {module} for module, path in FILES.items()}


def test_the_reader_of_imports_sees_what_is_there():
    assert {"errors", "measure.metrics", "models"} <= EDGES["measure.comparison"]
    assert {"measure.comparison", "cli.loading", "report.text"} <= EDGES["cli.compare"]
    assert "models" in EDGES["cli.loading"]
    assert sum(map(len, EDGES.values())) > 100


def test_every_file_has_its_floor():
    assert {top(module) for module in FILES} == set().union(*FLOORS)


def test_imports_go_downhill():
    uphill = [
        f"{module} imports {other}"
        for module, others in EDGES.items()
        for other in others
        if module != "__init__" and floor(other) > floor(module)
    ]
    assert not uphill


def test_lanes_and_reports_do_not_know_each_other():
    strangers = [
        f"{module} imports {other}"
        for module, others in EDGES.items()
        for other in others
        if top(other) in APART.get(top(module), ())
    ]
    assert not strangers


STAGES = ["documents", "samples", "prompts", "completions", "states", "scores", "comparison"]


def test_a_stage_knows_those_before_it_only():
    for i, stage in enumerate(STAGES):
        later = {f"measure.{name}" for name in STAGES[i + 1 :]}
        assert not EDGES[f"measure.{stage}"] & later, stage


def test_there_is_no_circle():
    TopologicalSorter(EDGES).prepare()  # raises CycleError, naming it


def test_only_models_imports_the_loaders_of_transformers():
    """And the program of its own that loads a folder as anybody would; it knows nothing of ours."""
    loaders = {"transformers.AutoModelForCausalLM", "transformers.AutoTokenizer"}
    users = [module for module, path in FILES.items() if loaders & imports(path)]
    assert users == ["models", "reload"]
    assert not any(name.startswith(PACKAGE) for name in imports(FILES["reload"]))


def test_the_harness_is_known_where_tasks_are_read_and_run_only():
    users = [module for module, path in FILES.items() if "lm_eval" in map(top, imports(path))]
    assert users == ["task_files", "tasks"]


def test_metrics_and_intervals_need_numpy_and_scipy_only():
    modules = ("metrics", "intervals", "flips", "answers")
    for module in (*(f"measure.{name}" for name in modules), "sensitivities"):
        outside = {top(name) for name in imports(FILES[module])} - set(sys.stdlib_module_names)
        assert outside - {PACKAGE} <= {"numpy", "scipy"}, module


def test_the_command_line_and_the_reports_start_light():
    commands = [module for module in FILES if top(module) == "cli"]
    light = ("conditions", "errors", "__init__", "report.text", "report.bars")
    for module in (*commands, *light):
        assert not HEAVY & {top(name) for name in imports(FILES[module], at_import_time=True)}
    code = (
        f"import sys, {PACKAGE}.cli, {PACKAGE}.report.text, {PACKAGE}.report.bars\n"
        f"print({HEAVY} & sys.modules.keys())"
    )
    left = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert left.stdout == "set()\n"


def test_every_public_name_is_where_it_is_said_to_be():
    for name in divergent_tokens.__all__:
        assert getattr(divergent_tokens, name).__name__ == name
    assert len(divergent_tokens.__all__) <= 15


def test_the_picture_shows_these_floors():
    """docs/architecture.svg, from the top to the ground: every module and no other."""
    svg = "{http://www.w3.org/2000/svg}"
    picture = ElementTree.parse(ROOT.parents[1] / "docs" / "architecture.svg")
    drawn = [
        {text.text for text in floor.iter(f"{svg}text") if text.get("class") == "module"}
        for floor in picture.iter(f"{svg}g")
    ]
    assert drawn[::-1] == FLOORS
