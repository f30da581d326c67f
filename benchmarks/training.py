"""Training beside plain Trainer, the disk and one process; `README.md` says what is measured, and how to read it.

python benchmarks/training.py                  # all parts that need no GPU, about half an hour
python benchmarks/training.py memory           # one part
python benchmarks/training.py gpu              # the 1B target on a CUDA device
python benchmarks/training.py --scale tiny     # to see that it works; the figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import training_boundary
import training_gpu
import training_memory
import training_steps
from growth import ROOT, goals_table
from measuring import Record, circumstances
from rich.console import Console
from training_setup import Context

from slop_hf.io.files import write_text
from slop_hf.io.serialization import to_json

PARTS = {
    "steps": training_steps,
    "boundary": training_boundary,
    "memory": training_memory,
    "gpu": training_gpu,
}
ALL = [name for name in PARTS if name != "gpu"]
OUTPUTS = {"full": ROOT / "benchmarks/results/training.json", "tiny": ROOT / "runs/benchmarks/training.json"}
IN_MEMORY = ("tmpfs", "ramfs")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(ALL)}; all of these (default); gpu")
    parser.add_argument("--scale", choices=OUTPUTS, default="full", help="tiny: small models, to try it out")
    parser.add_argument("--repetitions", type=int, help="of each measurement (full: steps, boundary, gpu 3, memory 2)")
    parser.add_argument("--output", type=Path, help="the record (full: benchmarks/results/training.json)")
    parser.add_argument(
        "--workdir", type=Path, help="where runs are written, on the disk to measure (default: $TMPDIR)"
    )
    parser.add_argument("--peak-tflops", type=float, help="gpu: peak in bf16 of a device that slop_hf does not know")
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - {*PARTS, "all"}
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}, all")
    if options.repetitions is not None and options.repetitions < 1:
        parser.error(f"--repetitions must be 1 or more, got {options.repetitions}")
    if not options.parts or "all" in options.parts:
        options.parts = [*ALL, *({"gpu"} & set(options.parts))]
    options.output = options.output or OUTPUTS[options.scale]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    console = Console()
    for part in options.parts:
        module = PARTS[part]
        repetitions = options.repetitions or module.REPETITIONS[options.scale]
        command = f"python benchmarks/training.py {part} --scale {options.scale} --repetitions {repetitions}"
        around = circumstances(options.scale, repetitions, command)
        console.print(f"[bold]{part}[/bold] ...")
        with tempfile.TemporaryDirectory(prefix="training-benchmark-", dir=options.workdir) as directory:
            around["machine"]["disk"] = disk = file_system(Path(directory))
            if disk in IN_MEMORY and part != "steps":
                console.print(f"[yellow]the runs lie in memory ({disk}): name a disk with --workdir[/yellow]")
            found = module.run(Context(options.scale, repetitions, Path(directory), options.peak_tflops))
        save(options.output, part, {**around, **found})
        for table in [*module.tables(found), goals_table(found)]:
            console.print(table)
    console.print(f"record: {options.output}")


def file_system(directory: Path) -> str:
    """The kind of file system that a directory lies on, as Linux names it; `unknown` elsewhere."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    mounts = {Path(words[1]): words[2] for words in (line.split() for line in lines)}
    place = directory.resolve()
    return next((mounts[one] for one in (place, *place.parents) if one in mounts), "unknown")


def save(path: Path, part: str, record: Record) -> None:
    """Put a part's record in the file in place of its last one; other parts keep theirs."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    records[part] = record
    write_text(path, to_json({name: records[name] for name in PARTS if name in records}))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that processes and gigabytes are removed
    main()
