"""Training compared with plain Trainer, the disk and one process; `README.md` says what is measured.

python benchmarks/training.py                  # all parts, about half an hour
python benchmarks/training.py memory           # one part
python benchmarks/training.py --scale tiny     # to see that it works; the numbers mean nothing
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import training_boundary
import training_memory
import training_settings
import training_steps
from measuring import Context, build_goals_table, describe_circumstances, make_parser, read_options, save_part
from rich.console import Console

PARTS = {
    "steps": training_steps,
    "boundary": training_boundary,
    "memory": training_memory,
    "settings": training_settings,
}
IN_MEMORY = ("tmpfs", "ramfs")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("training", __doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}, or all (default)")
    return read_options(parser, "training", arguments, parts=list(PARTS), default_parts=list(PARTS))


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    console = Console()
    for part in options.parts:
        module = PARTS[part]
        repetitions = options.repetitions or module.REPETITIONS[options.scale]
        command = f"python benchmarks/training.py {part} --scale {options.scale} --repetitions {repetitions}"
        circumstances = describe_circumstances(options.scale, repetitions, command)
        console.print(f"[bold]{part}[/bold] ...")
        with tempfile.TemporaryDirectory(prefix="training-benchmark-", dir=options.workdir) as directory:
            circumstances["machine"]["disk"] = disk = find_file_system(Path(directory))
            if disk in IN_MEMORY and part not in ("steps", "settings"):
                console.print(f"[yellow]the runs lie in memory ({disk}): name a disk with --workdir[/yellow]")
            context = Context(options.scale, repetitions, Path(directory))
            record = module.run(context)
        save_part(options.output, part, {**circumstances, **record}, PARTS)
        for table in [*module.build_tables(record), build_goals_table(record)]:
            console.print(table)
    console.print(f"record: {options.output}")


def find_file_system(directory: Path) -> str:
    """Return the type of file system that holds a directory, as Linux names it; `unknown` elsewhere."""
    try:
        lines = Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "unknown"
    mounts = {Path(words[1]): words[2] for words in (line.split() for line in lines)}
    path = directory.resolve()
    return next((mounts[parent] for parent in (path, *path.parents) if parent in mounts), "unknown")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that processes and gigabytes are removed
    main()
