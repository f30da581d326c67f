"""Experiments: arms run side by side at equal budgets, and what came out of them.

| module | what it holds |
|---|---|
| `config` | `Experiment`: the YAML of a comparison |
| `arms` | the schedule of each arm, and the runs that the comparison consists of |
| `running` | trains them, on one device or several; what runs have in common is trained once |
| `record` | `Comparison`: all that was measured, with the ledger of what it cost |
| `results` | iso-loss savings, losses at equal FLOPs, spreads over seeds, rank correlations |
| `predictions` | what the planner predicted, beside what was measured |
| `tables`, `findings`, `figures`, `dots`, `write` | how a reader gets to see it |
| `comparing` | `compare_arms`: all of that, from runs to figures |
| `candidates` | what a probe may choose among: schedules, inits of a stage, stages that could come next |
| `probe` | `Probe`: short trial training that puts candidates into the order of what was measured |
| `probe_report`, `probe_table` | what came out of it, as one JSON file; as a table and sentences |
"""
