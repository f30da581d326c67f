"""Hours and memory of the 1B recipe by estimate, as docs/gpu.md lists them; needs no GPU.

python benchmarks/gpu/estimates.py             # prints the table
"""

from __future__ import annotations

from pathlib import Path

from slop_hf import ModelDims, RunConfig, preview_run
from slop_hf.cost.device_peaks import look_up_peak_flops
from slop_hf.cost.flops import count_parameters
from slop_hf.cost.memory import estimate_training_memory
from slop_hf.dims import ModelConfig
from slop_hf.io.units import format_bytes
from slop_hf.training.batches import Batches

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "recipes/grow_1b.yaml"
GPU = "NVIDIA H200"
#: Numbers of GPUs, with the ZeRO stage of the recipe's launch.
LAUNCHES = {1: 0, 8: 3, 64: 3}
#: Shares of the GPU's peak in bf16 that the hours assume; no run has measured them.
ASSUMED_MFU = (0.3, 0.45)


def build_table() -> str:
    """Return the table in Markdown: the whole run's hours, and the memory of its largest stage."""
    config = RunConfig.from_yaml(RECIPE)
    peak = look_up_peak_flops(GPU, "bf16")
    assert peak is not None
    columns = [f"hours at {mfu:.0%}" for mfu in ASSUMED_MFU]
    lines = [f"| GPUs | ZeRO stage | micro-batch | memory per GPU | {' | '.join(columns)} |", "|---" * 6 + "|"]
    for devices, zero_stage in LAUNCHES.items():
        spans = preview_run(config, ROOT / "runs/of-an-estimate", devices=devices)
        largest = max(spans, key=lambda span: span.parameters)
        size = config.training["per_device_train_batch_size"]
        micro_batch = Batches.share(largest.blocks_per_step, size, devices).micro_batch_size
        model = config.model_config(largest.dims, config.data.vocab_size, as_described=True).to_dict()
        memory = estimate_memory(largest.dims, model, config.data.block_size, micro_batch, devices, zero_stage)
        flops = sum(span.flops for span in spans)
        hours = [f"{flops / (devices * peak * mfu * 3600):.2g}" for mfu in ASSUMED_MFU]
        lines.append(f"| {devices} | {zero_stage} | {micro_batch} | {format_bytes(memory)} | {' | '.join(hours)} |")
    return "\n".join(lines)


def estimate_memory(
    dims: ModelDims, config: ModelConfig, block_size: int, micro_batch: int, devices: int = 1, zero_stage: int = 0
) -> int:
    """Return the bytes that each device takes in bf16; without DeepSpeed, that is autocast over float32 weights."""
    estimate = estimate_training_memory(
        dims, config, block_size, zero_stage=zero_stage, devices=devices, micro_batch_size=micro_batch
    )
    return estimate.total + (0 if zero_stage else estimate_autocast_bytes(dims, config, micro_batch * block_size))


def estimate_autocast_bytes(dims: ModelDims, config: ModelConfig, tokens: int) -> int:
    """Return what autocast takes beyond weights in bf16, as `cost.memory.count_saved_activations` says.

    These are 2 bytes per parameter, and about ten per token of a micro-batch, layer and hidden unit.
    """
    return 2 * count_parameters(dims, config) + 10 * tokens * dims.num_hidden_layers * dims.hidden_size


if __name__ == "__main__":
    print(build_table())
