"""Names explain themselves: public functions are verbs, and no public name has two meanings."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import slop_hf

ROOT = Path(slop_hf.__file__).parent

VERBS = """
    add advise allocate are assemble average begin build calibrate call carry check choose collect combine compare
    compute continue convert copy count create darken describe disable discard draw end escape estimate evaluate
    explain extract fetch find fit flush forecast format freeze generate get grow guard hash hide hold inherit
    inspect interpolate is judge keep label launch list load locate lock look make mask match measure merge name
    open parse plan prepare preview print probe publish rank read redirect register remove render report reproduce
    require resolve restore resume rollback round run sample save score select separate set share shorten show
    split start store sum summarise tabulate to tokenize trace train transfer upscale wait with write
"""

#: Registries of functions under the names that users write: module -> why its functions carry them.
REGISTERED = {
    "baselines.arms": "the names of control arms",
    "growth.inits": "the names of inits",
    "planning.objectives": "the names of objectives",
}
#: Names that several modules define on purpose.
SHARED = frozenset({"T", "logger"})


def read_sources() -> dict[str, ast.Module]:
    """Modules by their dotted name, without packages' `__init__`, which repeat names to re-export them."""
    paths = (path for path in sorted(ROOT.rglob("*.py")) if path.stem != "__init__")
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(path.read_text(encoding="utf-8"))
        for path in paths
        if "measurements" not in path.parts  # scripts that the library `evaluate` loads
    }


def list_public_names(tree: ast.Module) -> Iterator[str]:
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            targets = [part for target in node.targets for part in getattr(target, "elts", [target])]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        else:
            names = []
        yield from (name for name in names if not name.startswith("_"))


def find_functions_without_verb(sources: Mapping[str, ast.Module]) -> list[str]:
    return [
        f"{module}.{node.name}"
        for module, tree in sources.items()
        if module not in REGISTERED
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")
        if node.name.split("_")[0] not in VERBS.split()
    ]


def find_collisions(sources: Mapping[str, ast.Module]) -> dict[str, list[str]]:
    homes: dict[str, list[str]] = defaultdict(list)
    for module, tree in sources.items():
        for name in set(list_public_names(tree)) - SHARED:
            homes[name].append(module)
    return {name: modules for name, modules in sorted(homes.items()) if len(modules) > 1}


def test_public_functions_are_verbs() -> None:
    assert find_functions_without_verb(read_sources()) == []


def test_a_function_without_a_verb_is_found() -> None:
    tree = ast.parse("def located(): ...\ndef locate(): ...\ndef _located(): ...")
    assert find_functions_without_verb({"io.files": tree}) == ["io.files.located"]


def test_no_public_name_has_two_meanings() -> None:
    assert find_collisions(read_sources()) == {}


def test_a_collision_is_found() -> None:
    sources = {"a": ast.parse("SIZE = 1\nONE, TWO = 1, 2"), "b": ast.parse("TWO: int = 2\n_SIZE = 1")}
    assert find_collisions(sources) == {"TWO": ["a", "b"]}
