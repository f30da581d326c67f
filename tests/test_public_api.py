"""The names that `import slop_hf` offers."""

from __future__ import annotations

import ast
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import slop_hf


@pytest.mark.parametrize("name", slop_hf.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(slop_hf, name).__name__ == name


def test_dir_lists_the_public_names() -> None:
    assert set(slop_hf.__all__) <= set(dir(slop_hf))


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(slop_hf.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    imports = [node for block in blocks for node in block.body if isinstance(node, ast.ImportFrom)]
    assert sorted(alias.name for node in imports for alias in node.names) == slop_hf.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'SlopPlaner'"):
        slop_hf.SlopPlaner  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    try:
        installed = version("slop-hf")
    except PackageNotFoundError:
        pytest.skip("slop-hf is not installed")
    assert slop_hf.__version__ == installed
