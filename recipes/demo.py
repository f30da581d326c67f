"""The demo: plan, train through four growths, compare with training from scratch at equal FLOPs, report, sample.

make demo                                        # or
python recipes/demo.py --output-dir runs/demo    # again after a kill: it goes on where it stopped
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from rich.console import Console
from transformers import pipeline, set_seed
from transformers.utils import logging

from slop_hf import (
    ConfigSpace,
    GrowthSchedule,
    ModelDims,
    RunConfig,
    RunDirectory,
    SlopPlanner,
    build_trainer,
    comparison_table,
    summarise,
    write_report,
)

RECIPE = Path(__file__).parent / "grow_tiny.yaml"
INITIAL = ModelDims(hidden_size=64, intermediate_size=192, num_hidden_layers=2, num_attention_heads=2)
TARGET = ModelDims(hidden_size=128, intermediate_size=384, num_hidden_layers=6, num_attention_heads=4)
TOKENS = 1.2e6
PROMPT = "def __init__(self"


def plan(config: RunConfig, tokens: float) -> GrowthSchedule:
    """The planner's best schedule from the recipe's initial structure to its target."""
    space = ConfigSpace(
        targets=[TARGET],
        config={"vocab_size": config.data.vocab_size, **config.model},
        sequence_length=config.data.block_size,
    )
    planner = SlopPlanner(INITIAL, space, operators=("layer", "ffn", "hidden", "mha"))
    return planner.plan(top_k=1, tokens=tokens)[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--tokens", type=float, default=TOKENS, help="training tokens of the staged run")
    options = parser.parse_args()
    began = time.perf_counter()

    config = RunConfig.from_yaml(RECIPE)
    schedule = plan(config, options.tokens)
    print("plan:", schedule.sequence, " → ".join(str(dims) for dims in schedule.structures))
    config = config.with_schedule(schedule)

    runs = [options.output_dir / "slop", options.output_dir / "from-scratch"]
    for run, scratch in zip(runs, (False, True), strict=True):
        print(f"\n{run}: training")
        trainer = build_trainer(config, run, scratch=scratch)
        trainer.train(resume_from_checkpoint=RunDirectory(run).exists)

    report = write_report(runs, options.output_dir / "report")
    Console().print(comparison_table([summarise(RunDirectory(run)) for run in runs]))
    print(f"figures: {report}/loss.png and {report}/path.png; tables: {report}/report.md; all: {report}/report.html")

    final = RunDirectory(runs[0]).stage_dir(len(schedule.stages))
    set_seed(0)
    logging.disable_progress_bar()
    write = pipeline("text-generation", model=str(final))
    sample = write(PROMPT, max_new_tokens=80, do_sample=True, temperature=0.7)[0]["generated_text"]
    print(f"\na sample from {final}:\n\n{sample}\n")
    print(f"done in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
