"""The content of a wheel, and its use in an environment without a checkout."""

import doctest
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder
from hatchling.metadata.core import ProjectMetadata
from hatchling.plugin.manager import PluginManager

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\]\(([^)\s]+)\)")


def test_every_recipe_is_in_the_wheel():
    builder = WheelBuilder(str(ROOT))
    inside = {file.distribution_path for file in builder.recurse_included_files()}
    recipes = [path for path in (ROOT / "recipes").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    scripts = {path for path in recipes if path.suffix == ".py"}
    assert {path.name for path in scripts} == {"grow_1b.py", "demo.py", "smollm2_135m.py"}
    expected = {f"slop_hf/{path.relative_to(ROOT).as_posix()}" for path in {*recipes} - scripts}
    assert expected == {name for name in inside if name.startswith("slop_hf/recipes/")}
    assert {"slop_hf/launch.py", "slop_hf/py.typed", "slop_hf/families/llama.yaml"} <= inside
    assert all(name.startswith("slop_hf/") for name in inside)


def read_metadata(address):
    metadata = ProjectMetadata(str(ROOT), PluginManager())
    metadata.config["tool"]["hatch"]["metadata"]["hooks"]["custom"]["repository"] = address
    return metadata.core


def test_without_an_address_the_long_description_has_no_link_that_a_package_index_could_not_follow():
    metadata = read_metadata("")
    assert metadata.urls == {}
    assert [link for link in LINK.findall(metadata.readme) if not link.startswith(("#", "https://"))] == []
    assert "](docs/" not in metadata.readme and "docs/planning.md" in metadata.readme


def test_with_an_address_every_link_leads_to_a_file_of_the_repository():
    address = "https://github.com/me/slop-hf"
    metadata = read_metadata(address)
    links = [*LINK.findall(metadata.readme), *metadata.urls.values()]
    prefixes = (f"{address}/blob/main/", f"{address}/raw/main/")
    paths = [link.removeprefix(prefix) for link in links for prefix in prefixes if link.startswith(prefix)]
    assert len(paths) > 20
    assert [path for path in paths if not (ROOT / path.partition("#")[0]).exists()] == []
    others = [link for link in links if not link.startswith((*prefixes, "#"))]
    assert others == [address, f"{address}/issues"]


def test_examples_of_the_build_hook():
    spec = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    failed, attempted = doctest.testmod(hook)
    assert attempted and not failed


@pytest.mark.slow
def test_readmes_first_run_works_with_an_installed_wheel(tmp_path):
    """In a new environment that has only the dependencies in common with this one."""
    python = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels = tmp_path / "wheels"
    subprocess.run([*python, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT], check=True)
    venv.create(tmp_path / "env", with_pip=False)
    [packages] = (tmp_path / "env" / "lib").glob("python*/site-packages")
    [wheel] = wheels.glob("*.whl")
    subprocess.run([*python, "install", "--no-deps", "--target", packages, wheel], check=True)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    work = tmp_path / "work"
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*words):
        command = [tmp_path / "env" / "bin" / "python", "-P", "-m", *words]
        done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## A first run")[2]
    block = re.search(r"```bash\n(.*?)```", section, re.DOTALL)[1]
    (first, *others) = [shlex.split(line, comments=True)[1:] for line in block.splitlines()]
    assert [first[0], *(words[0] for words in others)] == ["init", "train", "status", "report", "sample"]
    run("slop_hf", *first)
    recipe = (work / "run.yaml").read_text()
    recipe = re.sub(r"tokens: \d{6}", "tokens: 8192", recipe)  # seconds instead of minutes
    recipe = recipe.replace("  held_out: 0.005", "  max_documents: 100\n  held_out: 0.05")
    (work / "run.yaml").write_text(recipe)
    texts = [run("slop_hf", *words) for words in others]
    assert "5 stages" in texts[0] and "finished" in texts[1] and texts[-1].startswith("def __init__(self")
    assert (work / "runs" / "run" / "report" / "report.html").is_file()
    assert len(json.loads(run("slop_hf.launch", "run.yaml", "--dry-run", "--output-dir", "new", "--json"))) == 5
    assert "runs/run" in run("slop_hf", "launch", "run.yaml", "--config", "one-gpu", "--dry-run")
