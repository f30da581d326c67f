"""`slop plan` as a user would type it."""

import json
import os
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig

from slop_hf import GrowthSchedule, ModelDims, SlopPlanner
from slop_hf.cli.model_config import read_config
from slop_hf.cli.shared import print_if_slow
from slop_hf.cost.flops import count_parameters
from slop_hf.cost.hours import CostModel

START = ["plan", "--initial", "768,2048,6,6"]
PLAN = [*START, "--target-params", "1e9"]
TARGETS = ["2816,7680,8,22", "1280,3584,40,10", "1536,4096,32,12", "2560,6912,10,20"]
PAPER = [*START, *(part for target in TARGETS for part in ("--target", target))]


def test_plan_prints_a_table(output_of):
    text = output_of(*PLAN, "--top-k", 3)
    assert "(2816, 7680, 8, 22)" in text and "1.69e+24" in text and "l-f-h" in text


def test_plan_writes_a_schedule_that_train_accepts(tmp_path, config, output_of):
    done = output_of("plan", "--initial", "16,32,2,2", "--target", "32,48,3,4", "--operators", "layer,ffn,hidden,mha",
                "--tokens", "4e3", "-o", tmp_path / "plan.yaml", "--json")  # fmt: skip
    answer = json.loads(done)
    schedule = GrowthSchedule.from_yaml(tmp_path / "plan.yaml")
    assert (
        len(answer["schedules"]) == 5
        and answer["schedules"][0]["initial"]["hidden_size"] == 16
        and len(schedule.stages) == 4
    )
    rows = json.loads(
        output_of("train", config, "-s", tmp_path / "plan.yaml", "-o", tmp_path / "out", "--dry-run", "--json")
    )
    assert [row["stage"] for row in rows] == list(schedule.stage_names)
    assert not (tmp_path / "out").exists()


def test_plan_from_a_model(tmp_path, output_of):
    LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                tie_word_embeddings=True).save_pretrained(tmp_path)  # fmt: skip
    done = output_of("plan", "--from", tmp_path, "--target", "128,256,4,8", "--json")
    assert json.loads(done)["schedules"][0]["initial"] == ModelDims(64, 128, 2, 4).as_dict()


def test_plan_from_a_model_with_other_names_of_its_fields(tmp_path, output_of):
    """GPT-2: its sizes, an ffn of four times the width, and its learned positions, which count as parameters."""
    config = {"model_type": "gpt2", "vocab_size": 100, "n_positions": 32, "tie_word_embeddings": True}
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, **sizes}))
    done = output_of("plan", "--from", tmp_path, "--target", "128,512,4,8", "--json")
    assert json.loads(done)["schedules"][0]["initial"] == ModelDims(64, 256, 2, 4).as_dict()
    longer = {**config, **sizes, "n_positions": 64}
    assert read_config(str(tmp_path), "--from")[1] == config
    dims = ModelDims(64, 256, 2, 4)
    assert count_parameters(dims, longer) - count_parameters(dims, config) == 32 * 64


OPTIONS = {
    "paper": [],
    "every operator": ["--operators", "layer,ffn,hidden,mha"],
    "fixed heads": ["--target", "32,64,4,2", "--heads", "fixed"],
    "flops": ["--objective", "flops"],
    "hours": ["--objective", "hours", "--sharing", "utility"],
    "loss per hour": ["--objective", "loss_per_hour"],
    "repeated": ["--mode", "repeated", "--stages", "4"],
    "final loss": ["--mode", "joint", "--max-stages", "2", "--objective", "final_loss", "--flops", "1e9"],
    "joint": ["--mode", "joint", "--stages", "2", "--objective", "loss_per_hour"],
    "free": ["--mode", "repeated", "--objective", "hours", "--stage-price", "1e-12", "--max-stages", "5"],
    "limits": ["--max-factor", "3", "--tensor-parallel", "2", "--through", "16,64,4,2"],
    "given tokens": ["--tokens", "1e3,2e3,3e3,4e3"],
    "pretrained": ["--pretrained", "--already-seen", "1e6"],
    "memory": ["--device-memory", "1e9", "--zero", "3", "--devices", "2", "--checkpointing", "--precision", "fp32"],
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_train_accepts_every_schedule(options, tmp_path, config, output_of):
    has_stage_terms = "--flops" not in options
    common = ["plan", "--initial", "16,32,2,2", "--hidden-multiple", "8", "--ffn-multiple", "16"]
    common += ["--tokens", "4e3", "--explain"] if has_stage_terms else []
    target = [] if "--target" in options else ["--target", "32,64,4,4"]
    path = tmp_path / "plan.yaml"
    answer = json.loads(output_of(*common, *target, *options, "-o", path, "--json"))
    assert answer["schedules"] and bool(answer["choices"]) == has_stage_terms
    assert ("search" in answer) != has_stage_terms
    assert {arm["name"] for arm in answer["arms"]} >= {
        "plan",
        "from_scratch",
        "single_stage",
        "copies",
        "msg",
        "elle",
        "stacking",
    }
    for raw in answer["schedules"]:
        path.write_text(json.dumps(raw))  # YAML contains JSON
        rows = json.loads(output_of("train", config, "-s", path, "-o", tmp_path / "out", "--dry-run", "--json"))
        assert [row["stage"] for row in rows] == list(GrowthSchedule.from_yaml(path).stage_names)


def test_plan_answers_without_torch(tmp_path):
    """Every kind of search, reasons and control arms; a figure loads matplotlib, but no torch either."""
    figure = tmp_path / "a.svg"
    command = [*PAPER, "--tokens", "65e9", "--mode", "joint", "--stages", "3", "--explain", "--plot", figure]
    script = (
        "import sys; from slop_hf.cli import app; app(sys.argv[1:], standalone_mode=False);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert figure.read_text().lstrip().startswith("<?xml")


def test_no_verdict_on_tokens_that_teach_nothing(output_of):
    tiny = [*PAPER, "--tokens", "1,1,1,1"]
    text = " ".join(output_of(*tiny).split())
    assert "No verdict on growth" in text and "ln(vocabulary) = 10.37" in text and "1258" not in text
    answer = json.loads(output_of(*tiny, "--json"))
    assert answer["favours_growth"] is None and not any("loss" in arm for arm in answer["arms"])
    small = " ".join(
        output_of("plan", "--initial", "64,128,2,4", "--target", "128,256,4,8", "--tokens", "1e9").split()
    )
    assert "utside what this law was fitted to (" in small and "parameters, fitted to 44M to 16B" in small
    assert "utside what" not in output_of(*PAPER, "--tokens", "65e9")


def test_remarks_on_plans_that_could_mislead(output_of):
    start = [*START, "--target", "2816,7680,8,22"]
    passed = output_of(*start, "--tokens", "2e9", "--sharing", "utility", "--pretrained", "--no-arms")
    assert "Stages without tokens: 3." in passed and "--sharing paper trains every stage" in " ".join(passed.split())
    assert "without tokens" not in output_of(*start, "--tokens", "2e9")
    mha = ["plan", "--initial", "768,2048,6,6", "--target", "1536,4096,32,12", "--operators", "layer,ffn,hidden,mha"]
    assert "without heads" in output_of(*mha)
    assert "without heads" not in output_of(*mha, "--tokens", "2e9", "--objective", "flops")


@pytest.mark.parametrize(
    ("options", "remembered"),
    [
        ([], {}),
        (["--tied"], {"tie_word_embeddings": True}),
        (["--vocab-size", "300"], {"vocab_size": 300}),
        (["--from", "model"], {"vocab_size": 100, "tie_word_embeddings": True}),
    ],
)
def test_a_schedule_names_the_model_that_it_was_planned_for(tmp_path, monkeypatch, output_of, options, remembered):
    monkeypatch.chdir(tmp_path)
    LlamaConfig(vocab_size=100, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                tie_word_embeddings=True).save_pretrained("model")  # fmt: skip
    start = [] if "--from" in options else ["--initial", "64,128,2,4"]
    output_of("plan", *start, "--target", "128,256,4,8", *options, "-o", "plan.yaml")
    keys = yaml.safe_load(Path("plan.yaml").read_text())
    assert {name: keys[name] for name in ("vocab_size", "tie_word_embeddings") if name in keys} == remembered


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--vocab-size", "400"],
            "planned for a vocabulary of 400, the model has 300: plan with `slop plan --vocab-size",
        ),
        (
            ["--tied", "--vocab-size", "300"],
            "planned for tied embeddings, the model's are untied: plan without `--tied`",
        ),
    ],
)
def test_another_model_than_the_planned_one_is_refused(tmp_path, config, output_of, error_of, options, message):
    plan, model = tmp_path / "plan.yaml", tmp_path / "model"
    common = ["plan", "--initial", "16,32,2,2", "--target", "32,48,3,4", "--tokens", "4e3", "-o", plan]
    output_of(*common, *options)
    train = ["train", config, "--schedule", plan, "-o", tmp_path / "out", "--set", "model.tie_word_embeddings=false"]
    assert message in error_of(*train, "--dry-run")
    ModelDims(16, 32, 2, 2).to_config(LlamaConfig(vocab_size=300)).save_pretrained(model)
    assert message in error_of("grow", model, "--schedule", plan, "-o", tmp_path / "grown", "--dry-run")
    output_of(*common, "--vocab-size", "300")
    output_of(*train, "--dry-run")
    assert not (tmp_path / "out").exists()


def test_a_slow_search_says_so_once(monkeypatch, slop):
    """Outside a terminal too."""
    monkeypatch.setattr("slop_hf.cli.plan.print_if_slow", partial(print_if_slow, seconds=0.0))
    real = SlopPlanner.plan
    monkeypatch.setattr(
        SlopPlanner, "plan", lambda *args, **more: (threading.Event().wait(0.2), real(*args, **more))[1]
    )
    code, _, err = slop(*PAPER)
    assert code == 0 and err.count("still searching") == 1


def test_plan_compares_growth_with_the_best_way_not_to_grow(output_of):
    """With 65B tokens from scratch is as good; without growing at all, the initial model falls far behind."""
    text = " ".join(output_of(*PAPER, "--tokens", "65e9").split())
    assert "Too close to call: this schedule is predicted to end" in text and "“from scratch, this target”" in text
    answer = json.loads(output_of(*PAPER, "--tokens", "65e9", "--json"))
    options = {option["kind"]: option for option in answer["advice"]["options"]}
    assert set(options) == {"growth", "unchanged", "scratch_target", "scratch_best"}
    assert options["growth"]["schedule"]["stages"] == answer["schedules"][0]["stages"]
    assert options["unchanged"]["loss"] > options["scratch_target"]["loss"] + 0.1
    assert all(option["flops"] == pytest.approx(options["growth"]["flops"], rel=1e-6) for option in options.values())
    assert answer["favours_growth"] is None and answer["advice"]["verdict"]["kind"] == "too_close"
    unknown = output_of(*PAPER, "--tokens", "65e9", "--pretrained")
    assert "unknown" in unknown and "--already-seen" in unknown
    assert "advice" not in json.loads(output_of(*PAPER, "--tokens", "65e9", "--pretrained", "--json"))
    assert "from scratch" not in output_of(*PAPER, "--tokens", "65e9", "--no-arms")


def test_no_verdict_on_growth_from_no_layers(output_of):
    words = ["plan", "--initial", "64,128,0,4", "--target", "64,128,4,4", "--operators", "layer", "--tokens", "1e9"]
    assert "No verdict on growth: a growth law says nothing about growth from no layers" in output_of(*words)
    answer = json.loads(output_of(*words, "--json"))
    assert answer["favours_growth"] is None and answer["arms"] and "advice" not in answer


def test_a_plan_for_a_finished_model_is_compared_with_training_it_on(output_of):
    few = [*START, "--target", "1280,3584,40,10", "--pretrained", "--already-seen", "1e12", "--tokens", "1e9"]
    answer = json.loads(output_of(*few, "--json"))
    first, second, *_ = answer["advice"]["options"]
    assert (first["kind"], second["kind"]) == ("unchanged", "growth") and second["difference"] > 0.05
    assert "nats above “go on without growing”" in " ".join(output_of(*few).split())


def test_plan_by_the_final_loss_says_how_it_was_found(output_of):
    command = [*START, "--target", TARGETS[0], "--objective", "final_loss", "--flops", "1e20", "--no-arms"]
    text = " ".join(output_of(*command).split())
    search = json.loads(output_of(*command, "--json"))["search"]
    assert "final loss" in text and f"Exact: the best of all {search['compared']:,} runs" in text
    span = {"run": "one learning-rate schedule over the run", "stage": "a learning-rate schedule per stage"}
    assert f"Schedule 1 has {span[search['runs'][0]['span']]}" in text


def test_plan_explains(output_of):
    choices = json.loads(output_of(*PAPER, "--explain", "--json"))["choices"]
    assert [choice["taken"]["stage"]["operators"] for choice in choices] == [["layer"], ["ffn"], ["hidden", "mha"]]
    values = {choice["taken"]["value"] for choice in choices}
    assert len(values) == 1 and values.pop() == pytest.approx(1.689e24, rel=1e-3)
    others = {other["stage"]["operators"][0]: other["value"] for other in choices[0]["others"]}
    # l-h-f, f-l-h and f-h-l, h-l-f and h-f-l to the same target: the best of each beginning.
    orders = {
        s["stages"][0]["operators"][0]: [] for s in json.loads(output_of(*PAPER, "-k", "24", "--json"))["schedules"]
    }
    for schedule in json.loads(output_of(*PAPER, "-k", "24", "--json"))["schedules"]:
        if schedule["stages"][-1]["dims"]["num_hidden_layers"] == 8:
            orders[schedule["stages"][0]["operators"][0]].append(schedule["scores"]["delta_params"])
    assert others["ffn"] == pytest.approx(min(orders["ffn"]))
    assert others["mha"] == pytest.approx(min(orders["hidden"]))


def test_plan_to_a_config(tmp_path, output_of):
    for name, sizes in (("small", (64, 128, 2, 4)), ("large", (128, 256, 4, 8))):
        config = LlamaConfig(vocab_size=100, hidden_size=sizes[0], intermediate_size=sizes[1],
                             num_hidden_layers=sizes[2], num_attention_heads=sizes[3])  # fmt: skip
        config.save_pretrained(tmp_path / name)
    done = output_of("plan", "--from", tmp_path / "small", "--to", tmp_path / "large" / "config.json", "--json")
    (best, *_) = json.loads(done)["schedules"]
    assert best["stages"][-1]["dims"] == ModelDims(128, 256, 4, 8).as_dict()


class Hub(BaseHTTPRequestHandler):
    """A Hub with the config of one model."""

    config = json.dumps(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
                                    num_attention_heads=4).to_dict()).encode()  # fmt: skip

    def do_HEAD(self, with_body=False):
        exists = self.path == "/org/small/resolve/main/config.json"
        self.send_response(200 if exists else 404)
        self.send_header("Content-Length", str(len(self.config) if exists else 0))
        headers = {"ETag": '"1"', "X-Repo-Commit": 40 * "a"} if exists else {"X-Error-Code": "RepoNotFound"}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if exists and with_body:
            self.wfile.write(self.config)

    def do_GET(self):
        self.do_HEAD(with_body=True)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub(tmp_path):
    """The environment of a process that knows no other Hub."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        yield {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
        server.shutdown()


def test_plan_from_the_hub(hub):
    def plan(source):
        command = [sys.executable, "-m", "slop_hf", "plan", "--from", source, "--target", "128,256,4,8", "--json"]
        return subprocess.run(command, capture_output=True, text=True, env=hub)

    done = plan("org/small")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["schedules"][0]["initial"] == ModelDims(64, 128, 2, 4).as_dict()
    missing = plan("org/large")
    assert missing.returncode == 2
    assert missing.stderr.startswith("error: --from org/large: no readable config.json there, nor on the Hub (reading")


def test_plan_with_measured_hours(tmp_path, output_of, error_of):
    CostModel(2e-18, 1e-9, "a machine").to_yaml(tmp_path / "cost.yaml")
    measured = json.loads(output_of(*PAPER, "--tokens", "65e9", "--cost-model", tmp_path / "cost.yaml", "--json"))
    flops, hours = (measured["schedules"][0]["scores"][name] for name in ("flops", "hours"))
    assert hours == pytest.approx(2e-18 * flops + 1e-9 * 55e9 * 65 / 55, rel=1e-6)
    assert "nothing.yaml: no such file" in error_of(*PAPER, "--cost-model", tmp_path / "nothing.yaml")
