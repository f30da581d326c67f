"""Train a recipe under any launcher: the paper's 1B run, unless --config names another one.

accelerate launch recipes/grow_1b.py --dry-run                     # what it would do, offline
accelerate launch recipes/grow_1b.py                               # the same command with --resume after a kill
accelerate launch --config_file recipes/accelerate/eight_gpus_zero3.yaml recipes/grow_1b.py

Without a checkout, `accelerate launch -m slop_hf.launch run.yaml` does the same for a file that `slop init` wrote.
"""

from __future__ import annotations

from pathlib import Path

from slop_hf import launch

RECIPE = Path(__file__).with_suffix(".yaml")


def main() -> None:
    launch.launch_run(RECIPE, __doc__)


if __name__ == "__main__":
    main()
