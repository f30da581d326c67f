import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for the module next to this one

from saved_models import SHARD, save


@pytest.fixture
def source(tmp_path):
    return save(tmp_path / "source")


@pytest.fixture
def sharded(tmp_path):
    return save(tmp_path / "source", shard=SHARD)
