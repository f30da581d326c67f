"""The layers of slop_hf: imports point up the list only, and planning stays light.

Each rule is a function over sources, so that every test also shows that the rule can find a breach.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import slop_hf

PACKAGE = "slop_hf"
ROOT = Path(slop_hf.__file__).parent

# Row -> the modules and folders in it. A module may import from its own row and from the rows above.
ROWS: dict[str, tuple[str, ...]] = {
    "plumbing": ("errors", "io"),
    "words": ("dims", "operators", "architectures"),
    "costs": ("cost",),
    "plans": ("schedule",),
    "decide": ("planning", "baselines", "paper"),
    "runs": ("runs",),
    "grow": ("growth",),
    "feed": ("data",),
    "train": ("training",),
    "tell": ("evaluation", "hub", "report", "testing"),
    "pipeline": ("pipeline",),
    "compare": ("experiments", "probing"),
    "talk": ("cli", "__main__", "launch"),
}
RANKS = {part: rank for rank, parts in enumerate(ROWS.values()) for part in parts}
MAY_IMPORT_TORCH = {"grow", "feed", "train", "tell", "pipeline", "compare"}
HEAVY = {"torch", "transformers"}

Sources = Mapping[str, str]  # full module name -> source text; a package is named with its `.__init__`


def sources_under(root: Path) -> dict[str, str]:
    """All modules but the façade `slop_hf/__init__.py`, which imports lazily from everywhere."""
    paths = {".".join((PACKAGE, *path.relative_to(root).with_suffix("").parts)): path for path in root.rglob("*.py")}
    del paths[f"{PACKAGE}.__init__"]
    return {name: path.read_text(encoding="utf-8") for name, path in sorted(paths.items())}


def nodes_at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree, functions included, without what only a type checker reads."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from nodes_at_run_time(other)
        else:
            yield child
            yield from nodes_at_run_time(child)


def imported_names(module: str, source: str) -> Iterator[str]:
    """The absolute dotted name of everything that a module imports, `from a import b` as `a.b`."""
    for node in nodes_at_run_time(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def edges(sources: Sources) -> dict[str, set[str]]:
    """Module -> the modules of the package that it imports.

    The façade hides where a name lives. Only the last row may go through it, as everything there is above that row.

    Raises:
        AssertionError: for an import from the façade in another row.
    """
    modules = {name.removesuffix(".__init__"): name for name in sources}
    result: dict[str, set[str]] = {}
    for module, source in sources.items():
        result[module] = set()
        for name in imported_names(module, source):
            if name.split(".")[0] != PACKAGE:
                continue
            home = name if name in modules else name.rpartition(".")[0]
            if home in modules:
                result[module].add(modules[home])
            else:
                assert part_of(module) in ROWS["talk"], f"{module} imports {name}: import it from where it is defined"
    return result


def part_of(module: str) -> str:
    return module.split(".")[1]


def unplaced(sources: Sources) -> list[str]:
    return [module for module in sources if part_of(module) not in RANKS]


def downward_imports(sources: Sources) -> list[str]:
    return [
        f"{module} imports {other}"
        for module, others in edges(sources).items()
        for other in sorted(others)
        if RANKS[part_of(other)] > RANKS[part_of(module)]
    ]


def import_cycle(sources: Sources) -> list[str]:
    """The modules of one import cycle, or an empty list."""
    try:
        TopologicalSorter(edges(sources)).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return []


def torch_imports(sources: Sources) -> list[str]:
    light = {part for row, parts in ROWS.items() if row not in MAY_IMPORT_TORCH for part in parts}
    return [
        module
        for module, source in sources.items()
        if part_of(module) in light and any(name.split(".")[0] == "torch" for name in imported_names(module, source))
    ]


def loaded_by(code: str, candidates: set[str]) -> set[str]:
    """Those of the candidate modules that a fresh interpreter has loaded after running the code."""
    report = f"import sys; print('loaded', *sorted(set(sys.modules) & {candidates!r}))"
    command = [sys.executable, "-c", f"{code}\n{report}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()[1:])


def test_every_module_is_in_a_row() -> None:
    assert unplaced(sources_under(ROOT)) == [], "place each new module in ROWS"
    assert unplaced({"slop_hf.gadgets": "", "slop_hf.growth.axes": ""}) == ["slop_hf.gadgets"]


def test_imports_point_up_the_list() -> None:
    assert downward_imports(sources_under(ROOT)) == []


@pytest.mark.parametrize(
    "downward",
    [
        "from ..training.trainer import SlopTrainer",
        "from ..training import trainer",
        "import slop_hf.training.trainer",
        "def plan():\n    from slop_hf.training import trainer",
    ],
)
def test_a_downward_import_is_found(downward: str) -> None:
    planner, trainer = "slop_hf.planning.planner", "slop_hf.training.trainer"
    sources = {
        planner: downward,
        "slop_hf.training.__init__": "",
        trainer: "from ..planning.planner import SlopPlanner",
    }
    assert downward_imports(sources) == [f"{planner} imports {trainer}"]


def test_what_only_a_type_checker_reads_is_no_import() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from ..training import trainer\n"
    sources = {"slop_hf.planning.planner": source, "slop_hf.training.trainer": ""}
    assert downward_imports(sources) == []
    sources["slop_hf.planning.planner"] += "else:\n    from ..training import trainer"
    assert downward_imports(sources) == ["slop_hf.planning.planner imports slop_hf.training.trainer"]


def test_there_is_no_import_cycle() -> None:
    assert import_cycle(sources_under(ROOT)) == []


def test_an_import_cycle_is_found() -> None:
    sources = {
        "slop_hf.growth.__init__": "from .model import grow_model",
        "slop_hf.growth.model": "import torch\nfrom . import axes",
        "slop_hf.growth.axes": "",
    }
    assert import_cycle(sources) == []
    sources["slop_hf.growth.axes"] = "def f():\n    from .model import grow_model"
    assert set(import_cycle(sources)) == {"slop_hf.growth.model", "slop_hf.growth.axes"}
    sources["slop_hf.growth.axes"] = "from . import grow_model"
    assert set(import_cycle(sources)) == set(sources)


@pytest.mark.parametrize("hidden", ["from slop_hf import ModelDims", "from .. import ModelDims", "import slop_hf"])
def test_an_import_from_the_facade_is_found(hidden: str) -> None:
    assert edges({"slop_hf.__main__": hidden}) == {"slop_hf.__main__": set()}
    with pytest.raises(AssertionError, match=r"slop_hf\.planning\.planner imports slop_hf"):
        edges({"slop_hf.planning.planner": hidden, "slop_hf.dims": ""})


def test_only_the_rows_that_hold_tensors_import_torch() -> None:
    assert torch_imports(sources_under(ROOT)) == []
    sources = {
        "slop_hf.cost.flops": "def f():\n    import torch.nn",
        "slop_hf.cli.main": "from torch import nn",
        "slop_hf.growth.model": "import torch",
        "slop_hf.dims": "import torchless",
    }
    assert torch_imports(sources) == ["slop_hf.cost.flops", "slop_hf.cli.main"]


def test_planning_loads_no_heavy_library() -> None:
    assert loaded_by("import slop_hf.planning.planner", HEAVY) == set()
    assert loaded_by("import slop_hf.cli", HEAVY) == set()
    assert loaded_by("import json", {"json", "torch"}) == {"json"}


def test_slop_plan_help_loads_no_heavy_library() -> None:
    code = """
import sys
from slop_hf.cli import main
sys.argv = ["slop", "plan", "--help"]
try:
    status = main()
except SystemExit as done:
    status = done.code
assert not status, status
"""
    assert loaded_by(code, HEAVY) == set()


def test_a_published_config_is_read_without_heavy_libraries() -> None:
    assert loaded_by("import slop_hf.hub.access", HEAVY) == set()


def find_reached(sources: Sources, start: str) -> set[str]:
    """The modules that are loaded with one, itself included."""
    graph, reached, waiting = edges(sources), set[str](), [start]
    while waiting:
        if (module := waiting.pop()) not in reached:
            reached.add(module)
            waiting.extend(graph[module])
    return reached


def test_training_loads_no_figures() -> None:
    """They take a second in every process of a run."""
    sources = sources_under(ROOT)
    reached = find_reached(sources, f"{PACKAGE}.pipeline")
    assert f"{PACKAGE}.report.tables" in reached
    assert [
        name for name in sorted(reached) if "import matplotlib" in sources[name] or "from matplotlib" in sources[name]
    ] == []
