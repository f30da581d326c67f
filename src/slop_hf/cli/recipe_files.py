"""The recipes that come with slop-hf, by name: runs, mixtures and experiments to copy, and launch configurations."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..errors import RunError
from ..io.serialization import describe_alternatives, parse_yaml

_PACKAGE = Path(__file__).parents[1]
#: Folders whose files are parts of recipes, or of launches.
_PARTS = ("accelerate", "scales")
_LAUNCHES = {
    "one_gpu": "one-gpu",
    "eight_gpus_zero3": "zero3-8gpu",
    "multi_node_zero3": "zero3-multi-node",
    "cpu_zero3": "zero3-cpu",
    "eight_gpus_fsdp2": "fsdp2-8gpu",
    "cpu_fsdp2": "fsdp2-cpu",
}
_YAML_NAME = re.compile(r"(?<![\w./-])[\w./-]+\.yaml\b")


@dataclass(frozen=True)
class RecipeFile:
    """A file among the recipes.

    Args:
        name: name to ask for it by, such as `tiny`.
        path: the file.
        about: the first sentence of the comment at its head.
    """

    name: str
    path: Path
    about: str


def find_recipes() -> Path:
    """Return the folder of the recipes: inside the package if it is installed, in the root of a checkout if not."""
    packaged = _PACKAGE / "recipes"
    return packaged if packaged.is_dir() else _PACKAGE.parents[1] / "recipes"


def list_recipes() -> list[RecipeFile]:
    """Return the files that `slop init` copies: runs, then mixtures and experiments under their folder's name."""
    root = find_recipes()
    paths = [path.relative_to(root) for path in root.rglob("*.yaml")]
    paths = [path for path in paths if not set(path.parts) & set(_PARTS)]
    paths.sort(key=lambda path: (path.stem != "grow_tiny", len(path.parts) > 1, path.parts))
    return [RecipeFile(_name_recipe(path), root / path, read_first_sentence(root / path)) for path in paths]


def list_launch_configs() -> list[RecipeFile]:
    """Return the configurations of `accelerate launch`."""
    paths = sorted((find_recipes() / "accelerate").glob("*.yaml"))
    return [
        RecipeFile(
            _LAUNCHES.get(path.stem, path.stem.replace("_", "-")), path, read_first_sentence(path).partition(";")[0]
        )
        for path in paths
    ]


def _name_recipe(path: Path) -> str:
    """Return the name of a recipe by its path below the folder of the recipes.

    >>> _name_recipe(Path("grow_7b_13b.yaml")), _name_recipe(Path("data/fineweb_edu.yaml"))
    ('7b-13b', 'data/fineweb-edu')
    """
    return path.with_name(path.stem.removeprefix("grow_").replace("_", "-")).as_posix()


def read_first_sentence(path: Path) -> str:
    """Return the first sentence of the comment at the head of a file, without its full stop."""
    words: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):  # the end of the comment, or a command in it
            break
        words += line[2:].split()
        if end := re.search(r"\.( |$)|:$", text := " ".join(words)):
            return text[: end.start()]
    return " ".join(words)


def find_recipe(name: str) -> RecipeFile:
    """Return a recipe by its name.

    Raises:
        RunError: if there is none of that name.
    """
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    if name not in recipes:
        alternatives = describe_alternatives(name, recipes, list_all=False)
        raise RunError(f"there is no recipe {name!r}{alternatives}; `slop init` lists them")
    return recipes[name]


def find_launch_config(name: str) -> Path:
    """Return the file of a launch configuration: one of ours by its name, or else a path.

    Raises:
        RunError: if there is neither.
    """
    configs = {config.name: config.path for config in list_launch_configs()}
    if name in configs:
        return configs[name]
    if not Path(name).is_file():
        alternatives = describe_alternatives(name, configs)
        raise RunError(f"--config {name}: neither a launch configuration nor a file{alternatives}")
    return Path(name)


def find_deepspeed_file(config: Path) -> Path | None:
    """Return the DeepSpeed configuration that one of our launch configurations names.

    accelerate looks for it in the working directory, where a checkout would have it.

    Returns:
        The file; None if the configuration names none, or is not one of ours.
    """
    root = find_recipes()
    content = parse_yaml(config.read_text(encoding="utf-8"), where=str(config), error=RunError)
    settings = content.get("deepspeed_config") if isinstance(content, dict) else None
    named = settings.get("deepspeed_config_file") if isinstance(settings, dict) else None
    if not isinstance(named, str) or not config.is_relative_to(root):
        return None
    return root.parent / named if (root.parent / named).is_file() else root / Path(named).relative_to("recipes")


def plan_copies(recipe: Path, output: Path) -> dict[Path, str]:
    """Return the files that a copy of a recipe consists of, with their text.

    The files that it names, such as the mixture of a run, are copied next to it. In comments, the paths of the recipes
    become those of the copies.

    Args:
        recipe: file among the recipes.
        output: file to write.

    Returns:
        The text of each file; the recipe's own comes first.
    """
    root = find_recipes()
    targets, texts = {recipe: output}, {}
    waiting = [recipe]
    while waiting:
        source = waiting.pop(0)
        lines = source.read_text(encoding="utf-8").splitlines()
        for number, line in enumerate(lines):
            value, mark, comment = line.partition("#")
            for name in _YAML_NAME.findall(value):
                named = (source.parent / name).resolve()
                if not named.is_file():
                    continue
                if named not in targets:
                    taken = {target.name for target in targets.values()}
                    new = named.name if named.name not in taken else f"{named.parent.name}-{named.name}"
                    targets[named] = output.with_name(new)
                    waiting.append(named)
                value = value.replace(name, targets[named].name)
            lines[number] = value + mark + comment
        texts[source] = "\n".join(lines) + "\n"
    copies = {}
    for source, text in texts.items():
        for original, target in targets.items():
            text = text.replace(f"recipes/{original.relative_to(root).as_posix()}", str(target))
        copies[targets[source]] = text
    return copies
