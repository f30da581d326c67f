"""Experiments: arms run at equal budgets and compared.

| module | contents |
|---|---|
| `config` | `Experiment`: the YAML file of a comparison |
| `arms` | the schedule of each arm at each budget |
| `jobs` | `Job`: one run of an arm, or a prefix or trunk that several runs share |
| `trunks` | the tree of steps that runs have in common |
| `progress` | `Progress`: what a run has cost up to a step |
| `running` | trains the jobs, on one device or several |
| `collect` | reads the finished runs into a `Comparison` |
| `earlier_records` | completes records of earlier releases |
| `comparison` | `Comparison`: all measurements and the compute ledger, as one JSON file |
| `results` | FLOPs saved, losses at equal budgets, spreads over seeds, rank correlations |
| `planner_accuracy` | the planner's predictions and the measurements |
| `tables`, `summary_text`, `loss_curves`, `final_losses` | tables, sentences and figures |
| `write` | `compare_arms`: from an experiment to a directory with all of these |
"""
