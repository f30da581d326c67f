"""The Python blocks of docs/publishing.md, run as pasted."""

import re
import shutil
from pathlib import Path

import server

PAGE = Path(__file__).parents[2] / "docs" / "publishing.md"


def test_the_python_of_the_page_runs(hub, api, finished, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "USER", "user")  # the owner of the page's repository
    monkeypatch.chdir(tmp_path)
    shutil.copy(finished[1], "run.yaml")
    of_a_stage, while_training = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    exec(while_training, {})
    branches = {branch.name for branch in api.list_repo_refs("user/mine").branches}
    assert branches == {"main", "stage-0-initial", "stage-1-layer", "stage-2-ffn"}
    exec(of_a_stage, {})  # the stage is there already
