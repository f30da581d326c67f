"""The demo: plan, train through four growths, compare with training from scratch at equal FLOPs, report, sample.

make demo                                        # or:
python recipes/demo.py --output-dir runs/demo    # after a kill, the same command resumes
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import psutil
from rich.console import Console
from transformers import pipeline, set_seed
from transformers.utils import logging

from slop_hf import (
    ConfigSpace,
    GrowthSchedule,
    ModelDims,
    RunConfig,
    SlopPlanner,
    build_comparison_table,
    summarise,
    train_run,
    write_report,
)
from slop_hf.cli.wording import RecipeParser, run_recipe
from slop_hf.io.files import check_output
from slop_hf.io.units import format_duration
from slop_hf.report.summary import describe_outcomes

RECIPE = Path(__file__).parent / "grow_tiny.yaml"
INITIAL = ModelDims(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2)
TARGET = ModelDims(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4)
TOKENS = 1.2e6
PROMPT = "def __init__(self"


def plan(config: RunConfig, tokens: float) -> GrowthSchedule:
    """Find the best schedule from the recipe's initial structure to its target."""
    space = ConfigSpace(
        targets=[TARGET],
        config={"vocab_size": config.data.vocab_size, **config.model},
        sequence_length=config.data.block_size,
    )
    planner = SlopPlanner(INITIAL, space, operators=("layer", "ffn", "hidden", "mha"))
    return planner.plan(top_k=1, tokens=tokens)[0]


def build_parser() -> RecipeParser:
    parser = RecipeParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--output-dir", type=Path, default=Path("runs/demo"), help="directory of the runs and the report (%(default)s)"
    )
    parser.add_argument("--tokens", type=float, default=TOKENS, help="training tokens of the staged run (%(default)g)")
    return parser


def run(options: argparse.Namespace) -> None:
    check_output(options.output_dir, "--output-dir", is_directory=True)
    config = RunConfig.from_yaml(RECIPE)
    schedule = plan(config, options.tokens)
    print("plan:", schedule.sequence, " → ".join(str(dims) for dims in schedule.structures))
    config = config.with_schedule(schedule)

    runs = []
    for name, scratch in (("slop", False), ("from-scratch", True)):
        directory = options.output_dir / name
        print(f"\ntraining {directory}")
        runs.append(train_run(config, directory, scratch=scratch, resume=True))

    report = write_report([run.path for run in runs], options.output_dir / "report")
    summaries = [summarise(run) for run in runs]
    Console().print(build_comparison_table(summaries))
    print(f"written: {report}/report.html (everything), report.md (tables), loss.png and path.png (figures)")

    final = runs[0].stage_dir(len(schedule.stages))
    set_seed(0)
    logging.disable_progress_bar()
    write = pipeline("text-generation", model=str(final))
    sample = write(PROMPT, max_new_tokens=80, do_sample=True, temperature=0.7)[0]["generated_text"]
    print(f"\nsample from {final}:\n\n{sample}\n")
    for sentence in describe_outcomes(summaries):
        print(sentence)
    # With the imports, which take a part of a short demo.
    print(f"done in {format_duration(time.time() - psutil.Process().create_time())}")


def main() -> None:
    run_recipe(build_parser(), run)


if __name__ == "__main__":
    main()
