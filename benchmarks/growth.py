"""Growth beside its peers and the limits of the machine; `README.md` says what is measured, and how to read it.

python benchmarks/growth.py                  # everything, some tens of minutes, on a machine that does nothing else
python benchmarks/growth.py memory           # one part
python benchmarks/growth.py --scale tiny     # everything in a minute, to see that it works; the figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import growth_checkpoint
import growth_memory
import growth_mergekit
import growth_scaling
from measuring import Context, Record, circumstances
from rich.console import Console
from rich.table import Table
from transformers.models.llama import modeling_llama  # noqa: F401 - imported lazily, it would count as work

from slop_hf.io.files import write_text
from slop_hf.io.serialization import to_json

PARTS = {
    "memory": growth_memory,
    "checkpoint": growth_checkpoint,
    "mergekit": growth_mergekit,
    "scaling": growth_scaling,
}
ROOT = Path(__file__).parents[1]
OUTPUTS = {"full": ROOT / "benchmarks/results/growth.json", "tiny": ROOT / "runs/benchmarks/growth.json"}
REPETITIONS = {"full": 3, "tiny": 1}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}, or all (default)")
    parser.add_argument("--scale", choices=OUTPUTS, default="full", help="tiny: small models, to try it out")
    parser.add_argument("--repetitions", type=int, help="of each measurement; the median counts (full: 3, tiny: 1)")
    parser.add_argument("--output", type=Path, help="the record (full: benchmarks/results/growth.json)")
    parser.add_argument("--workdir", type=Path, help="where checkpoints go, on the disk to measure (default: $TMPDIR)")
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "slop_hf/mergekit",
        help="mergekit's virtual environment, made where it is missing",
    )
    options = parser.parse_args(arguments)
    unknown = set(options.parts) - {*PARTS, "all"}
    if unknown:
        parser.error(f"unknown part {', '.join(sorted(unknown))}; known: {', '.join(PARTS)}, all")
    if options.repetitions is not None and options.repetitions < 1:
        parser.error(f"--repetitions must be 1 or more, got {options.repetitions}")
    if not options.parts or "all" in options.parts:
        options.parts = list(PARTS)
    options.repetitions = options.repetitions or REPETITIONS[options.scale]
    options.output = options.output or OUTPUTS[options.scale]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    console = Console()
    for part in options.parts:
        command = f"python benchmarks/growth.py {part} --scale {options.scale} --repetitions {options.repetitions}"
        around = circumstances(options.scale, options.repetitions, command)
        console.print(f"[bold]{part}[/bold] ...")
        with tempfile.TemporaryDirectory(prefix="growth-benchmark-", dir=options.workdir) as directory:
            context = Context(
                options.scale,
                options.repetitions,
                Path(directory),
                options.environment.absolute(),
                options.output.with_name(f"{options.output.stem}_scaling.png"),
            )
            found = PARTS[part].run(context)
        save(options.output, part, {**around, **found})
        for table in [*PARTS[part].tables(found), goals_table(found)]:
            if table.row_count:
                console.print(table)
    console.print(f"record: {options.output}")


def save(path: Path, part: str, record: Record) -> None:
    """Put a part's record in the file in place of its last one; other parts keep theirs."""
    records = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    records[part] = record
    write_text(path, to_json({name: records[name] for name in PARTS if name in records}))


def goals_table(record: Record) -> Table:
    """The goals, and which are met."""
    table = Table("goal", "measured", "at most", "met", title="goals")
    for one in record["goals"]:
        large = one["limit"] > 2**20
        numbers = [f"{value / 2**30:.2f} GiB" if large else f"{value:.2f}" for value in (one["value"], one["limit"])]
        table.add_row(one["goal"], *numbers, "[green]yes[/green]" if one["met"] else "[red]no[/red]")
    return table


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that gigabytes of checkpoints are removed
    main()
