"""Train a recipe under any launcher: the paper's 1B run, unless --config names another one.

accelerate launch recipes/grow_1b.py --dry-run                     # what it would do, offline
accelerate launch recipes/grow_1b.py                               # the same command with --resume after a kill
accelerate launch --config_file recipes/accelerate/eight_gpus_zero3.yaml recipes/grow_1b.py
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slop_hf import RunConfig, train_run
from slop_hf.cli.options import read_changes
from slop_hf.cli.train import check_run_options, show_end, show_preview
from slop_hf.cli.wording import RecipeParser, run_recipe
from slop_hf.training.launch import guard_exit

RECIPE = Path(__file__).with_suffix(".yaml")


def build_parser() -> RecipeParser:
    parser = RecipeParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=RECIPE, help="YAML file of the run (default: %(default)s)")
    add("--output-dir", type=Path, help="run directory (default: runs/ and the name of the config)")
    add("--resume", action="store_true", help="resume the run in the output directory, or begin if there is none")
    add("--from-scratch", action="store_true", help="train the target from random weights with the same FLOPs instead")
    add("--set", action="append", metavar="KEY=VALUE", help="change a value: data.source=texts/; repeat it for more")
    add("--dry-run", action="store_true", help="print stages, tokens, FLOPs, steps and memory; train nothing")
    add("--devices", type=int, help="with --dry-run: number of devices (default: 1)")
    add("--zero-stage", type=int, choices=range(4), help="with --dry-run: ZeRO stage, 0 to 3 (default: 0)")
    add("--json", action="store_true", help="print the records of the stages, or the plan, as JSON")
    return parser


def run(options: argparse.Namespace) -> None:
    output = options.output_dir or Path("runs", options.config.stem)
    devices, zero_stage = options.devices, options.zero_stage
    check_run_options(options.config, output, devices, zero_stage, dry_run=options.dry_run, option="--output-dir")
    config = RunConfig.from_yaml(options.config, read_changes(options.set))
    scratch, as_json = options.from_scratch, options.json
    if options.dry_run:
        sizes = {"devices": devices or 1, "zero_stage": zero_stage or 0}
        show_preview(config, output, scratch=scratch, **sizes, as_json=as_json)
        return
    with guard_exit(), show_end(output, as_json=as_json):
        train_run(config, output, scratch=scratch, resume=options.resume, report=print)


def main() -> None:
    run_recipe(build_parser(), run)


if __name__ == "__main__":
    main()
