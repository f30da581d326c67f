"""The tutorial and the notebook run as they are, and show what they print."""

import difflib
import importlib.util
import json
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
_spec = importlib.util.spec_from_file_location("run_page", ROOT / "docs" / "run_page.py")
run_page = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(run_page)

PAGE = """\
```yaml
# run.yaml
tokens: 5
```

```python
count = 2
print(count, "layers")
```

```text
stale
```

```bash
grep tokens run.yaml
```

```text
stale
```

```python
count += 1
```

```text
```
"""


def list_words(texts):
    """Return the words of outputs, without what differs between machines: numbers, units and lines of tables."""
    words = re.split(r"[^\w'-]+", " ".join(texts))
    return [word for word in words if word.isalpha() and len(word) > 2]


def measure_similarity(shown, printed):
    return difflib.SequenceMatcher(None, list_words(shown), list_words(printed), autojunk=False).ratio()


def test_blocks_run_in_order_and_outputs_are_replaced(tmp_path):
    page = run_page.run_page(PAGE, tmp_path)
    assert page == PAGE.replace("stale", "2 layers", 1).replace("stale", "tokens: 5")
    assert (tmp_path / "run.yaml").is_file() and Path.cwd() != tmp_path


@pytest.mark.parametrize("language, code", [("python", "1 / 0"), ("bash", "false\ntrue"), ("bash", "slop plann")])
def test_a_block_that_fails_is_reported(tmp_path, language, code):
    with pytest.raises((RuntimeError, ZeroDivisionError)):
        run_page.run_page(f"```{language}\n{code}\n```\n", tmp_path)


@pytest.mark.slow
def test_the_tutorial_runs_as_pasted(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    work = tmp_path / "work"
    work.mkdir()
    outputs = [re.findall(r"^```text\n(.*?)^```", page, re.M | re.S) for page in (text, run_page.run_page(text, work))]
    assert len(outputs[0]) > 10
    assert measure_similarity(*outputs) > 0.8, "run python docs/run_page.py docs/tutorial.md"


@pytest.mark.slow
def test_the_notebook_runs(tmp_path, monkeypatch):
    pytest.importorskip("nbclient")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), *sys.path]))
    text = (ROOT / "notebooks" / "quickstart.ipynb").read_text(encoding="utf-8")
    shown, printed = map(list_outputs, (text, run_page.run_notebook(text, tmp_path)))
    assert shown, "it is committed with its outputs"
    assert measure_similarity(shown, printed) > 0.8, "run python docs/run_page.py notebooks/quickstart.ipynb"


def list_outputs(text):
    """Return the printed outputs of a notebook."""
    outputs = [output for cell in json.loads(text)["cells"] for output in cell.get("outputs", ())]
    return ["".join(output.get("text", "")) for output in outputs]
