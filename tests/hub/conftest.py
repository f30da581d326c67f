import sys
import time
from pathlib import Path

import pytest
from huggingface_hub import HfApi, constants

sys.path.insert(0, str(Path(__file__).parent))  # for the modules next to this one

from published_runs import write_config
from server import LocalHub

from slop_hf import RunConfig, build_trainer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A local Hub for one test; the client of this process is online, with a cache for this test."""
    for module_constant, value in {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "cache-of-the-hub"),
    }.items():
        monkeypatch.setattr(constants, module_constant, value)
    with LocalHub() as local_hub:
        resolve = "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", local_hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", local_hub.endpoint + resolve)
        monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.01)))
        monkeypatch.setenv("HF_TOKEN", local_hub.token)
        yield local_hub


@pytest.fixture
def api(hub):
    return HfApi(hub.endpoint, token=hub.token)


def train_small(config, output, **changes):
    """Train a run of three short stages that has a tokenizer."""
    run_config = RunConfig.from_yaml(config, overrides={f"training.{name}": value for name, value in changes.items()})
    build_trainer(run_config, output).train()
    return output


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A finished run and its config; tests that change the run copy it."""
    directory = tmp_path_factory.mktemp("finished")
    return train_small(write_config(directory), directory / "run"), directory / "run.yaml"
