"""The report as a whole."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from report_runs import SCRATCH, write_evaluations, write_sources

from slop_hf.errors import RunError
from slop_hf.report import summarise, tabulate_runs, tabulate_stages, write_report
from slop_hf.report.run_settings import list_settings
from slop_hf.report.summary import describe_outcomes
from slop_hf.runs.directory import RunFacts
from slop_hf.runs.launches import RunLaunches
from slop_hf.runs.settings import RunSettings, SettingsChange

SETTINGS = {"lr_scheduler_type": "cosine", "warmup_steps": 0.1, "bf16": True, "devices": 2, "strategy": "zero3"}
FILES = ["loss.png", "path.png", "report.html", "report.json", "report.md"]


def test_report_on_one_run_is_written_into_it(make_run):
    run = make_run()
    target = write_report([run])
    assert target == run.path / "report"
    assert sorted(file.name for file in target.iterdir()) == FILES
    text = (target / "report.md").read_text()
    assert text.startswith("# grown\n") and "unfinished" not in text
    assert tabulate_runs([summarise(run)]).markdown() in text and tabulate_stages(run.records()).markdown() in text
    assert 'from_pretrained("../stage-3-hidden")' in text
    assert all((target / link).is_file() for link in re.findall(r"!\[.*?\]\((.*?)\)", text))
    assert str(run.path.parent) not in text
    assert "\n\n\n" not in text and text.endswith("\n") and not text.endswith("\n\n")


def test_comparison_of_runs(make_run, tmp_path, text_only):
    paths = [make_run("slop").path, str(make_run("scratch", SCRATCH).path)]
    target = write_report(paths, tmp_path / "out" / "here")
    text = (target / "report.md").read_text()
    assert text.startswith("# Comparison of 2 runs\n")
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["slop", "scratch", "Columns"]
    for path in re.findall(r'Model.*from_pretrained\("(.*)"\)', text):
        assert (target / path / "stage.json").is_file()
    assert "Trained without growth" in text and "in the order l-f-h" in text
    slop, scratch = json.loads((target / "report.json").read_text())["runs"]
    assert slop["summary"]["sequence"] == "l-f-h" and len(slop["stages"]) == 4
    assert scratch["stages"][0]["dims"]["hidden_size"] == 128 and "marginal_utility" not in scratch["summary"]


def test_settings_and_samples_are_listed_and_the_verdict_comes_first(make_run, tmp_path, text_only):
    grown, scratch = make_run("slop"), make_run("scratch", SCRATCH)
    flops = grown.records()[-1].total_flops
    record = scratch.records()[0]
    (scratch.stage_dir(0) / "stage.json").write_text(replace(record, total_flops=flops).to_json())
    for run in (grown, scratch):
        facts = RunFacts(block_size=128, blocks=10**4, blocks_per_step=(32, 32, 64, 64), data_seed=1, seed=7)
        replace(facts, optimizer="muon", optimizer_state_at_growth="kept").save(run)
        changes = (SettingsChange(0, {**SETTINGS, "learning_rate": 3e-3}), SettingsChange(10, {"learning_rate": 1e-3}))
        RunSettings(changes).save(run)
        RunLaunches().add(["slop", "train", "run.yaml"], ["texts/"]).add(["slop", "train", "--resume"]).save(run)
    assert list_settings(grown, grown.records()) == {
        "begun": RunLaunches.load(grown).launches[0].time + ", resumed 1 time",
        "command": "slop train run.yaml",
        "data": "texts/",
        "learning rate": "0.001; cosine over each stage, warm-up 10%",
        "batch": "4.1k → 8.19k tokens per step, in blocks of 128",
        "optimizer": "muon; keeps its state at a growth",
        "seed": "7",
        "devices": "2, zero3, bf16",
    }
    target = write_report([grown, scratch], tmp_path / "out", samples=[("def f", "(x):\n    <b>"), ("def f", "()")])
    page, text = (target / "report.html").read_text(), (target / "report.md").read_text()
    (verdict,) = describe_outcomes([summarise(grown), summarise(scratch)])
    assert f"{verdict[1:]}.</strong>" in page[: page.index("<table>")] and verdict[1:] in text[: text.index("| ---")]
    assert page.count("<dt>learning rate</dt>") == 2 and "- learning rate: 0.001; cosine" in text
    assert "<strong>def f</strong>(x):\n    &lt;b&gt;" in page and "```text\ndef f(x):\n    <b>\n```" in text
    with pytest.raises(RunError, match="1 samples for 2 runs"):
        write_report([grown, scratch], tmp_path / "out", samples=[("a", "b")])


def test_names_are_shown_as_they_are(make_run, text_only):
    """In headings and tables no part of a name is markup, and the code to load a model stays code."""
    runs = [make_run('*a* [x](y) <i> | `b` "c"\n# d'), make_run("plain_name")]
    target = write_report(runs, runs[0].path.parent / "out")
    text = (target / "report.md").read_text()
    escaped = r'\*a\* \[x\](y) \<i\> \| \`b\` "c" \# d'
    assert re.findall("^#+ (.*)$", text, re.MULTILINE) == ["Comparison of 2 runs", escaped, "plain_name", "Columns"]
    assert f"| {escaped} |" in text and "| plain_name |" in text
    assert r"""from_pretrained("../*a* [x](y) <i> | `b` \"c\"\n# d/stage-3-hidden")""" in text


def test_a_run_that_lacks_a_stage_is_refused_by_name(make_run):
    run = make_run()
    shutil.rmtree(run.path / "stage-1-layer")
    with pytest.raises(RunError, match=r"stage-1-layer is missing.*, but stage-2-ffn is there"):
        write_report(run)
    assert not (run.path / "report").exists()


def test_runs_with_the_same_name_are_distinguished(make_run, text_only):
    text = (write_report([make_run("a/run"), make_run("b/run")]) / "report.md").read_text()
    assert re.findall("^## (.*)$", text, re.MULTILINE) == ["a/run", "b/run", "Columns"]


def test_unfinished_run_is_marked(make_run, text_only):
    text = (write_report(make_run(stages=2)) / "report.md").read_text()
    assert "**grown is unfinished**: 2 of 4 stages" in text and "grown (2 of 4 stages)" in text
    assert 'from_pretrained("../stage-1-layer")' in text


def test_report_is_replaced(make_run, text_only):
    run = make_run()
    target = write_report([run])
    first = {file: (target / file).read_bytes() for file in FILES}
    (target / "report.md").write_text("old")
    write_report([run])
    assert {file: (target / file).read_bytes() for file in FILES} == first


def test_diverged_run_is_reported_in_strict_json(make_run, text_only):
    target = write_report([make_run(perplexity=math.inf)])
    text = (target / "report.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(word))
    assert "| inf |" in (target / "report.md").read_text()


def test_sections_of_scores_and_data_per_stage(make_run, text_only):
    run = write_sources(write_evaluations(make_run("full"), {"piqa": 0.6}), {"web": 0.75, "code": 0.25})
    target = write_report([run, make_run("bare")])
    text = (target / "report.md").read_text()
    full, bare = text.split("## bare\n")
    headings = ["Results per stage", "Held-out loss by source", "Tokens by source"]
    assert re.findall("^### (.*)$", full, re.MULTILINE) == headings and "###" not in bare
    assert "\n\n\n" not in text and "**share**" in text and "**task**" in text
    values = json.loads((target / "report.json").read_text())["runs"]
    assert values[0]["evaluations"]["stage-3-hidden"][0]["metrics"]["acc"] == pytest.approx(0.6)
    assert values[0]["stages"][1]["data"][1]["source"] == "code" and values[0]["stages"][1]["eval_losses"]["web"]
    assert "evaluations" not in values[1]


def test_figures_come_and_go_with_the_runs(make_run, tmp_path, text_only):
    scores = {"piqa": 0.6, "boolq": 0.5, "arc": 0.3}
    runs = [write_evaluations(make_run(name), scores) for name in ("one", "two", "three")]
    target = write_report(runs, tmp_path / "out")
    assert {file.name for file in target.iterdir()} == {*FILES, "radar.png", "correlation.png"}
    assert "![Downstream tasks](radar.png)" in (target / "report.md").read_text()
    write_report(runs[:1], target)
    assert {file.name for file in target.iterdir()} == {*FILES}
    assert "radar" not in (target / "report.md").read_text()


def test_missing_evaluation_is_shown_as_dashes(make_run, text_only):
    target = write_report([make_run(perplexity=None, eval_loss=None, eval_loss_after_growth=None)])
    text = (target / "report.md").read_text()
    assert "held-out loss None" not in text and "None" not in text


@pytest.mark.parametrize("bad", ["", "empty", "no-such"])
def test_bad_directory_is_rejected_before_writing(make_run, tmp_path, bad):
    run = make_run()
    (tmp_path / "empty").mkdir()
    with pytest.raises(RunError, match="is not a run"):
        write_report([run, tmp_path / bad], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_arguments_are_rejected(make_run, tmp_path):
    run = make_run()
    with pytest.raises(RunError, match="no runs"):
        write_report([])
    with pytest.raises(RunError, match="more than once"):
        write_report([run, run.path])
    with pytest.raises(RunError, match="no finished stage"):
        write_report([run, make_run("new", stages=0)])
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="is a file"):
        write_report([run], tmp_path / "file")
    with pytest.raises(RunError, match="stage-1-layer is missing or not whole, but stage-2-ffn is there"):
        (run.stage_dir(1) / "stage.json").unlink()
        write_report([run])
    with pytest.raises(RunError, match=r"evaluations\.json: "):
        (other := make_run("other")).stage_dir(1).joinpath("evaluations.json").write_text('[{"task": 1}]')
        write_report([other])
    assert not (other.path / "report").exists()
    assert not (run.path / "report").exists()


def test_relative_paths_have_names(make_run, monkeypatch, text_only):
    run = make_run()
    monkeypatch.chdir(run.path)
    assert (write_report(".") / "report.md").read_text().startswith("# grown\n")
    assert Path("report/loss.png").is_file()
