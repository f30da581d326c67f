"""MLflow, W&B and Trackio show one run for a staged run, also after an interruption; the real packages, offline."""

from pathlib import Path

import pytest
from training_runs import STEPS, trainer
from transformers import TrainerCallback

from slop_hf.runs.directory import RunDirectory, RunFacts

ALL_STEPS = set(range(1, 4 * STEPS + 1))


class Interrupt(TrainerCallback):
    """Interrupts training in the second stage, two steps after a checkpoint."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == STEPS + 6:
            raise KeyboardInterrupt


def train_twice(path, tool):
    """Train a run that is interrupted and resumed."""
    with pytest.raises(KeyboardInterrupt):
        trainer(path, report_to=[tool], callbacks=[Interrupt()]).train()
    trainer(path, report_to=[tool]).train(resume_from_checkpoint=True)


def test_mlflow_has_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri(f"file:{tmp_path}/mlruns")
    train_twice(tmp_path / "out", "mlflow")
    assert mlflow.active_run() is None
    client = mlflow.MlflowClient()
    [run] = client.search_runs(["0"])
    assert run.info.status == "FINISHED" and run.data.params["num_hidden_layers"]
    assert {metric.step for metric in client.get_metric_history(run.info.run_id, "loss")} == ALL_STEPS
    trainer(tmp_path / "another", report_to=["mlflow"]).train()
    assert len(client.search_runs(["0"])) == 2, "another run has its own"


def test_wandb_has_one_run(tmp_path, monkeypatch):
    """Offline there is a file per process; all have the run's id, so that `wandb sync` joins them."""
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.chdir(tmp_path)
    train_twice(tmp_path / "out", "wandb")
    wandb.finish()
    files = list(Path(tmp_path, "wandb").rglob("run-*.wandb"))
    assert files and len({file.stem for file in files}) == 1


def test_trackio_has_one_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is imported
    trackio = pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    if str(tmp_path) not in str(trackio.TRACKIO_DIR):
        pytest.skip("an earlier test has imported trackio, with another directory")
    monkeypatch.chdir(tmp_path)
    train_twice(tmp_path / "out", "trackio")
    trainer(tmp_path / "another", report_to=["trackio"]).train()
    first, second = sorted(SQLiteStorage.get_runs("huggingface"))
    run_id = RunFacts.load(RunDirectory(tmp_path / "out")).run_id
    assert run_id in (first, second) and first != second, "another run has its own"
    logged = [entry for entry in SQLiteStorage.get_logs("huggingface", run_id) if "train/loss" in entry]
    assert {entry["train/global_step"] for entry in logged} == ALL_STEPS
