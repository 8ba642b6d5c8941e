"""What SGLang is told about MiniMax-M1, in each of its processes: the entry point `sglang.srt.plugins`.

The launcher reads config.json before any model is imported, so the config class has to be known that early; the model
itself is found by SGLANG_EXTERNAL_MODEL_PACKAGE=m1jax.serving.models, which launch/sglang.sh sets.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any


def register() -> None:
    """Register the configs, the kind of hybrid, and the check that stands before every update, whatever the model."""
    from sglang.srt.configs.linear_attn_model_registry import LinearAttnModelSpec, register_linear_attn_model
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from transformers import AutoConfig

    from m1jax.serving.config import CONFIGS, MiniMaxM1Config

    for config in CONFIGS:
        AutoConfig.register(config.model_type, config, exist_ok=True)
    register_linear_attn_model(
        LinearAttnModelSpec(
            config_class=MiniMaxM1Config,
            backend_class_name="m1jax.serving.backend.lightning_backend",
            arch_names=["MiniMaxM1ForCausalLM", "MiniMaxText01ForCausalLM"],
            uses_mamba_radix_cache=True,
            support_mamba_cache=True,
            support_mamba_cache_extra_buffer=True,  # SGLang's GPU backend; ours refuses it
        )
    )
    HookRegistry.register(
        "sglang.srt.model_executor.model_runner_components.weight_updater.WeightUpdater.update_weights_from_disk",
        refuse_bad_folders,
        HookType.AROUND,
    )
    _plain_host_memory_without_a_gpu()


def _plain_host_memory_without_a_gpu() -> None:
    """Let the record of routed experts lie in ordinary memory: on a CPU, SGLang would register it with CUDA."""
    import torch
    from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS

    if not torch.cuda.is_available():
        ALLOC_MEMORY_FUNCS["cpu"] = lambda dims, dtype, **_: torch.empty(dims, dtype=dtype)


def refuse_bad_folders(update: Any, updater: Any, model_path: str, *args: Any, **options: Any) -> tuple[bool, str]:
    """Update from `model_path` if it holds exactly the tensors of the model; else say what is wrong and touch nothing.

    The answer to the request is then 400 with this message, and the old weights go on serving. What another model than
    ours needs is what the folder held that it was started from; one that is no folder of safetensors is not checked.
    Each rank looks for itself, and all do the same: a folder that one host does not see yet changes none of them.
    """
    from m1jax.serving.checkpoint import folder_problems, problems, tensors
    from m1jax.serving.config import MiniMaxM1Config

    config, folder = updater.model_config.hf_config, Path(model_path)
    if isinstance(config, MiniMaxM1Config):
        found = folder_problems(folder, config)
    else:
        model = updater.get_model()
        try:
            if not hasattr(model, "first_tensors"):  # the first update is about to change model_path
                model.first_tensors = _tensors_or_none(Path(updater.model_config.model_path))
            found = problems(tensors(folder), model.first_tensors) if model.first_tensors else []
        except (OSError, ValueError) as error:
            found = [f"{folder} cannot be read: {error}"]
    if not _on_all_ranks(not found):
        told = "; ".join(found) or f"another rank finds fault with {folder}, see its log"
        logging.getLogger(__name__).error("weights not updated: %s", told)
        return False, f"weights not updated, the old ones serve: {told}"
    done, message = update(updater, model_path, *args, **options)
    if not _on_all_ranks(done) and done:
        return False, "another rank could not read the weights, see its log; this one has them: update again"
    return done, message


def _on_all_ranks(good: bool) -> bool:
    """Whether something is true on every rank of the server: only the first one's answer reaches the client."""
    import torch
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    if group.world_size == 1:
        return good
    verdict = torch.tensor(int(good))
    torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN, group=group.cpu_group)
    return bool(verdict)


def _tensors_or_none(folder: Path) -> dict[str, tuple[int, ...]] | None:
    from m1jax.serving.checkpoint import tensors

    try:
        return tensors(folder)
    except (OSError, ValueError):
        return None
