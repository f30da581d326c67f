"""Scores of models: tasks of lm-eval, and exact perplexity on held-out text.

    tasks        which tasks there are by name, the paper's among them; no torch
    settings     `EvalSettings`: what to score, and how
    held_out     blocks of held-out text by source, and their exact perplexity
    harness      lm-eval (the only file that imports it)
    cache        results, by weights and settings
    scoring      `evaluate_model`
    runs         `evaluate_run`, and `EvaluateStages`, which does it while a run trains
    measurements perplexity and marginal utility for the library `evaluate`

Import from these modules, or from `slop_hf`: this file imports nothing, so that `slop eval --help` answers at once.
"""
