"""Program that trains a run and scores its stages: `python launched_stages.py CONFIG OUTPUT DATASETS`."""

import os
import sys

from slop_hf import EvalSettings, EvaluateStages, RunConfig, build_trainer, prepare_data
from slop_hf.evaluation.held_out import HeldOut
from slop_hf.training.launch import guard_exit

if __name__ == "__main__":
    config, output, datasets = sys.argv[1:]
    with guard_exit():
        on_cpu = "ACCELERATE_USE_DEEPSPEED" not in os.environ  # DeepSpeed finds the CPU by itself
        run = RunConfig.from_yaml(config, {"training.use_cpu": on_cpu, "model.max_position_embeddings": 128})
        held_out = HeldOut.from_corpus(prepare_data(run.data, progress=False))
        settings = EvalSettings(
            ("perplexity", "piqa"), held_out=held_out, cache_dir=f"{output}-results", datasets=datasets
        )
        build_trainer(run, output, callbacks=[EvaluateStages(settings, after_growth=True)]).train()
