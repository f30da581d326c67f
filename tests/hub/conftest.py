import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

sys.path.insert(0, str(Path(__file__).parent))  # for the modules beside this one

from published_runs import write_config
from server import LocalHub

from slop_hf import RunConfig, build_trainer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub of the test's own; the client of this process is online, and keeps what it fetches in the test's cache."""
    for module_constant, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache-of-the-hub"),
    }.items():
        monkeypatch.setattr(constants, module_constant, value)
    with LocalHub() as found:
        resolve = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.endpoint + resolve)
        monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
        monkeypatch.setenv("HF_TOKEN", found.token)
        yield found


@pytest.fixture
def api(hub):
    return HfApi(hub.endpoint, token=hub.token)


def train_small(config, output, **changes):
    """A run of three short stages, a tokenizer among its files."""
    run_config = RunConfig.from_yaml(config, overrides={f"training.{name}": one for name, one in changes.items()})
    build_trainer(run_config, output).train()
    return output


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run, and the config that it was trained by; tests that change it take a copy."""
    directory = tmp_path_factory.mktemp("finished")
    return train_small(write_config(directory), directory / "run"), directory / "run.yaml"
