"""Control arms: the schedules that a growth plan is set beside, at equal training FLOPs or equal tokens.

| arm            | begins with                     | grows                               | shares of tokens      |
|----------------|---------------------------------|-------------------------------------|-----------------------|
| `from_scratch` | the target, random              | nothing                             | all                   |
| `single_stage` | the plan's initial model        | everything at once                  | initial as the plan   |
| `copies`       | the plan's initial model        | everything at once, by copying      | initial as the plan   |
| `msg`          | the plan's initial model        | ffn, layers, hidden, heads, layers  | 1 : 1 : 1 : 1 : 1 : 5 |
| `elle`         | the plan's initial model        | width and depth, in every stage     | 25 : 8 : 8 : …        |
| `stacking`     | a quarter of the layers, random | layers, doubled twice               | 5 : 7 : 28            |

A growth that would change nothing is left out, and its share of the tokens stays with the model that trains on.
A plan without initial tokens begins with a pretrained model: then arms that begin with it do not train it either.
New entries are initialised as the plan initialises them, so that arms differ in their schedules alone; but for
`copies`, which is about that.
"""

from .arms import ARMS, FROM_RANDOM, copies, elle, from_scratch, msg, single_stage, stacking
from .comparison import Arm, compare, favours_growth
from .equal_budget import BudgetKind, at_equal_flops

__all__ = [
    "ARMS",
    "FROM_RANDOM",
    "Arm",
    "BudgetKind",
    "at_equal_flops",
    "compare",
    "copies",
    "elle",
    "favours_growth",
    "from_scratch",
    "msg",
    "single_stage",
    "stacking",
]
