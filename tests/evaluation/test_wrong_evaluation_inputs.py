"""Wrong inputs of evaluation, experiments, probes and reports from Python: each is a SlopError, before any work."""

from __future__ import annotations

import copy
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from benchmark_data import TEXTS
from safetensors.torch import load_file, save_file

from slop_hf import (
    EvalSettings,
    EvaluateStages,
    Experiment,
    GrowthSchedule,
    GrowthStage,
    ModelDims,
    Probe,
    RunConfig,
    RunDirectory,
    compare_arms,
    evaluate_model,
    evaluate_run,
    write_report,
)
from slop_hf.errors import SlopError
from slop_hf.evaluation import measurements
from slop_hf.evaluation.held_out import HeldOut, measure_perplexity
from slop_hf.experiments.comparison import Comparison
from slop_hf.experiments.jobs import build_jobs
from slop_hf.experiments.running import check_jobs
from slop_hf.probing.candidates import Start, build_init_candidates, build_next_candidates, plan_candidates
from slop_hf.report import compute_marginal_utility, summarise
from slop_hf.runs.records import StageRecord

SMALL = ModelDims(16, 32, 2, 2)
DEEP = SMALL.replace(num_hidden_layers=3)
SCHEDULE = GrowthSchedule(
    SMALL,
    (
        GrowthStage(("layer",), DEEP, 64),
        GrowthStage(("ffn",), DEEP.replace(intermediate_size=48), 64),
    ),
    initial_tokens=64,
)
RUN: dict[str, Any] = {
    "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
    "data": {"source": "python-stdlib", "vocab_size": 300, "block_size": 32, "held_out": 0.2},
    "training": {"per_device_train_batch_size": 2, "use_cpu": True},
}
EXPERIMENT: dict[str, Any] = {
    "title": "Two arms",
    "arms": {"slop": {"plan": "best"}, "from-scratch": {"control": "from_scratch"}},
    "scales": {
        "tiny": {
            "run": RUN,
            "structures": {"initial": "16,32,2,2", "target": "32,64,3,4"},
            "flops": 3e8,
            "seeds": [0],
        }
    },
}


def write_run(path: Path, stages: int = 3) -> Path:
    """Write the records of a run, without weights."""
    path.mkdir()
    SCHEDULE.to_yaml(path / "schedule.yaml")
    for number in range(stages):
        facts = {"parameters": 9, "tokens": 64, "total_tokens": 64, "first_token": 0, "steps": 1, "global_step": 1}
        costs = {"flops": 1.0, "total_flops": 1.0, "seconds": 1.0}
        name = SCHEDULE.stage_name(number)
        (path / name).mkdir()
        record = StageRecord(number, name, dims=SCHEDULE.structures[number], **facts, **costs)
        record.to_json(path / name / "stage.json")
        (path / name / "trainer_state.json").write_text('{"log_history": []}')
    return path


def write_broken_models(home: Path, model_dir: Path) -> None:
    """Write copies of a model in which one file is damaged."""
    for name in ("no-weights", "cut", "lacks-a-weight", "strange", "no-config"):
        shutil.copytree(model_dir, home / name)
    weights = load_file(model_dir / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, home / "lacks-a-weight" / "model.safetensors", metadata={"format": "pt"})
    (home / "no-weights" / "model.safetensors").unlink()
    (home / "cut" / "model.safetensors").write_bytes(b"xx")
    (home / "strange" / "config.json").write_text('{"model_type": "nonsense"}')
    (home / "no-config" / "config.json").unlink()


@pytest.fixture(scope="module")
def home(tmp_path_factory, model, model_dir, tokenizer):
    """A model, a run, an experiment and a config, and damaged copies of them."""
    path = tmp_path_factory.mktemp("home")
    write_broken_models(path, model_dir)
    write_run(path / "run")
    shutil.rmtree(write_run(path / "gap") / "stage-1-layer")
    (write_run(path / "no-history") / "stage-2-ffn" / "trainer_state.json").write_text("[]")
    (path / "file").write_text("")
    (path / "empty").mkdir()
    (path / "experiment.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    (path / "run.yaml").write_text(yaml.safe_dump({**RUN, "schedule": yaml.safe_load(SCHEDULE.to_yaml())}))
    (path / "comparison.json").write_text(json.dumps({"name": "x"}))
    texts = {"notes": TEXTS[0]}
    return SimpleNamespace(
        path=path,
        model=model,
        model_dir=model_dir,
        tokenizer=tokenizer,
        held_out=HeldOut.from_texts(texts, tokenizer, 32),
        experiment=Experiment.from_yaml(path / "experiment.yaml"),
        config=RunConfig.from_yaml(path / "run.yaml"),
    )


def score(model: Any = None, tasks: Any = "perplexity", **options: Any) -> Callable[[Any], object]:
    """Score a model, by its name in the home directory, the model of the tests, or another value."""

    def call(home: Any) -> object:
        source = home.model_dir if model is None else home.path / model if isinstance(model, str) else model[0]
        return evaluate_model(source, tasks, **{"held_out": home.held_out, "cache_dir": home.path / "new", **options})

    return call


def settle(**options: Any) -> Callable[[Any], object]:
    return lambda home: EvalSettings(**{"tasks": "perplexity", "held_out": home.held_out, **options})


def cut(texts: Any, block_size: Any = 8) -> Callable[[Any], object]:
    return lambda home: HeldOut.from_texts(texts, home.tokenizer, block_size)


def experiment(path: str, value: object) -> Callable[[Any], object]:
    """Change a value of the experiment's file, and lay out and check its runs."""

    def call(home: Any) -> object:
        *parents, last = path.split("/")
        section = content = copy.deepcopy(EXPERIMENT)
        for parent in parents:
            section = section[parent]
        section[last] = value
        (home.path / "changed.yaml").write_text(yaml.safe_dump(content))
        jobs = build_jobs(Experiment.from_yaml(home.path / "changed.yaml"))
        return check_jobs(jobs, home.path / "none")

    return call


def arm(**settings: object) -> Callable[[Any], object]:
    return experiment("arms/slop", {"plan": "best", **settings})


def scale(**settings: object) -> Callable[[Any], object]:
    return experiment("scales/tiny", {**EXPERIMENT["scales"]["tiny"], **settings})


def compare(root: str = "new", **options: Any) -> Callable[[Any], object]:
    return lambda home: compare_arms(home.experiment, home.path / root, **options)


def probe(**settings: Any) -> Callable[[Any], object]:
    return lambda home: Probe(home.config, **{"output_dir": home.path / "new", **settings})


def report(*runs: str, output: str = "new") -> Callable[[Any], object]:
    return lambda home: write_report([home.path / run for run in runs], home.path / output)


#: Calls by a name that says what is wrong, each with a pattern of the message.
ROWS: dict[str, tuple[Callable[[Any], object], str]] = {
    # Evaluation.
    "no such model": (score("none"), "none is not a model directory"),
    "a folder": (score("empty"), "neither a run nor a model directory"),
    "a file": (score("file"), "file is not a model directory"),
    "a run": (score("run"), "is a run, not a model"),
    "model: nothing": (score([None]), "model must be a transformers model, a directory or a Hub id, got None"),
    "model: an empty name": (score([""]), "model must be .*, got ''"),
    "model: a number": (score([5]), "model must be .*, got 5"),
    "model: a module": (score([torch.nn.Linear(1, 1)]), "model must be .*, got Linear"),
    "no weights": (score("no-weights"), "has no weights"),
    "cut weights": (score("cut"), "truncated or corrupt"),
    "a weight is missing": (score("lacks-a-weight"), "lacks 1 of the model's weights, such as .*up_proj.weight"),
    "no config": (score("no-config"), "neither a run nor a model directory"),
    "an unknown family": (score("strange"), "strange cannot be loaded"),
    "tasks: nothing": (score(tasks=None), "tasks must be names .*, got None"),
    "tasks: a number": (score(tasks=5), "tasks must be names .*, got 5"),
    "tasks: numbers": (score(tasks=[5]), "tasks must be names .*, got 5"),
    "tasks: none named": (score(tasks=" , "), "tasks must name one or more, got ' , '"),
    "tasks: an empty list": (score(tasks=()), r"tasks must name one or more, got \(\)"),
    "batch_size 0": (settle(batch_size=0), "batch_size must be 'auto', or a whole number, 1 or more, got 0"),
    "batch_size true": (settle(batch_size=True), "batch_size must be 'auto'.* got True"),
    "batch_size in words": (settle(batch_size="big"), "batch_size must be 'auto'.* got 'big'"),
    "limit 0": (settle(limit=0), "limit must be a whole number, 1 or more, got 0"),
    "limit 1.5": (settle(limit=1.5), "limit must be a whole number"),
    "num_fewshot -1": (settle(num_fewshot=-1), "num_fewshot must be a whole number, 0 or more"),
    "device: no such GPU": (settle(device="cuda:77"), "device 'cuda:77': this machine has no such device; .*cpu"),
    "device: nonsense": (settle(device="nonsense"), "device 'nonsense': this machine has no such device"),
    "device: empty": (settle(device=""), "device '': this machine has no such device"),
    "device: a number": (settle(device=5), "device 5: this machine has no such device"),
    "device: without memory": (settle(device="meta"), "device 'meta': this machine has no such device"),
    "include_path is missing": (settle(include_path="/no/such"), "include_path /no/such: no such directory"),
    "datasets is missing": (settle(datasets="/no/such"), "datasets /no/such: no such directory"),
    "datasets is a number": (settle(datasets=5), "datasets must be the path of a directory, got 5"),
    "cache_dir is a file": (lambda home: settle(cache_dir=home.path / "file")(home), "cache_dir .*file is a file"),
    "cache_dir below a file": (
        lambda home: settle(cache_dir=home.path / "file" / "cache")(home),
        "cache_dir .* cannot be written: .*file is not a directory",
    ),
    "no held-out text": (settle(held_out=None), "perplexity is measured on held-out text, got none"),
    "held_out is text": (settle(held_out="text"), "held_out must be a HeldOut, got str"),
    "block_size 1": (cut({"a": "a b c"}, 1), "block_size must be a whole number, 2 or more, got 1"),
    "block_size 8.5": (cut({"a": "a b c"}, 8.5), "block_size must be a whole number"),
    "no texts": (cut({}), "texts must be one or more texts by name"),
    "a list of texts": (cut(["a b"]), "texts must be one or more texts by name"),
    "bytes": (cut({"a": b"a b"}), "texts must be one or more texts by name"),
    "an empty text": (cut({"a": " \n"}), "a has no text to predict"),
    "no tokenizer": (
        lambda home: HeldOut.from_texts({"a": "a b"}, None, 8),
        "tokenizer must be a PreTrainedTokenizerFast, got NoneType",
    ),
    "measure nothing": (lambda home: measure_perplexity(home.model, HeldOut({}, None, "")), "no blocks to predict"),
    "measure no block": (
        lambda home: measure_perplexity(home.model, HeldOut({"a": []}, None, "")),
        "a has no blocks to predict",
    ),
    "measure limit -1": (lambda home: measure_perplexity(home.model, home.held_out, limit=-1), "limit must be"),
    "measure batch_size 0": (
        lambda home: measure_perplexity(home.model, home.held_out, batch_size=0),
        "batch_size must be 'auto'",
    ),
    "a token of another vocabulary": (
        lambda home: measure_perplexity(home.model, HeldOut({"a": [{"input_ids": torch.tensor([1, 999])}]}, None, "")),
        "the text has the token 999, and the model's vocabulary 270 tokens",
    ),
    "settings of a run: a name": (lambda home: evaluate_run(home.path / "run", "perplexity"), "settings must be Eval"),
    "settings of stages: a name": (
        lambda home: EvaluateStages("perplexity"),
        "settings must be EvalSettings, got str",
    ),
    "evaluate a folder": (lambda home: evaluate_run(home.path / "empty", settle()(home)), "empty is not a run"),
    "evaluate a run with a gap": (lambda home: evaluate_run(home.path / "gap", settle()(home)), "stage-1-.* missing"),
    "evaluate a stage that is not there": (
        lambda home: evaluate_run(home.path / "run", settle()(home), stages=[7]),
        "no finished stage 7",
    ),
    "no such measurement": (lambda home: measurements.path_of("perplexty"), "no measurement is named 'perplexty'"),
    # Experiments.
    "no arms": (experiment("arms", {}), "arms has none"),
    "no scales": (experiment("scales", {}), "scales has none"),
    "an arm without a name": (experiment("arms/", {"plan": 1}), "'' cannot name an arm"),
    "an arm named by a path": (experiment("arms/..", {"plan": 1}), "'..' cannot name an arm"),
    "an arm of two lines": (experiment("arms/a\nb", {"plan": 1}), "cannot name an arm"),
    "an arm of a long name": (experiment("arms/" + "x" * 300, {"plan": 1}), "cannot name an arm"),
    "an unknown key of an arm": (arm(pln=1), "unknown key 'arms.slop.pln'; did you mean 'plan'"),
    "an unknown reference": (experiment("reference", "from-scrath"), "no arm 'from-scrath'.*mean 'from-scratch'"),
    "plan 0": (arm(plan=0), "plan must be a rank from 1"),
    "plan 100": (arm(plan=100), "arm slop: the planner has 6 schedules"),
    "an unknown structure": (arm(target="targt"), "no structure 'targt' .*did you mean 'target'"),
    "no target": (arm(target=[]), "target must name one structure or more"),
    "an unknown key of the planner": (arm(planner={"objectiv": 1}), "'planner.objectiv'; did you mean 'objective'"),
    "an unknown key of the space": (arm(space={"min_layer": 1}), "'space.min_layer'; did you mean 'min_layers'"),
    "a key that the scale gives": (arm(space={"config": {}}), "space.config follows from the arm and the scale"),
    "budgets nan": (arm(budgets=[math.nan]), "budgets must be different positive multiples, got .nan"),
    "budgets inf": (arm(budgets=[math.inf]), "budgets must be different positive multiples, got .inf"),
    "shares inf": (arm(shares=[1, 1, 1, math.inf]), "shares must be 0 or more"),
    "no shares": (arm(shares=[]), "shares must be 0 or more"),
    "no seeds": (arm(seeds=[]), "seeds must be one or more different whole numbers"),
    "equal seeds": (arm(seeds=[0, 0]), "seeds must be one or more different whole numbers"),
    "a negative seed": (scale(seeds=[-1]), "seeds must be one or more different whole numbers"),
    "a seed too large": (scale(seeds=[2**31]), "seeds must be .* to 2147483647, got"),
    "an unknown init": (arm(training={"growth_init": "no"}), "arm slop: unknown init 'no'"),
    "an unknown argument": (arm(training={"learning_rte": 1}), "slop, seed 0: .*'learning_rte'; .*'learning_rate'"),
    "flops inf": (scale(flops=math.inf), "a budget must be positive and finite, got flops inf"),
    "flops for no token": (scale(flops=1), "arm .*: a budget of 1 flops buys no token"),
    "a seed in the scale's training": (scale(training={"seed": 7}), "training sets seed"),
    "budgets of a scale": (scale(budgets={"slop": [0]}), "budgets.slop: budgets must be different"),
    "nothing held out": (scale(run={**RUN, "data": {**RUN["data"], "held_out": 0}}), "set data.held_out"),
    "stages without a loss": (scale(training={"eval_before_growth": False}), "leave eval_before_growth out"),
    "an unknown scale": (
        lambda home: Experiment.from_yaml(home.path / "experiment.yaml", "tny"),
        "did you mean 'tiny'",
    ),
    "workers 0": (compare(workers=0), "workers must be a whole number, 1 or more, got 0"),
    "workers 1.5": (compare(workers=1.5), "workers must be a whole number"),
    "devices: a text": (compare(devices="0,1"), "devices must be a list of CUDA devices"),
    "devices: no number": (compare(devices=["a"]), "devices must be a list of CUDA devices"),
    "devices: negative": (compare(devices=["-1"]), "devices must be a list of CUDA devices"),
    "devices: twice": (compare(devices=["0", "0"]), "devices must be different"),
    "devices and workers": (compare(devices=["0"], workers=2), "give one of the two"),
    "compare into a file": (compare("file"), "file is a file: give a directory"),
    "compare below a file": (compare("file/new"), "new cannot be written: .*file is not a directory"),
    "compare nothing": (compare("empty", train=False), "empty has no finished run of this experiment"),
    "compare a path": (
        lambda home: compare_arms("experiment.yaml", home.path / "new"),
        "must be an Experiment, got str",
    ),
    "a comparison without keys": (lambda home: Comparison.load(home.path / "comparison.json"), "missing key 'title'"),
    # Probes.
    "lag 0": (probe(lag=0), "lag must be a whole number, 1 or more, got 0"),
    "lag nan": (probe(lag=math.nan), "lag must be a whole number"),
    "lag and share": (probe(lag=8, share=0.1), "expected one of them, got lag=8 and share=0.1"),
    "share nan": (probe(share=math.nan), "share must be above 0 and at most 1, got nan"),
    "share in words": (probe(share="all"), "share must be above 0"),
    "initial_tokens -1": (probe(initial_tokens=-1), "initial_tokens must be a whole number"),
    "by luck": (probe(by="luck"), "by must be one of utility, .*got 'luck'"),
    "seeds of a probe": (probe(seeds=(0, 0)), "seeds must be one or more different"),
    "workers of a probe": (probe(workers=-1), "workers must be a whole number"),
    "probe into a file": (
        lambda home: Probe(home.config, home.path / "file"),
        "output_dir .*file is a file: give a directory",
    ),
    "a start that is no run": (probe(start="/no/such"), "is not a run"),
    "a start that is no stage": (lambda home: Start.parse(f"{home.path / 'run'}@9"), "no finished stage '9'"),
    "one candidate": (lambda home: probe()(home).preview([]), "two candidates or more, got 0"),
    "an unknown init of a probe": (lambda home: build_init_candidates(SCHEDULE, ["no"]), "unknown init 'no'"),
    "a dimension that does not grow": (
        lambda home: build_next_candidates(SCHEDULE, ["hidden"]),
        "hidden does not grow from",
    ),
    "no candidates": (lambda home: plan_candidates(home.config, SCHEDULE, 0), "0|top_k"),
    # Reports.
    "no runs": (lambda home: write_report([]), "no runs to report on"),
    "runs: a number": (lambda home: write_report([5]), "runs must be run directories, got 5"),
    "report on a folder": (report("empty"), "empty is not a run"),
    "report twice on a run": (report("run", "run"), "run given more than once"),
    "report on a run with a gap": (
        report("run", "gap"),
        "gap/stage-1-layer is missing.*, but stage-2-ffn is there; .*slop rollback .*gap --to-stage 0",
    ),
    "report on a run without a log": (report("no-history"), "trainer_state.json has no log_history"),
    "report into a file": (report("run", output="file"), "file is a file: give a directory"),
    "report below a file": (report("run", output="file/report"), "report cannot be written: .*file is not a dir"),
    "summarise a gap": (lambda home: summarise(RunDirectory(home.path / "gap")), "stage-1-layer is missing"),
    "hours that do not fit": (lambda home: compute_marginal_utility([3.0], [1.0]), "do not fit 1 growth stages"),
    "hours nan": (lambda home: compute_marginal_utility([3.0, 2.0], [math.nan]), "hours must be positive"),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_wrong_input_is_refused_in_words(home, name):
    call, pattern = ROWS[name]
    with pytest.raises(SlopError) as caught:
        call(home)
    message = str(caught.value)
    assert re.search(pattern, message), message
    assert len(message.splitlines()) <= 2
    assert not (home.path / "new").exists(), "nothing is written"
