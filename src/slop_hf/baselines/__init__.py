"""Control arms: other schedules to a plan's target, at equal training FLOPs or equal tokens.

| arm            | begins with                     | grows                               | shares of tokens      |
|----------------|---------------------------------|-------------------------------------|-----------------------|
| `from_scratch` | the target, random              | nothing                             | all                   |
| `single_stage` | the plan's initial model        | everything at once                  | initial as the plan   |
| `copies`       | the plan's initial model        | everything at once, by copying      | initial as the plan   |
| `msg`          | the plan's initial model        | ffn, layers, hidden, heads, layers  | 1 : 1 : 1 : 1 : 1 : 5 |
| `elle`         | the plan's initial model        | width and depth, in every stage     | 25 : 8 : 8 : …        |
| `stacking`     | a quarter of the layers, random | layers, doubled twice               | 5 : 7 : 28            |

A growth that would change nothing is left out, and its share of the tokens goes to the model before it. A plan
without initial tokens begins with a pretrained model; arms that begin with the same model do not train it either. New
entries are initialised as in the plan, so that arms differ in nothing but their schedules; `copies` is the exception,
since its init is the subject of the comparison.
"""

from .arms import ARMS, FROM_RANDOM, copies, elle, from_scratch, msg, single_stage, stacking
from .comparison import Arm, compare_at_equal_flops, is_growth_favoured
from .equal_budget import ArmRequest, BudgetKind

__all__ = [
    "ARMS",
    "FROM_RANDOM",
    "Arm",
    "ArmRequest",
    "BudgetKind",
    "compare_at_equal_flops",
    "copies",
    "elle",
    "from_scratch",
    "is_growth_favoured",
    "msg",
    "single_stage",
    "stacking",
]
