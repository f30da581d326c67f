"""Packages that a machine without a network lacks, and the wheels to bring there.

python benchmarks/gpu/packages.py --list > there.txt    # there: what is installed, as `name==version`
python benchmarks/gpu/packages.py there.txt wheels/     # here, with a network: what is missing, as wheels that fit

The wheels fit the interpreter and the versions of `there.txt`: only what our requirements lack there is downloaded,
with what that needs. Nothing but Python is needed to run this file, besides pip and `packaging` there.
"""

from __future__ import annotations

import argparse
import email
import platform
import re
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT_MIB = 64
#: What the tests need besides the package's own requirements.
FOR_TESTS = ("pytest>=8.2", "hypothesis>=6.100")
_PYTHON = "# python "
_REQUIREMENT = re.compile(r'^\s*"([A-Za-z0-9._-]+)([^";]*)[^"]*",$', re.MULTILINE)
#: Wheels for these systems run on any Linux from 2019 on; pip matches each name exactly.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17, 12, 5)]
_PLATFORMS += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64"]


def read_requirements(pyproject: Path = ROOT / "pyproject.toml") -> list[str]:
    """Return the requirements of the package, and of its tests.

    Read by a pattern: Python 3.10 has no parser of TOML.
    """
    text = pyproject.read_text(encoding="utf-8")
    section = text.split("\ndependencies = [", 1)[1].split("\n]", 1)[0]
    return [name + versions for name, versions in _REQUIREMENT.findall(section)] + list(FOR_TESTS)


def find_missing(requirements: Sequence[str], installed: Mapping[str, str]) -> list[str]:
    """Return the requirements that the installed packages do not meet.

    Args:
        installed: versions by normalised name.

    >>> find_missing(["rich>=13", "lazy-loader>=0.4", "tqdm"], {"rich": "12.1", "lazy-loader": "0.5"})
    ['rich>=13', 'tqdm']
    """
    from packaging.requirements import Requirement

    missing = []
    for text in requirements:
        requirement = Requirement(text)
        version = installed.get(normalise(requirement.name))
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing.append(text)
    return missing


def normalise(name: str) -> str:
    """Return a package's name as indexes compare it.

    >>> normalise("Lazy_Loader")
    'lazy-loader'
    """
    return re.sub(r"[-_.]+", "-", name).lower()


def list_installed() -> dict[str, str]:
    """Return the versions of the packages that this interpreter sees, by normalised name."""
    found = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(normalise(name), distribution.version)
    return dict(sorted(found.items()))


def format_list(installed: Mapping[str, str], python: str) -> str:
    """Return the list that `--list` prints; `parse_list` reads it."""
    lines = [f"{_PYTHON}{python}", *(f"{name}=={version}" for name, version in installed.items())]
    return "\n".join(lines) + "\n"


def parse_list(text: str) -> tuple[str, dict[str, str]]:
    """Return the Python version, such as "3.12", and the installed versions of a list.

    Raises:
        SystemExit: if it is not such a list.
    """
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not lines or not lines[0].startswith(_PYTHON):
        raise SystemExit("not a list of packages: make it with `python benchmarks/gpu/packages.py --list`, there")
    pairs = (line.split("==", 1) for line in lines[1:] if "==" in line)
    return lines[0].removeprefix(_PYTHON), {name: version for name, version in pairs}


def explain_missing(missing: Sequence[str]) -> str:
    """Return what to do about missing packages, in lines."""
    return (
        f"missing here: {', '.join(missing)}\n"
        "With a network, install them: python -m pip install " + " ".join(f"'{text}'" for text in missing) + "\n"
        "Without one, bring them as wheels:\n"
        "  here:            python benchmarks/gpu/packages.py --list > there.txt\n"
        "  with a network:  python benchmarks/gpu/packages.py there.txt wheels/\n"
        "  here:            python -m pip install --no-index --no-deps --target site wheels/*.whl\n"
        "                   PYTHONPATH=site python benchmarks/gpu/run.py"
    )


def download(python: str, installed: Mapping[str, str], requirements: Sequence[str], target: Path) -> list[Path]:
    """Download wheels that meet the requirements, and what those need that is not installed; return their paths.

    One wheel at a time: pip's own resolver tries hundreds of versions if nothing fits all that is installed.

    Raises:
        SystemExit: if there is no wheel for a requirement.
    """
    from packaging.requirements import Requirement

    target.mkdir(parents=True, exist_ok=True)
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
    environment |= {"platform_system": "Linux", "platform_machine": "x86_64", "extra": ""}
    wheels: dict[str, Path] = {}
    needed: dict[str, Requirement] = {}
    waiting = [Requirement(text) for text in requirements]
    while waiting:
        requirement = waiting.pop(0)
        name = normalise(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate(environment):
            continue
        if name in needed:  # another package needs it, too
            requirement.specifier &= needed[name].specifier
            needed[name] = requirement
        version = wheels[name].name.split("-")[1] if name in wheels else installed.get(name)
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            continue
        needed[name] = requirement
        if name in wheels:
            wheels[name].unlink()
        wheels[name] = _download_wheel(python, f"{requirement.name}{requirement.specifier}", target)
        waiting += [Requirement(text) for text in _read_needs(wheels[name])]
    return sorted(wheels.values())


def _download_wheel(python: str, requirement: str, target: Path) -> Path:
    before = set(target.iterdir())
    words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(target)]
    done = subprocess.run([*words, *_describe_target(python), requirement], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"no wheel for {requirement}:\n{done.stderr.strip()[-1000:]}")
    new = set(target.iterdir()) - before
    name = normalise(re.split(r"[^A-Za-z0-9._-]", requirement)[0])
    return next(path for path in [*new, *target.iterdir()] if normalise(path.name.split("-")[0]) == name)


def _read_needs(wheel: Path) -> list[str]:
    """Return the requirements that a wheel states."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        message = email.message_from_bytes(archive.read(path))
    return message.get_all("Requires-Dist") or []


def _describe_target(python: str) -> list[str]:
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    return ["--only-binary=:all:", "--python-version", python, "--implementation", "cp", *platforms]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print what is installed here, and exit")
    parser.add_argument("there", nargs="?", type=Path, help="the list of the machine without a network")
    parser.add_argument("wheels", nargs="?", type=Path, help="directory for the wheels")
    parser.add_argument("--limit-mib", type=float, default=LIMIT_MIB, help="largest sum of the wheels, in MiB")
    options = parser.parse_args(arguments)
    if options.list:
        print(format_list(list_installed(), ".".join(platform.python_version_tuple()[:2])), end="")
        return
    if options.there is None or options.wheels is None:
        parser.error("give the list of the other machine and a directory for the wheels, or --list")
    python, installed = parse_list(options.there.read_text(encoding="utf-8"))
    if not (missing := find_missing(read_requirements(), installed)):
        print("nothing is missing there")
        return
    wheels = download(python, installed, missing, options.wheels)
    mib = sum(path.stat().st_size for path in wheels) / 2**20
    print(f"{len(wheels)} wheels, {mib:.1f} MiB, for Python {python}: {', '.join(path.name for path in wheels)}")
    if mib > options.limit_mib:
        raise SystemExit(f"they are larger than {options.limit_mib:g} MiB: bring them in several parts")


if __name__ == "__main__":
    main()
