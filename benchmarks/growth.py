"""Growth compared with its peers and the limits of the machine; `README.md` says what is measured.

python benchmarks/growth.py                  # everything, some tens of minutes, on an otherwise idle machine
python benchmarks/growth.py memory           # one part
python benchmarks/growth.py --scale tiny     # everything in a minute, to see that it works; the numbers mean nothing
"""

from __future__ import annotations

import argparse
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
from measuring import Context, build_goals_table, describe_circumstances, make_parser, read_options, save_part
from rich.console import Console
from transformers.models.llama import modeling_llama  # noqa: F401 - a lazy import would count as work

PARTS = {
    "memory": growth_memory,
    "checkpoint": growth_checkpoint,
    "mergekit": growth_mergekit,
    "scaling": growth_scaling,
}
REPETITIONS = {"full": 3, "tiny": 1}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = make_parser("growth", __doc__)
    parser.add_argument("parts", nargs="*", metavar="part", help=f"{', '.join(PARTS)}, or all (default)")
    parser.add_argument(
        "--environment",
        type=Path,
        default=Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "slop_hf/mergekit",
        help="virtual environment of mergekit, created if it is missing",
    )
    names = list(PARTS)
    return read_options(parser, "growth", arguments, repetitions=REPETITIONS, parts=names, default_parts=names)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    console = Console()
    for part in options.parts:
        command = f"python benchmarks/growth.py {part} --scale {options.scale} --repetitions {options.repetitions}"
        circumstances = describe_circumstances(options.scale, options.repetitions, command)
        console.print(f"[bold]{part}[/bold] ...")
        with tempfile.TemporaryDirectory(prefix="growth-benchmark-", dir=options.workdir) as directory:
            context = Context(
                options.scale,
                options.repetitions,
                Path(directory),
                environment=options.environment.absolute(),
                figure=options.output.with_name(f"{options.output.stem}_scaling.png"),
            )
            record = PARTS[part].run(context)
        save_part(options.output, part, {**circumstances, **record}, PARTS)
        for table in [*PARTS[part].build_tables(record), build_goals_table(record)]:
            if table.row_count:
                console.print(table)
    console.print(f"record: {options.output}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # so that gigabytes of checkpoints are removed
    main()
