"""What a wheel holds, and that it works in an environment without a checkout."""

import json
import os
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]


def test_every_recipe_is_in_the_wheel():
    builder = WheelBuilder(str(ROOT))
    inside = {file.distribution_path for file in builder.recurse_included_files()}
    recipes = [path for path in (ROOT / "recipes").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    scripts = {path for path in recipes if path.suffix == ".py"}
    assert {path.name for path in scripts} == {"grow_1b.py", "demo.py"}
    expected = {f"slop_hf/{path.relative_to(ROOT).as_posix()}" for path in {*recipes} - scripts}
    assert expected == {name for name in inside if name.startswith("slop_hf/recipes/")}
    assert {"slop_hf/launch.py", "slop_hf/py.typed", "slop_hf/families/llama.yaml"} <= inside
    assert all(name.startswith("slop_hf/") for name in inside)


@pytest.mark.slow
def test_an_installed_wheel_trains_the_tiny_recipe(tmp_path):
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

    def slop(*words):
        return run("slop_hf", *words)

    assert run("slop_hf.launch", "--help") and "tiny" in slop("init")
    slop("init", "tiny", "-o", "run.yaml")
    recipe = (work / "run.yaml").read_text()
    (work / "run.yaml").write_text(re.sub(r"tokens: \d{6}", "tokens: 8192", recipe))  # seconds instead of minutes
    slop("train", "run.yaml")
    assert len(json.loads(run("slop_hf.launch", "run.yaml", "--dry-run", "--output-dir", "new", "--json"))) == 5
    slop("report", "runs/run")
    assert (work / "runs" / "run" / "report" / "report.html").is_file()
