"""The default growth law: src/slop_hf/cost/laws/default.yaml, made from benchmarks/results/growth_law.yaml.

python benchmarks/default_law.py            # writes it, in a second
python benchmarks/default_law.py --check    # changes nothing; exits 1 if the file is not the one that it would write

`python benchmarks/forecasts.py` makes the law fitted to all records. This command carries its effects of growth over
to the scale of real models, with the losses of one stage by Besiroglu et al. 2024 and by Hoffmann et al. 2022.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from slop_hf.cost.growth_law import GrowthLaw
from slop_hf.cost.law_transfer import transfer_growth
from slop_hf.cost.scaling_law import HOFFMANN, ScalingLaw
from slop_hf.errors import SlopError

ROOT = Path(__file__).parents[1]
FITTED, LAW = "benchmarks/results/growth_law.yaml", "src/slop_hf/cost/laws/default.yaml"


def build_law(root: Path) -> GrowthLaw:
    """Return the default law, from the one fitted to all records."""
    return transfer_growth(GrowthLaw.from_yaml(root / FITTED), [ScalingLaw(), HOFFMANN])


def main(arguments: Sequence[str] | None = None) -> int:
    """Write or check the law; return the exit code, 1 if `--check` finds another file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if the file is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="root of the repository")
    options = parser.parse_args(arguments)
    try:
        law = build_law(options.root)
        if not options.check:
            law.to_yaml(options.root / LAW)
        elif GrowthLaw.from_yaml(options.root / LAW) != law:
            print(f"{LAW} is out of date; run `python benchmarks/default_law.py`")
            return 1
    except SlopError as caught:
        print(f"error: {caught}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
