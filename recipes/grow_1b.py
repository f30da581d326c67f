"""Train a recipe through its growths, under any launcher; the paper's 1B run unless --config names another.

accelerate launch recipes/grow_1b.py --dry-run                     # what it would do, offline
accelerate launch recipes/grow_1b.py                               # again with --resume after a kill
accelerate launch --config_file recipes/accelerate/eight_gpus_zero3.yaml recipes/grow_1b.py
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

from slop_hf import RunConfig, SlopError
from slop_hf.cli.run_view import read_changes, show_outcome, show_preview, train_run

RECIPE = Path(__file__).with_suffix(".yaml")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=RECIPE, help="the run as YAML: schedule, model, data, training (%(default)s)")
    add("--output-dir", type=Path, help="directory of the run (runs/ and the name of the config)")
    add("--resume", action="store_true", help="go on with the run in the output directory, or begin if there is none")
    add("--from-scratch", action="store_true", help="train the target from random weights with the same FLOPs instead")
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value: data.source=texts/ (repeat it)",
    )
    add("--dry-run", action="store_true", help="print stages, tokens, FLOPs, steps and memory, and train nothing")
    add("--devices", type=int, default=1, help="with --dry-run: devices that share the work (%(default)s)")
    add("--zero-stage", type=int, default=0, help="with --dry-run: the stage of ZeRO, 0 to 3, they use (%(default)s)")
    add("--json", action="store_true", help="print the stages' records (or the plan) as JSON")
    options = parser.parse_args()
    options.output_dir = options.output_dir or Path("runs", options.config.stem)
    return options


def run(options: argparse.Namespace) -> None:
    config = RunConfig.from_yaml(options.config, read_changes(options.set))
    output, scratch, is_main = options.output_dir, options.from_scratch, os.environ.get("RANK", "0") == "0"
    if options.dry_run:
        # Under DeepSpeed arguments bring the ranks together, so all of them ask; one prints.
        with nullcontext() if is_main else redirect_stdout(io.StringIO()):
            shared = {"devices": options.devices, "zero_stage": options.zero_stage}
            show_preview(config, output, scratch=scratch, as_json=options.json, **shared)
        return
    # What transformers prints while it trains would get into the JSON.
    with redirect_stdout(sys.stderr) if options.json else nullcontext():
        train_run(config, output, scratch=scratch, resume=options.resume)
    if is_main:
        show_outcome(output, as_json=options.json)


def main() -> None:
    try:
        run(arguments())
    except SlopError as caught:
        print(f"error: {caught}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
