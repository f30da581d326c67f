"""Wrong command lines of every command: one or two helpful lines, exit code 2, and nothing written.

Each row is a command line, typed in a directory that holds the files of `home`, and a word of the message.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

RECIPE = Path(__file__).parent.parent / "recipes" / "grow_1b.py"
#: Words that only Python code has: class names, literals, names of arguments.
PYTHON = re.compile(r"Traceback|\w+Error\b|\b(?:None|True|False)\b|<class|\b(?!delta_)\w+_params\b|Errno")
#: What a command says of its work before it can find the mistake.
PROGRESS = re.compile("(?:loading|scoring) ")
SECONDS = 20
#: Where tokens are cached: a command may do that before it finds what is wrong. Locks of runs may stay, too.
CACHE = "cache"

SMALL = "64,128,2,4"
PLAN = f"plan --initial {SMALL} --target 128,256,4,8"
SIZE = "plan --initial 768,2048,6,6 --target-params 1e9"
GROW = "grow model -o grown --num-hidden-layers 4"
UPSCALE = "upscale model -o deeper --already-seen 1e9 --sequence-length 32"
TRAIN = "train run.yaml -o out"
COMPARE = "compare experiment.yaml -o out"
PROBE = "probe run.yaml -o out"
ADVISE = "advise --flops 1e18"
MODEL_ADVISE = f"advise --initial {SMALL} --already-seen 1e9"
CALIBRATE = "calibrate --structures '16,32,1,2; 128,512,4,4'"
LOSSES = "calibrate --loss run.yaml --share 0.5"
TOKENIZER = "data train-tokenizer run.yaml -o out"
SCORE = "eval run --tasks perplexity --text notes.txt"
RECIPE_RUN = "grow_1b.py --config run.yaml --output-dir out"

#: Files that are not what a YAML file should be, and a pattern of the message about each.
WRONG_FILES = {
    "missing.yaml": "missing.yaml: no such file",
    "folder": "folder: a folder",
    "binary.yaml": "binary.yaml.* UTF-8",
    "latin.yaml": "latin.yaml.* UTF-8",
    "empty.yaml": "empty.yaml.*(empty|missing|no schedule|no training data)",
    "list.yaml": "list.yaml: expected a (section|mapping)",
    "number.yaml": "number.yaml: expected a (section|mapping)",
    "broken.yaml": "broken.yaml: not valid YAML",
    "twice.yaml": "twice.yaml.* twice",
    "unknown.yaml": "unknown.yaml: .*unknown key 'nonsense'",
    "nested.yaml": "nested.yaml.*(nested|deep)",
}
#: Options and arguments that take a YAML file.
YAML_INPUTS = (
    f"{PLAN} --cost-model",
    f"{ADVISE} --cost-model",
    f"{ADVISE} --law",
    "grow model -o grown --schedule",
    "data inspect",
    "data tokenize",
    "data train-tokenizer -o out",
    "train -o out --dry-run",
    "train -o out",
    f"{TRAIN} --dry-run --schedule",
    "compare -o out --dry-run",
    "probe -o out --dry-run",
    "calibrate --dry-run --loss",
    f"{PROBE} --dry-run --schedule",
    "rollback run --to-stage 1 --schedule",
    "eval run --tasks perplexity --data",
    "grow_1b.py --output-dir out --dry-run --config",
)
#: What is not a model, and a pattern of the message.
WRONG_MODELS = {
    "missing/model": "missing/model",
    "folder": "folder",
    "notes.txt": "notes.txt",
    "models/broken": "broken.*not a? ?valid JSON|broken.*no readable config.json",
    "models/list": "list",
    "models/nested": "nested",
    "models/latin": "latin",
    "models/strange": "config has no 'intermediate_size'|model_type|strange",
    "models/negative": "-32|negative|hidden_size",
}
MODEL_INPUTS = (
    "plan --target 128,256,4,8 --from",
    f"{ADVISE} --already-seen 0 --from",
    f"plan --initial {SMALL} --to",
    "calibrate --target 128,256,4,8 --dry-run --from",
    f"calibrate --initial {SMALL} --dry-run --to",
    "grow -o grown --num-hidden-layers 4",
    "upscale -o deeper --already-seen 1e9",
    "eval --tasks perplexity --text notes.txt",
)
#: What is not a run, and a pattern of the message.
WRONG_RUNS = {
    "missing": "missing",
    "folder": "folder",
    "notes.txt": "notes.txt",
    "runs/broken": "schedule.yaml: not valid YAML",
    "runs/twice": "twice",
    "runs/binary": "UTF-8",
    "runs/empty": "empty|missing key",
}
RUN_INPUTS = (
    "publish --to user/model --dry-run",
    "rollback --to-stage 0",
    "report",
    "probe run.yaml -o out --dry-run --from",
)
#: Options that take a file to write, and those that take a directory.
FILE_OUTPUTS = (
    f"{PLAN} -o",
    f"{ADVISE} --data notes.txt -o",
    "reproduce -o",
    f"{CALIBRATE} --cpu -o",
    f"{UPSCALE} --run",
)
DIRECTORY_OUTPUTS = (
    "report run -o",
    f"{TOKENIZER[:-2]}",
    "train run.yaml -o",
    "grow model --num-hidden-layers 4 -o",
    "upscale model --already-seen 1e9 -o",
)

#: Command lines by what they begin with: how they go on, and a pattern of the message.
ROWS: Mapping[str, Mapping[str, str]] = {
    "": {
        "plann": "plann.*plan",
        "--verson": "--verson.*--version",
        "-z": "-z",
        "data inspekt run.yaml": "inspekt.*inspect",
        "--quiet --verbose reproduce": "--quiet.*--verbose",
    },
    "plan": {
        "": "--initial",
        "--target-params 1e9": "--initial or --from",
        "--initial 768,2048,6 --target-params 1e9": "hidden,ffn,layers,heads",
        "--initial '' --target-params 1e9": "--initial.*hidden,ffn,layers,heads",
        "--initial a,b,c,d --target-params 1e9": "a,b,c,d",
        "--initial 0,128,2,4 --target 128,256,4,8": "hidden_size.*0",
        "--initial=-64,128,2,4 --target 128,256,4,8": "--initial -64",
        "--initial 64.5,128,2,4 --target 128,256,4,8": "64.5",
        "--initial nan,128,2,4 --target 128,256,4,8": "nan",
        "--initial 64,128,2,5 --target 128,256,4,8": "heads",
        "--initial 64,128,2,4,3 --target 128,256,4,8": "num_key_value_heads",
        "--initial 64,128,2,4,2,16,9 --target 128,256,4,8": "hidden,ffn,layers,heads",
        "--initial 64,128,2,4 --from model --target 128,256,4,8": "either --initial or --from",
        "--initial 64,128,2,4": "either --target.*--target-params",
        "--initial 64,128,2,4 --target 32,128,2,2": "shrink from 64 to 32",
        "--initial 64,128,2,4 --target 64,128,2,4": "nothing",
        "--initial 64,128,2,4 --target 128": "hidden,ffn,layers,heads",
        "--initial 64,128,2,4 --target 128,256,4,8 --target-params 1e9": "either --target.*--target-params",
        "--initial 384,512,2,3 --target 384,512,2,3,3,256 --mode joint --stages 1 --operators layer,ffn,hidden,mha": (
            "head_dim"
        ),
    },
    SIZE: {
        "--target-params nan": "--target-params",
        "--target-params inf": "--target-params",
        "--target-params=-1": "--target-params",
        "--target-params 0": "--target-params",
        "--target-params ''": "--target-params",
        "--target-params many": "--target-params",
        "--target-params 1e30": "no structure|too many|largest",
        "--tolerance nan": "--tolerance",
        "--tolerance inf": "--tolerance",
        "--tolerance=-0.1": "--tolerance",
        "--tolerance ''": "--tolerance",
        "--tolerance 0.00001 --max-layers 8": "raise.*--tolerance|--tolerance",
        "--count papers": "'paper'",
        "--hidden-multiple 0": "--hidden-multiple",
        "--hidden-multiple=-1": "--hidden-multiple",
        "--hidden-multiple 1.5": "--hidden-multiple",
        "--hidden-multiple 1000000000000": "no structure|hidden",
        "--ffn-multiple 0": "--ffn-multiple",
        "--ffn-multiple=-256": "--ffn-multiple",
        "--ffn-ratios ''": "--ffn-ratios",
        "--ffn-ratios 0": "--ffn-ratios",
        "--ffn-ratios nan": "--ffn-ratios",
        "--ffn-ratios inf": "--ffn-ratios",
        "--ffn-ratios=-4": "--ffn-ratios",
        "--ffn-ratios 8/0": "--ffn-ratios",
        "--min-layers 0": "--min-layers",
        "--min-layers=-1": "--min-layers",
        "--min-layers 70": "--min-layers.*--max-layers",
        "--max-layers 0": "--max-layers",
        "--max-layers 1000000000": "--max-layers|too many",
        "--min-aspect=-1": "--min-aspect",
        "--min-aspect nan": "--min-aspect",
        "--min-aspect 500": "--min-aspect.*--max-aspect",
        "--max-aspect nan": "--max-aspect",
        "--max-aspect 0": "--max-aspect",
        "--max-aspect 1e9 --max-layers 1000000": "--max|too many",
        "--min-hidden 0": "--min-hidden",
        "--min-hidden 900 --max-hidden 800": "--min-hidden.*--max-hidden",
        "--max-hidden 800": "loosen",
        "--max-hidden=-1": "--max-hidden",
        "--min-ffn=-1": "--min-ffn",
        "--min-ffn 9000 --max-ffn 8000": "--min-ffn.*--max-ffn",
        "--max-ffn 0": "--max-ffn",
        "--min-heads 0": "--min-heads",
        "--max-heads 0": "--max-heads",
        "--min-heads 9 --max-heads 8": "--min-heads.*--max-heads",
        "--heads many": "--heads.*'follow'",
        "--kv-heads 0": "--kv-heads",
        "--kv-heads=-1": "--kv-heads",
        "--tensor-parallel 0": "--tensor-parallel",
        "--tensor-parallel 7": "32004",
        "--vocab-size 0": "--vocab-size",
        "--vocab-size=-5": "--vocab-size",
        "--vocab-size 1e4": "--vocab-size",
        "--sequence-length 0": "--sequence-length",
        "--sequence-length=-1": "--sequence-length",
    },
    PLAN: {
        "--nonsense 1": "--nonsense",
        "--target-parms 1e9": "--target-parms.*--target-params",
        "surplus": "surplus",
        "--operators depth": "unknown operator 'depth'",
        "--operators layr,ffn,hidden": "'layr'.*'layer'",
        "--operators ''": "operator",
        "--operators ffn,ffn": "different",
        "--operators layer,ffn": "hidden",
        "--objective delta_parms": "'delta_parms'.*'delta_params'",
        "--objective ''": "objective",
        "--objective flops": "--tokens",
        "--objective final_loss": "give --flops",
        "--objective final_loss --flops 0": "give --flops",
        "--objective final_loss --flops nan": "give --flops",
        "--objective final_loss --flops lots": "--flops",
        "--objective final_loss --flops 1e13 --tokens 1e9": "give --flops",
        "--objective final_loss --flops 1e13 --pretrained": "--already-seen",
        "--objective final_loss --flops 1e13 --explain": "no value per stage",
        "--objective final_loss --flops 1": "give more",
        "--objective final_loss --flops 1e13 --initial 64,128,0,4": "an initial structure with layers",
        "--flops 1e13": "give --tokens",
        "--objective final_loss --flops 1e13 --law missing.yaml": "missing.yaml",
        "--objective final_loss --flops 1e13 --law unknown.yaml": "unknown key 'nonsense'",
        "--objective hours": "--tokens",
        "--mode twice": "--mode.*'once'",
        "--mode onec": "'onec'.*did you mean 'once'",
        "--stages 0": "--stages",
        "--stages=-1": "--stages",
        "--stages 5": "--stages",
        "--stages 2.5": "--stages",
        "--mode repeated": "--stages",
        "--mode repeated --stages 2": "more",
        "--mode joint --max-stages 0 --objective flops --tokens 1e9": "--max-stages",
        "--max-stages 0": "--max-stages",
        "--stage-price=-1": "--stage-price",
        "--stage-price nan": "--stage-price",
        "--mode repeated --stages 4 --stage-price 2": "--stage-price",
        "--max-factor 0.5": "--max-factor",
        "--max-factor nan": "--max-factor",
        "--max-factor 1.01": "--max-factor",
        "--top-k 0": "--top-k",
        "-k -1": "--top-k",
        "--top-k many": "--top-k",
        "--tokens many": "--tokens",
        "--tokens=-5": "--tokens",
        "--tokens 0": "--tokens",
        "--tokens nan": "--tokens",
        "--tokens inf": "--tokens",
        "--tokens ''": "--tokens",
        "--tokens 1e9,1e9": "--tokens",
        "--tokens 1e9,-1,1e9,1e9": "--tokens",
        "--tokens 1e9,,1e9,1e9": "--tokens",
        "--tokens 1e9 --sharing fair": "--sharing.*'paper'",
        "--tokens 1e9,1e9,1e9,1e9 --sharing utility": "one number",
        "--sharing fair": "--sharing",
        "--tokens 1e9 --already-seen=-1": "--already-seen",
        "--tokens 1e9 --already-seen nan": "--already-seen",
        "--already-seen inf": "--already-seen",
        "--device-memory 0": "--device-memory",
        "--device-memory=-1": "--device-memory",
        "--device-memory nan": "--device-memory",
        "--device-memory 1000": "does not fit",
        "--devices 0": "--devices",
        "--devices=-1 --device-memory 8e10": "--devices",
        "--zero 7": "--zero",
        "--zero 4 --device-memory 8e10": "--zero",
        "--micro-batch-size 0": "--micro-batch-size",
        "--micro-batch-size=-1 --device-memory 8e10": "--micro-batch-size",
        "--precision int8": "--precision.*'bf16'",
        "--optimizer adam": "--optimizer.*'muon'",
        "--precision fp61 --device-memory 8e10": "--precision.*'bf16'",
        "--plot plan.bmp": "plan.bmp",
        "--plot plan": "--plot|plan",
        "--plot folder": "folder",
        "--plot notes.txt/plan.png": "notes.txt",
        "--through 64,128": "hidden,ffn,layers,heads",
        "--through 32,128,2,2": "shrink|pass through",
        "--through 64,128,3,4": "--through",
        "--cost-model papers": "papers",
    },
    "advise": {
        "": "exactly one of --flops, --tokens and --hours",
        "--flops 1e18 --tokens 1e9": "exactly one",
        "--flops lots": "--flops",
        "--tokens 1e9": "--target",
        "--hours 10": "--cost-model",
        "--hours=-1 --device H100": "--hours",
        "--hours 10 --device H1000": "H1000.*slop calibrate",
        "--hours 10 --device H100 --mfu 40": "--mfu",
        "--hours 10 --device H100 --mfu nan": "--mfu",
        "--hours 10 --device H100 --cost-model paper": "either --cost-model or --device",
    },
    ADVISE: {
        "--flops 0": "--flops",
        "--flops nan": "--flops",
        "--flops=-1": "--flops",
        "--flops 1e3": "no model|give more",
        "--already-seen 1e9": "--initial",
        f"--initial {SMALL}": "--already-seen is missing",
        "--from model": "--already-seen is missing",
        f"--from model --initial {SMALL}": "either --from or --initial",
        "--initial 64,128,2 --already-seen 0": "--initial.*hidden,ffn,layers,heads",
        "--target 64,128,2": "--target.*hidden,ffn,layers,heads",
        "--vocab-size 0": "--vocab-size",
        "--sequence-length 0": "--sequence-length",
        "--from model --already-seen 0 --sequence-length 100000": "--sequence-length 100000 .*max_position_embeddings",
        "--device-memory 0": "--device-memory",
        "--device-memory 1000": "--device-memory",
        "--devices 0": "--devices",
        "--zero 7": "--zero",
        "--micro-batch-size 0": "--micro-batch-size",
        "--precision int8": "--precision.*'bf16'",
        "--law unknown.yaml": "unknown key 'nonsense'",
        "--cost-model papers": "papers",
        "--row 0 --data notes.txt -o run.yaml": "--row",
        "--row 99": "--row must be from 1 to",
        "--plot plan.bmp": "plan.bmp",
        "--plot folder": "folder",
        "-o out.yaml": "--data",
        "--nonsense 1": "--nonsense",
    },
    MODEL_ADVISE: {
        "--initial 64,128,0,2 --flops 1e15": "an initial structure with layers",
        "--flops 1e18 --already-seen=-1": "--already-seen",
        "--flops 1e18 --already-seen nan": "--already-seen",
        "--flops 1e18 --already-seen 1e30": "--already-seen",
        f"--flops 1e18 --target {SMALL}": "--target is the model itself",
        "--flops 1e18 --target 32,64,2,2": "shrink",
        "--tokens 1e30": "--tokens",
        "--flops 1e18 --device-memory 1000": "does not fit",
    },
    "grow model -o grown": {
        "": "--num-hidden-layers",
        "--num-hidden-layers 2": "nothing to grow",
        "--num-hidden-layers 1": "shrink",
        "--num-hidden-layers 0": "num_hidden_layers|--num-hidden-layers",
        "--num-hidden-layers=-4": "--num-hidden-layers",
        "--num-hidden-layers 2.5": "--num-hidden-layers",
        "--num-hidden-layers 10000000": "10,?000,?000",
        "--hidden-size 33": "33",
        "--hidden-size nan": "--hidden-size",
        "--intermediate-size=-64": "--intermediate-size",
        "--num-attention-heads 6 --num-key-value-heads 4": "heads",
        "--num-key-value-heads 3": "heads",
        "--head-dim 0": "head_dim|--head-dim",
        "--schedule plan.yaml --hidden-size 64": "either --schedule",
        "--schedule plan.yaml --init copy": "either --schedule",
        "--schedule plan.yaml": "begins with",
    },
    GROW: {
        "--init no": "unknown init 'no'",
        "--init ''": "init",
        "--init stak": "'stak'.*'stack'",
        "--init layr=stack": "'layr'",
        "--init ffn=copy": "ffn",
        "--init layer=": "init",
        "--init layer=stack,layer=random": "--init",
        "--noise nan": "--noise",
        "--noise=-1": "--noise",
        "--noise inf": "--noise",
        "--noise 1e30": "--noise",
        "--noise much": "--noise",
        "--seed 1.5": "--seed",
        "--threads 0": "--threads",
        "--threads=-1": "--threads",
        "--max-shard-size 0": "--max-shard-size",
        "--max-shard-size huge": "--max-shard-size",
        "--max-shard-size=-1GB": "--max-shard-size",
        "--max-shard-size ''": "--max-shard-size",
        "--dry-run -o model": "exists",
        "-o notes.txt": "notes.txt",
    },
    "upscale": {
        "": "CHECKPOINT",
        "model": "--output",
        "model -o deeper": "--already-seen is missing",
        "model -o deeper --already-seen 1e9 --sequence-length 100000": "max_position_embeddings",
        "model -o . --already-seen 1e9": "exists already",
        "model/config.json -o deeper --already-seen 1e9 --sequence-length 32": "not a model directory",
    },
    UPSCALE: {
        "--already-seen 0": "--already-seen must be a positive number",
        "--already-seen=-1": "--already-seen",
        "--already-seen nan": "--already-seen",
        "--already-seen 1e30": "--already-seen",
        "--layers 2": "2 layers are not more than the checkpoint's 2: give --layers 3 or more",
        "--layers 0": "--layers",
        "--layers=-4": "--layers",
        "--layers 2.5": "--layers",
        "--layers 10000000": "10,?000,?000",
        "--layers 4 --by 2": "either `--layers` or `--by`",
        "--by 1": "--by must be a factor above 1",
        "--by 1.1": "2 layers are not more",
        "--by nan": "--by",
        "--by inf": "--by",
        "--by 1e30": "num_hidden_layers",
        "--init no": "unknown init 'no'",
        "--init ''": "init",
        "--init copy": "unknown init 'copy'",
        "--seed 1.5": "--seed",
        "--tokens 0": "--tokens",
        "--tokens nan": "--tokens",
        "--tokens 1e30": "--tokens",
        "--sequence-length 0": "--sequence-length",
        "--data missing/deeper/texts": "missing/deeper/texts",
        "--law unknown.yaml": "unknown key 'nonsense'",
        "--device-memory 0": "--device-memory",
        "--device-memory 1000": "does not fit.*has 1.00 kB|does not fit",
        "--devices 0": "--devices",
        "--zero 7": "--zero",
        "--micro-batch-size 0": "--micro-batch-size",
        "--precision int8": "--precision.*'bf16'",
        "--max-shard-size huge": "--max-shard-size",
        "--run run.yaml": "run.yaml exists already; choose a new file",
        "--run deeper/run.yaml": "next to it",
        "--dry-run -o model": "model exists already; choose a new directory",
    },
    "grow": {"": "SOURCE", "model": "--output", "model --output": "--output"},
    TRAIN: {
        "--set training": "key=value",
        "--set =1": "--set",
        "--set training.learning_rate": "key=value",
        "--set training.learning_rte=1": "'learning_rte'.*'learning_rate'",
        "--set training.learning_rate=-1": "learning_rate",
        "--set training.learning_rate=nan": "learning_rate",
        "--set training.learning_rate=.inf": "learning_rate",
        "--set training.learning_rate=fast": "training.learning_rate",
        "--set training.report_to=wandb": "wandb",
        "--set training.per_device_train_batch_size=0": "per_device_train_batch_size",
        "--set training.per_device_train_batch_size=-2": "per_device_train_batch_size",
        "--set training.bf16=perhaps": "training.bf16",
        "--set training.output_dir=elsewhere": "output_dir.*-o",
        "--set training.optim=adam": "optim",
        "--set training.lr_scheduler_type=cosin": "cosine",
        "--set training.save_steps=-1": "save_steps",
        "--set training.logging_steps=0": "logging_steps",
        "--set training.warmup_steps=-1": "warmup_steps",
        "--set training.seed=-1": "seed",
        "--set training.growth_init=nope": "init",
        "--set 'training={optim: adafactor, carry_optimizer_state: true}'": "keeps a state that cannot be grown",
        "--set training=7": "training",
        "--set model.tie_word_embedings=true": "'tie_word_embedings'.*'tie_word_embeddings'",
        "--set model.tie_word_embeddings=maybe": "tie_word_embeddings.*maybe",
        "--set model.num_hidden_layers=7": "num_hidden_layers",
        "--set model.model_type=nonsense": "model",
        "--set model.model_type=lama": "'llama'",
        "--set model.vocab_size=many": "vocab_size.*'many'",
        "--set model.vocab_size=0": "vocab_size",
        "--set model.pretrained=missing/model": "missing/model",
        "--set model.pretrained=folder": "folder",
        "--set model=7": "model",
        "--set data.vocabulary=1": "unknown key 'data.vocabulary'",
        "--set data.vocab_sise=300": "'data.vocab_sise'.*vocab_size",
        "--set dta.vocab_size=1": "unknown key 'dta'",
        "--set data.source=/no/such/folder": "/no/such/folder",
        "--set data.source=folder": "folder",
        "--set data.tokenizer=folder": "folder",
        "--set data.block_size=64": "max_position_embeddings 32",
        "--set data.block_size=0": "block_size",
        "--set data.block_size=nan": "block_size",
        "--set data.held_out=2": "held_out",
        "--set data.held_out=-0.1": "held_out",
        "--set data.held_out=.nan": "held_out",
        "--set data.vocab_size=0": "vocab_size",
        "--set data.cache_dir=notes.txt/cache": "notes.txt",
        "--set data.source=http://[::1/x": "http://",
        "--set schedule=null": "no schedule",
        "--set schedule=missing.yaml": "missing.yaml",
        "--set schedule.initial_tokens=-1": "tokens",
        "--set schedule.initial_tokens=.nan": "tokens",
        "--set schedule.stagse=[]": "'schedule.stagse'",
        "--set schedule.stages=7": "schedule.stages",
        "--set evaluation.tasks=7": "evaluation.tasks",
        "--set evaluation.taks=piqa": "evaluation",
        "--from folder": "folder",
        "--from user/none@stage-1": "user/none",
        "-o run": "holds another run",
        "-o run --dry-run": "holds another run",
        "-o notes.txt/run": "notes.txt",
        "-o notes.txt": "notes.txt",
        "--dry-run --devices 0": "--devices",
        "--dry-run --devices=-1": "--devices",
        "--dry-run --zero-stage 7": "--zero-stage",
        "--dry-run --zero-stage=-1": "--zero-stage",
        "--devices 2": "--dry-run",
        "--zero-stage 2": "--dry-run",
        "--devices many": "--devices",
    },
    "train": {"": "CONFIG"},
    "init": {"tny": "'tny'.*tiny", "-o new.yaml": "--output.*name", "tiny -o run.yaml": "run.yaml exists.*--force"},
    "launch": {
        "": "CONFIG",
        "missing.yaml": "missing.yaml: no such file",
        "run.yaml --config zero": "zero.*zero3",
        "run.yaml --config missing.yaml": "missing.yaml.*one-gpu",
        "run.yaml --num-processes 0": "--num-processes",
        "run.yaml --set data.seed": "key=value",
    },
    COMPARE: {
        "--scale huge": "scale of tiny",
        "--scale tny": "'tiny'",
        "--arm slopp": "--arm slopp.*slop",
        "--seeds a": "--seeds",
        "--seeds ''": "--seeds",
        "--seeds=-1": "--seeds",
        "--seeds 0,0": "--seeds",
        "--seeds 1.5": "--seeds",
        "--workers 0": "--workers",
        "--workers=-1": "--workers",
        "--workers many": "--workers",
        "--dry-run --workers 0": "--workers",
        "--devices a": "--devices",
        "--devices=-1": "--devices",
        "--devices 0,0": "--devices",
        "--devices 0 --workers 2": "--devices|--workers",
        "--set scales.tiny.flops=0": "positive",
        "--set scales.tiny.flops=.nan": "flops",
        "--set scales.tiny.flops=lots": "flops",
        "--set scales.tiny.flps=1": "flps",
        "--set arms.slop.plan=never": "plan must be a rank",
        "--set arms={}": "arms",
        "--set scales.tiny": "key=value",
        "--report-only": "out",
        "--report-only -o folder": "folder",
        "--record folder": "folder",
        "--record notes.txt/record.json": "notes.txt",
        "-o notes.txt": "notes.txt",
        "-o notes.txt/out": "notes.txt",
    },
    "compare": {"": "CONFIG", "run.yaml -o out": "arms|scales"},
    PROBE: {
        "-k 2 --inits random,copy": "only one of --top-k, --inits and --next",
        "--lag 1.5": "--lag",
        "--lag 0": "--lag",
        "--lag nan": "--lag",
        "--lag inf": "--lag",
        "--lag=-1": "--lag",
        "--share 0": "--share",
        "--share nan": "--share",
        "--share 2": "--share",
        "--share=-1": "--share",
        "--share 0.1 --lag 100": "--share.*--lag|--lag.*--share",
        "--initial-tokens nan": "--initial-tokens",
        "--initial-tokens=-1": "--initial-tokens",
        "--initial-tokens 0.5": "--initial-tokens",
        "--top-k 1": "two candidates or more",
        "--top-k 0": "--top-k",
        "--top-k=-1": "--top-k",
        "--objective lss": "objective.*'lss'",
        "--inits no,copy": "unknown init 'no'",
        "--inits ''": "--inits|candidates",
        "--next depth,ffn": "depth",
        "--next ''": "--next|candidates",
        "--by luck": "--by.*utility",
        "--seeds a": "--seeds",
        "--seeds ''": "--seeds",
        "--seeds 0,0": "--seeds",
        "--workers 0": "--workers",
        "--devices a": "--devices",
        "--from run@7": "stage '7'",
        "--from run@stage-x": "stage-x",
        "--from run@": "stage ''",
        "--write-schedule folder": "folder",
        "--write-schedule notes.txt/best.yaml": "notes.txt",
        "-o notes.txt": "notes.txt",
    },
    "probe": {"": "CONFIG", "run.yaml": "--output"},
    "calibrate": {
        "--structures '16,32,1,2'": "at least 2 structures",
        "--structures ''": "structures",
        "--structures ';'": "structures",
        "--structures '16,32,1'": "hidden,ffn,layers,heads",
        "--structures '16,32,1,2; 128,512,4,4' --target 16,32,1,2": "either --structures",
        "--initial 16,32,1,2": "--target or --to",
        "--target 16,32,1,2": "--initial or --from",
        "--initial 16,32,1,2 --target 16,32,1,2": "at least 2 structures",
        "--from nowhere": "--from nowhere",
        "--initial 16,32,1,2 --from model --target 128,512,4,4": "either --initial or --from",
        "--dry-run --batch-size 0": "--batch-size",
        "--share 0.1": "--share: give --loss",
        "--runs out --workers 2 --prior plan.yaml": "--prior, --runs, --workers: give --loss",
        "--loss": "--loss",
        "--loss run.yaml": "buys . steps.*batch_tokens",
        "--loss run.yaml --dry-run": "buys . steps.*batch_tokens",
    },
    LOSSES: {
        "--steps 3 --tied": "--steps, --tied: --loss",
        "--share 2": "--share must be above 0 and at most 1, got 2",
        "--share 0": "--share must be above 0",
        "--share nan": "--share must be above 0",
        "--share all": "--share",
        "--prior missing.yaml": "missing.yaml: no such file",
        "--prior run.yaml": "run.yaml: unknown key",
        "--set data.held_out=0": "data.held_out",
        "--set data.held_outt=0.1": "held_outt.*held_out",
        "--set data": "key=value",
        "--set training.stage_learning_rates=[1e-3,1e-4,1e-4]": "stage_learning_rates",
        "--set model.pretrained=model": "model.pretrained",
        "--workers 0": "--workers",
        "--devices 0": "--devices.*CUDA",
        "--devices x": "--devices",
        "--runs notes.txt": "--runs notes.txt",
        "--runs notes.txt/out": "notes.txt",
        "-o folder": "--output folder",
    },
    CALIBRATE: {
        "--steps 0": "--steps",
        "--steps=-1": "--steps",
        "--steps few": "--steps",
        "--warmup-steps=-1": "--warmup-steps",
        "--batch-size 0": "--batch-size",
        "--batch-size=-1 --dry-run": "--batch-size",
        "--sequence-length 0 --dry-run": "--sequence-length",
        "--sequence-length=-1": "--sequence-length",
        "--steps 0 --dry-run": "--steps",
        "--warmup-steps=-1 --dry-run": "--warmup-steps",
        "--vocab-size 0": "--vocab-size",
        "--vocab-size=-1 --dry-run": "--vocab-size",
        "--precision fp8": "--precision.*fp8",
        "--precision int4 --dry-run": "--precision.*int4",
        "--seed=-1": "--seed",
        "--seed x": "--seed",
    },
    "publish": {
        "": "RUN",
        "run": "--to",
        "run --to me --dry-run": "user/name",
        "run --to me/x/y --dry-run": "me/x/y",
        "run --to 'me/bad name' --dry-run": "bad name",
        "run --to '' --dry-run": "user/name",
        "run --to /x --dry-run": "user/name",
        "run --to me/x@main --dry-run": "me/x@main",
        "run --to me/x --stage 7 --dry-run": "no finished stage 7",
        "run --to me/x --stage=-1 --dry-run": "-1",
        "run --to me/x --stage all --dry-run": "--stage",
        "run --to me/x --base-model 'no such name' --dry-run": "base-model",
    },
    SCORE: {
        "--limit 0": "--limit",
        "--limit=-1": "--limit",
        "--limit 1.5": "--limit",
        "--batch-size big": "--batch-size",
        "--batch-size 0": "--batch-size",
        "--batch-size=-1": "--batch-size",
        "--batch-size ''": "--batch-size",
        "--num-fewshot=-1": "--num-fewshot",
        "--stage 7": "no finished stage 7",
        "--stage=-1": "-1",
        "--stage 7 --dry-run": "no finished stage 7",
        "--data run.yaml": "--data and --text",
        "--block-size 0": "--block-size",
        "--block-size=-1": "--block-size",
        "--block-size 1": "--block-size",
        "--block-size 100000": "--block-size",
        "--text missing.txt": "missing.txt",
        "--text folder": "folder",
        "--text latin.yaml": "latin.yaml.*UTF-8",
        "--text binary.yaml": "binary.yaml.*UTF-8",
        "--text empty.yaml": "empty.yaml",
        "--device cuda:7": "--device.*cuda:7",
        "--device gpu": "--device.*gpu",
        "--device ''": "--device",
        "--include-path missing": "--include-path.*missing",
        "--datasets missing": "--datasets.*missing",
        "--cache-dir notes.txt": "notes.txt",
        "--cache-dir notes.txt/cache": "notes.txt",
    },
    "eval": {
        "": "RUN",
        "run --tasks perplexity": "--data.*--text",
        "run --tasks ''": "--tasks",
        "run --tasks ,": "--tasks",
        "run --tasks ''  --dry-run": "--tasks",
        "run --tasks perplexity --set data.block_size=7": "--data",
        "run --tasks perplexity --data run.yaml --set data.block_sise=7": "block_sise",
        "run --tasks perplexity --data run.yaml --set data": "key=value",
        "run/stage-0-initial --stage 0 --tasks perplexity --text notes.txt": "has no stages",
        "run/stage-0-initial --after-growth --tasks perplexity --text notes.txt": "has no stages",
        "missing --tasks perplexity --text notes.txt --dry-run": "missing",
        "folder --tasks perplexity --text notes.txt --dry-run": "folder",
    },
    "rollback": {
        "": "RUN",
        "run": "--to-stage",
        "run --to-stage 3": "no finished stage 3",
        "run --to-stage 2": "nothing after it",
        "run --to-stage=-1": "stage -1|--to-stage",
        "run --to-stage last": "--to-stage",
        "run --to-stage 1 --schedule other.yaml": "differs from the run's in stage 0",
        "run --to-stage 7 --dry-run": "no finished stage 7",
    },
    "report": {
        "": "RUNS",
        "run folder": "folder",
        "run run": "run",
        "run -o notes.txt": "notes.txt",
        "run -o notes.txt/report": "notes.txt",
        "runs/gap": "stage-1-layer",
        "runs/record": "stage.json",
    },
    "reproduce": {
        "table9": "'table9'",
        "tabel1": "'tabel1'.*'table1'",
        "table1 table3": "table3",
        "-o folder": "folder",
        "-o notes.txt/page.md": "notes.txt",
    },
    "data": {"inspect": "CONFIG", "tokenize": "CONFIG", "train-tokenizer": "CONFIG"},
    "data inspect run.yaml": {
        "--samples=-1": "--samples",
        "--samples many": "--samples",
        "--set data": "key=value",
        "--set data.block_size=1": "block_size",
        "--set data.source=missing": "missing",
        "--set data.max_documents=-1": "max_documents",
        "--set data.max_documents=0": "max_documents",
    },
    "data inspect mixture.yaml": {
        "--set sources.notes.weight=50": "add up to 90",
        "--set sources.notes.weight=-1": "weight",
        "--set sources.notes.weight=.nan": "weight",
        "--set sources.notes.wait=50": "wait",
        "--set sources.notes.source.x=1": "is not a section of",
        "--set sources={}": "sources",
        "--set sources": "key=value",
        "--set source.notes.weight=1": "source",
    },
    "data tokenize run.yaml": {
        "--tokenizer missing": "missing",
        "--tokenizer folder": "folder",
        "--tokenizer notes.txt": "notes.txt",
        "--tokenizer ''": "--tokenizer",
        "--set data.cache_dir=notes.txt": "notes.txt",
        "--workers 0": "--workers",
        "--workers many": "--workers",
        "--part 0/3": "--part must be K/N",
        "--part 4/3": "--part must be K/N",
        "--part 3": "--part must be K/N",
        "--part 1/1000000000": "--part 1/1000000000 is one of more than 100,000 parts: give fewer",
        "--part -1/3": "--part",
        "--part 1/2 --set data.max_documents=5": "leave max_documents out, or leave `--workers` and `--part` out",
        "--workers 2 --set data.max_documents=5": "leave max_documents out",
    },
    TOKENIZER: {
        "-o full": "choose another one",
        "-o notes.txt": "choose another one",
        "-o notes.txt/tokenizer": "notes.txt",
        "--kind unigram": "--kind.*bpe",
        "--kind bpee": "--kind.*bpe",
        "--vocab-size 0": "--vocab-size",
        "--vocab-size=-1": "--vocab-size",
        "--vocab-size many": "--vocab-size",
        "--set data.tokenizer_kind=unigram": "tokenizer_kind",
    },
    "data train-tokenizer run.yaml": {"": "--output"},
    RECIPE_RUN: {
        "--dry-run --devices 0": "--devices",
        "--dry-run --devices many": "--devices",
        "--dry-run --zero-stage 7": "--zero-stage",
        "--devices 2": "--dry-run",
        "--set training": "key=value",
        "--set training.learning_rte=1": "'learning_rte'.*'learning_rate'",
        "--output-dir run": "holds another run",
        "--output-dir notes.txt": "notes.txt",
        "--nonsense": "--nonsense",
        "surplus": "surplus",
    },
}


def list_rows() -> Iterator[tuple[str, str]]:
    """Command lines and patterns: the tables' products, and the single rows."""
    tables = (YAML_INPUTS, WRONG_FILES), (MODEL_INPUTS, WRONG_MODELS), (RUN_INPUTS, WRONG_RUNS)
    for inputs, contents in tables:
        for line in inputs:
            for name, pattern in contents.items():
                yield f"{line} {name}", pattern
    for line in FILE_OUTPUTS:
        yield f"{line} folder", "folder"
        yield f"{line} notes.txt/file", "notes.txt"
    for start, rows in ROWS.items():
        for options, pattern in rows.items():
            yield f"{start} {options}".strip(), pattern


TABLE = dict(list_rows())


def write_models(home: Path, config: Mapping[str, Any]) -> None:
    """Write directories whose `config.json` is not a model's."""
    contents = {
        "broken": "{",
        "list": "[1]",
        "nested": "[" * 3000,
        "strange": json.dumps({"model_type": "nonsense", "hidden_size": 32}),
        "negative": json.dumps({**config, "hidden_size": -32}),
    }
    for name, content in contents.items():
        (home / "models" / name).mkdir(parents=True)
        (home / "models" / name / "config.json").write_text(content)
    (home / "models" / "latin").mkdir()
    (home / "models" / "latin" / "config.json").write_bytes('{"model_type": "llämä"}'.encode("latin-1"))


def write_runs(home: Path) -> None:
    """Write directories that are almost runs: with a damaged schedule, without a stage, with a damaged record."""
    for name in ("broken", "binary", "twice", "empty"):
        (home / "runs" / name).mkdir(parents=True)
        shutil.copyfile(home / f"{name}.yaml", home / "runs" / name / "schedule.yaml")
    shutil.copytree(home / "run", home / "runs" / "gap")
    shutil.rmtree(home / "runs" / "gap" / "stage-1-layer")
    shutil.copytree(home / "run", home / "runs" / "record")
    (home / "runs" / "record" / "stage-1-layer" / "stage.json").write_text("{")


def fill(home: Path) -> None:
    """Write a model, a run, their YAML files, and files of wrong kinds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from slop_hf import GrowthSchedule, GrowthStage, ModelDims, RunConfig, train_run
    from slop_hf.data import load_tokenizer

    (home / "texts").mkdir()
    for number in range(20):
        (home / "texts" / f"{number}.txt").write_text(
            f"file {number}: " + " ".join(str(number * k) for k in range(60))
        )
    (home / "folder").mkdir()
    (home / "full").mkdir()
    (home / "full" / "kept.txt").write_text("kept")
    (home / "notes.txt").write_text("one two three four five six seven eight nine ten " * 20)
    texts = {
        "empty.yaml": "",
        "list.yaml": "- 1\n- 2\n",
        "number.yaml": "7\n",
        "broken.yaml": "schedule: [1, 2\n",
        "twice.yaml": "data:\n  seed: 1\ndata:\n  seed: 2\n",
        "unknown.yaml": "data: {source: texts}\nnonsense: 1\n",
        "nested.yaml": "[" * 500,
    }
    for name, text in texts.items():
        (home / name).write_text(text)
    (home / "latin.yaml").write_bytes("model: {model_type: llämä}\n".encode("latin-1"))
    (home / "binary.yaml").write_bytes(bytes(range(256)) * 4)

    dims = ModelDims(16, 32, 2, 2)
    deep = dims.replace(num_hidden_layers=3)
    schedule = GrowthSchedule(
        dims, (GrowthStage(("layer",), deep, 64), GrowthStage(("ffn",), deep.replace(intermediate_size=48), 64)), 64
    )
    schedule.to_yaml(home / "plan.yaml")
    data = {"source": "texts", "vocab_size": 300, "block_size": 32, "held_out": 0.2, "cache_dir": CACHE}
    training = {"per_device_train_batch_size": 2, "use_cpu": True, "logging_steps": 2, "disable_tqdm": True}
    run = {
        "schedule": yaml.safe_load((home / "plan.yaml").read_text()),
        "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
        "data": data,
        "training": training,
    }
    dataclasses.replace(schedule, initial=deep.replace(num_hidden_layers=1)).to_yaml(home / "other.yaml")
    (home / "run.yaml").write_text(yaml.safe_dump(run))
    mixture = {name: {"source": "texts", "weight": weight} for name, weight in (("notes", 60), ("words", 40))}
    (home / "mixture.yaml").write_text(yaml.safe_dump({"sources": mixture}))
    scale = {
        "run": {key: run[key] for key in ("model", "data", "training")},
        "structures": {"initial": "16,32,2,2", "target": "32,64,3,4"},
        "flops": 3e8,
        "seeds": [0],
    }
    arms = {"slop": {"plan": "best"}, "from-scratch": {"control": "from_scratch"}}
    experiment = {"title": "A tiny experiment", "arms": arms, "scales": {"tiny": scale}}
    (home / "experiment.yaml").write_text(yaml.safe_dump(experiment, sort_keys=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        train_run(RunConfig.from_yaml("run.yaml"), "run", report=lambda line: None)
    torch.manual_seed(0)
    config = ModelDims(32, 48, 2, 4).to_config(LlamaConfig(vocab_size=300))
    LlamaForCausalLM(config).save_pretrained(home / "model")
    load_tokenizer(home / "run" / "stage-0-initial").save_pretrained(home / "model")
    write_models(home, config.to_dict())
    write_runs(home)


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """The directory in which the commands are typed."""
    home = tmp_path_factory.mktemp("home")
    fill(home)
    return home


@pytest.fixture(scope="session")
def recipe():
    """The recipes' launcher, as a module."""
    spec = importlib.util.spec_from_file_location("grow_1b", RECIPE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def list_files(home: Path) -> dict[str, tuple[int, int]]:
    """Return the size and the time of every file and directory."""
    files = {}
    for folder, folders, names in os.walk(home):
        folders[:] = [name for name in folders if name not in (CACHE, ".lock")]
        for name in (*folders, *names):
            path = os.path.join(folder, name)
            stat = os.lstat(path)
            files[path] = (stat.st_size, stat.st_mtime_ns)
    return files


def stop_waiting(*_: object) -> None:
    pytest.fail(f"no answer within {SECONDS} seconds")


@pytest.fixture
def type_line(home, recipe, monkeypatch, capfd):
    """Type a command line in `home`; return the exit code, stdout, stderr, and what was written."""
    from slop_hf.cli import main

    monkeypatch.chdir(home)
    monkeypatch.setenv("COLUMNS", "200")

    def run(line: str) -> tuple[object, str, str, set[str]]:
        words = shlex.split(line)
        is_recipe = words[:1] == [RECIPE.name]
        monkeypatch.setattr(sys, "argv", words if is_recipe else ["slop", *words])
        before = list_files(home)
        capfd.readouterr()
        signal.signal(signal.SIGALRM, stop_waiting)
        signal.alarm(SECONDS)
        try:
            with pytest.raises(SystemExit) as ended:
                recipe.main() if is_recipe else main()
        finally:
            signal.alarm(0)
        after = list_files(home)
        changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
        return ended.value.code, *capfd.readouterr(), changed

    return run


@pytest.mark.parametrize("line", TABLE)
def test_a_wrong_command_line_is_refused_in_words(line, type_line):
    code, out, err, changed = type_line(line)
    assert code == 2, f"exit code {code}\n{out[-500:]}\n{err[-1000:]}"
    lines = [line for line in err.splitlines() if not PROGRESS.match(line)]
    assert lines[0].startswith("error: ") and len(lines) <= 2, err
    assert not PYTHON.search(err), err
    assert re.search(TABLE[line], err, re.IGNORECASE), err
    assert out == ""
    assert not changed
