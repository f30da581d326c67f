"""Evaluation of models: tasks of lm-eval, and exact perplexity on held-out text.

    tasks         names of tasks, the paper's among them; without torch
    settings      `EvalSettings`
    held_out      held-out text and exact perplexity
    lm_eval       scores on tasks of lm-eval (the only file that imports it)
    cache         cache of results, keyed by weights and settings
    scoring       `evaluate_model`
    runs          `evaluate_run`; `EvaluateStages`, which scores stages while the run trains
    measurements  perplexity and marginal utility for the library `evaluate`

Import from these modules, or from `slop_hf`: this file imports nothing, so that `slop eval --help` answers at once.
"""
