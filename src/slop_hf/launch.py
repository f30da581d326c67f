"""Train a run file under any launcher.

    accelerate launch -m slop_hf.launch run.yaml              # after a kill: the same command with --resume
    torchrun --nproc_per_node 8 -m slop_hf.launch run.yaml
    python -m slop_hf.launch run.yaml --dry-run               # stages, steps and memory; trains nothing

`slop launch run.yaml --config zero3-8gpu` is the first of these with a configuration that comes with slop-hf.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slop_hf import RunConfig, train_run

from .cli.options import read_changes
from .cli.train import check_run_options, choose_run_directory, show_end, show_preview
from .cli.wording import RecipeParser, run_recipe
from .training.launch import guard_exit


def build_parser(recipe: Path | None = None, description: str | None = None) -> RecipeParser:
    """Return the parser of the command line.

    Args:
        recipe: run file that is trained unless `--config` names another one; None: the first argument names it.
        description: what `--help` says first; by default, the docstring of this module.
    """
    parser = RecipeParser(
        prog=None if recipe else "python -m slop_hf.launch",
        description=description or __doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    if recipe is None:
        add("config", type=Path, help="YAML file of the run; `slop init` writes one")
    else:
        add("--config", type=Path, default=recipe, help="YAML file of the run (default: %(default)s)")
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
    """Train the run that the options describe, or show what it would do."""
    output = options.output_dir or choose_run_directory(options.config)
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


def launch_run(recipe: Path | None = None, description: str | None = None) -> None:
    """Run the command line; the arguments are those of `build_parser`."""
    run_recipe(build_parser(recipe, description), run)


if __name__ == "__main__":
    launch_run()
