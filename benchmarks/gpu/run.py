"""Everything that is to be shown on a GPU, in nine minutes, the most important first; docs/gpu.md says what.

python benchmarks/gpu/run.py                   # all parts on the first GPU; the same as `make gpu`
python benchmarks/gpu/run.py speed             # one part
python benchmarks/gpu/run.py --rehearse        # all parts on the CPU at toy size, to see that they work

Works from a checkout, without installing it. Each part is a process with a time limit of its own, and writes its
record as it goes: benchmarks/results/gpu_PART.json, rehearsed runs/gpu/gpu_PART.json.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import packages

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
#: Shares of the minutes; a part that ends early leaves its rest to the next ones.
PARTS = {"runs": 0.18, "speed": 0.5, "growth": 0.32}
MINUTES, REHEARSAL_MINUTES = 9.0, 30.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--rehearse", action="store_true", help="run on the CPU at toy size, to see that it works")
    limits = f"default: {MINUTES:g}, rehearsed {REHEARSAL_MINUTES:g}"
    parser.add_argument("--minutes", type=float, help=f"time limit of all parts together ({limits})")
    parser.add_argument("--output-dir", type=Path, help="directory of the records")
    parser.add_argument(
        "--workdir", type=Path, help="directory for runs, on a disk with 40 GB free (default: $TMPDIR)"
    )
    parser.add_argument("--text", help="growth: text to train on, as data.source of a run")
    parser.add_argument("--cache-dir", help="growth: data.cache_dir with tokenized text, from `slop data tokenize`")
    parser.add_argument("--in-process", type=float, metavar="SECONDS", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}")
    if options.minutes is None:
        options.minutes = REHEARSAL_MINUTES if options.rehearse else MINUTES
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    options.parts = [part for part in PARTS if not options.parts or part in options.parts]
    options.output_dir = options.output_dir or ROOT / ("runs/gpu" if options.rehearse else "benchmarks/results")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; return the exit code, 1 if one of them failed or was cut off, 2 if none could begin."""
    options = parse(arguments)
    if missing := packages.find_missing(packages.read_requirements(), packages.list_installed()):
        print(packages.explain_missing(missing), file=sys.stderr)
        return 2
    environment = build_environment()
    if options.in_process is not None:
        run_here(options)
        return 0
    if not options.rehearse and not sees_gpu(environment):
        print("no CUDA device is visible: run this where nvidia-smi shows one, or with --rehearse", file=sys.stderr)
        return 2
    ends = time.monotonic() + 60 * options.minutes
    code = 0
    for number, part in enumerate(options.parts):
        rest = options.parts[number:]
        share = PARTS[part] / sum(PARTS[name] for name in rest)
        seconds = max(share * (ends - time.monotonic()), 1.0)
        print(f"{part} ({seconds:.0f} s at most) ...", flush=True)
        began = time.monotonic()
        fault = run_part(part, options, seconds, environment)
        took = time.monotonic() - began
        print(f"{part}: {fault or 'done'} after {took:.0f} s", flush=True)
        code = max(code, int(bool(fault)))
        path = options.output_dir / f"gpu_{part}.json"
        if path.is_file():
            finish_record(path, took, fault)
            show_goals(path)
    return code


def build_environment() -> dict[str, str]:
    """Return the environment of the parts: this checkout first, the first GPU only, offline."""
    paths = [ROOT / "src", HERE.parent, HERE, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    sys.path[:0] = [str(path) for path in paths[:3]]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True"),
    }


def sees_gpu(environment: dict[str, str]) -> bool:
    """Whether torch sees a CUDA device. A new process looks, since this one must hold no memory of the device."""
    program = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def run_part(part: str, options: argparse.Namespace, seconds: float, environment: dict[str, str]) -> str | None:
    """Run a part in a new process; return what went wrong, or None."""
    with tempfile.TemporaryDirectory(prefix="slop-gpu-", dir=options.workdir, ignore_cleanup_errors=True) as directory:
        words = [sys.executable, str(HERE / "run.py"), part, "--in-process", str(seconds), "--workdir", directory]
        words += ["--output-dir", str(options.output_dir)]
        words += ["--rehearse"] if options.rehearse else []
        for name, value in (("text", options.text), ("cache-dir", options.cache_dir)):
            words += [] if value is None else [f"--{name}", value]
        process = subprocess.Popen(words, env=environment, start_new_session=True)
        try:
            code = process.wait(seconds)
            return f"failed with code {code}" if code else None
        except subprocess.TimeoutExpired:
            return "cut off"
        finally:  # not by SIGTERM, after which a trainer would write its state first
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def run_here(options: argparse.Namespace) -> None:
    """Run the one named part in this process."""
    from common import Settings

    (part,) = options.parts
    settings = Settings(
        rehearses=options.rehearse,
        output=options.output_dir / f"gpu_{part}.json",
        workdir=options.workdir,
        seconds=options.in_process,
        text=options.text,
        cache=options.cache_dir,
    )
    program = importlib.import_module(f"part_{part}")
    gc.freeze()  # each stage collects garbage; that takes a second if the imported modules are searched too
    program.run(settings)


def finish_record(path: Path, seconds: float, fault: str | None) -> None:
    """Add to a record how long its part took, and what went wrong."""
    from slop_hf.io.files import write_text
    from slop_hf.io.serialization import to_json

    record = json.loads(path.read_text(encoding="utf-8"))
    if "arms" not in record:  # a comparison has its own form
        write_text(path, to_json({**record, "part_seconds": round(seconds, 1), "fault": fault}))


def show_goals(path: Path) -> None:
    """Print the goals of a record."""
    for goal in json.loads(path.read_text(encoding="utf-8")).get("goals", ()):
        verdict = "met" if goal["met"] else "NOT met"
        print(f"  {goal['goal']}: {goal['value']:.4g}, at most {goal['limit']:.4g}: {verdict}")
    print(f"  record: {path}")


if __name__ == "__main__":
    sys.exit(main())
