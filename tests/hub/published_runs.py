"""A small run to publish, and the environment of programs that use the test's Hub."""

import yaml

from slop_hf.io.retry import RetryPolicy

QUICK = RetryPolicy(attempts=5, first_wait=0.01)


def write_config(directory):
    texts = directory / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"file {number}: " + " ".join(str(number * k) for k in range(60)))
    dims = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    deeper = {**dims, "num_hidden_layers": 3}
    wider = {**deeper, "intermediate_size": 48}
    run = {
        "schedule": {
            "initial": dims,
            "initial_tokens": 300,
            "stages": [
                {"operators": ["layer"], "dims": deeper, "tokens": 300},
                {"operators": ["ffn"], "dims": wider, "tokens": 300},
            ],
        },
        "model": {"tie_word_embeddings": True, "max_position_embeddings": 32},
        "data": {
            "source": str(texts),
            "vocab_size": 300,
            "block_size": 32,
            "held_out": 0.2,
            "cache_dir": str(directory / "cache"),
        },
        "training": {
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "logging_steps": 2,
            "disable_tqdm": True,
            "report_to": "none",
        },
    }
    (directory / "run.yaml").write_text(yaml.safe_dump(run))
    return directory / "run.yaml"


def online(hub, tmp_path):
    """Return the environment variables with which a program uses the test's Hub."""
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "hf-home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }
