"""CISPO in TRL: GRPOTrainer's own training loop, stopped between windows of updates.

`train()` runs in a thread of its own and waits in a callback after the last update of every window, so that what is
timed is all that a user of TRL runs between two updates: dataloader, generation, reward, advantages, loss, optimizer.
"""

# The peers live in an environment of their own.
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import os
import platform
import sys
import threading
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from experiments.bench.peers.protocol import Prepared, serve
from experiments.bench.peers.workloads import RL, prompts, reward, tokenizer_json, workload


class Gate(TrainerCallback):
    """Lets the training thread through for one window at a time, and brings the initial policy back in between."""

    def __init__(self, window: int):
        self.window, self.tokens = window, 0
        self.failed: str | None = None
        self._go, self._done = threading.Event(), threading.Event()
        self._initial: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model: Any = None, **kwargs):
        self._initial = {name: value.clone() for name, value in model.state_dict().items()}
        self._wait()

    def on_step_end(self, args, state, control, model: Any = None, optimizer: Any = None, **kwargs):
        if state.global_step % self.window == 0:
            self._done.set()
            model.load_state_dict(self._initial)
            optimizer.state.clear()
            self._wait()

    def _wait(self) -> None:
        self._go.wait()
        self._go.clear()

    def end(self, why: str) -> None:
        """Training is over: nobody should wait for the next window."""
        self.failed = why
        self._done.set()

    def through(self) -> dict[str, Any]:
        """Let one window run and wait for its end."""
        self.tokens = 0
        self._go.set()
        self._done.wait()
        self._done.clear()
        if self.failed is not None:
            raise RuntimeError(f"training ended: {self.failed}")
        return {"updates": self.window, "tokens": self.tokens}


def make_trainer(work: RL, gate: Gate | None, folder: str) -> GRPOTrainer:
    """The trainer of the recipe. Without a gate it is only asked for its loss."""
    with open(os.path.join(folder, "tokenizer.json"), "w") as file:
        file.write(tokenizer_json())
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=file.name, pad_token="<pad>", eos_token="<eos>")
    torch.manual_seed(0)
    shape = work.model
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.mlp_dim,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
            max_position_embeddings=64, tie_word_embeddings=False, pad_token_id=0, bos_token_id=None, eos_token_id=1,
            attn_implementation="sdpa",
        )
    )  # fmt: skip

    def rewards(completion_ids, completions, **kwargs):
        if gate is not None:
            gate.tokens += sum(map(len, completion_ids))
        return [reward(text) for text in completions]

    config = GRPOConfig(
        output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_steps=16, max_steps=1_000_000, seed=0,
        per_device_train_batch_size=work.prompts * work.group, num_generations=work.group,
        steps_per_generation=work.updates_per_batch, gradient_accumulation_steps=1, num_iterations=1,
        max_completion_length=work.new_tokens, temperature=1.0, top_p=1.0, top_k=0,
        loss_type="cispo", epsilon_high=work.weight_cap, beta=0.0, learning_rate=work.learning_rate,
        lr_scheduler_type="constant", adam_beta1=work.betas[0], adam_beta2=work.betas[1], adam_epsilon=work.eps,
        weight_decay=0.0, max_grad_norm=work.max_grad_norm,
    )  # fmt: skip
    return GRPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": prompts(10_000, work.prompt_tokens)}),
        processing_class=tokenizer,
        callbacks=[gate] if gate is not None else None,
    )


def prepare(name: str, smoke: bool, folder: str) -> Prepared:
    work = workload(name, smoke)
    assert isinstance(work, RL)
    gate = Gate(work.window)
    trainer = make_trainer(work, gate, folder)

    def train() -> None:
        try:
            trainer.train()
            gate.end("no steps left")
        except BaseException as error:
            gate.end(f"{type(error).__name__}: {error}")
            raise

    threading.Thread(target=train, daemon=True).start()
    parameters = sum(p.numel() for p in trainer.model.parameters())
    return Prepared(gate.through, {"parameters": parameters, "setting": "sdpa, gradients of all 32 responses at once"})


def parity(policy: list, anchor: list, advantages: list, mask: list, weight_cap: float, folder: str) -> dict[str, Any]:
    """TRL's own loss, and its gradient, for given log-probabilities: only the network in front is left out."""
    trainer = make_trainer(RL(updates_per_batch=1, weight_cap=weight_cap), None, folder)
    logprobs = torch.tensor(policy, requires_grad=True)
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logprobs, torch.zeros_like(logprobs), None)
    trainer.current_gradient_accumulation_steps = 1
    ids, mask_BT = torch.zeros_like(logprobs, dtype=torch.long), torch.tensor(mask)
    loss = trainer._compute_loss(
        trainer.model.train(),
        {
            "prompt_ids": ids[:, :4], "prompt_mask": ids[:, :4] + 1, "completion_ids": ids, "completion_mask": mask_BT,
            "advantages": torch.tensor(advantages), "old_per_token_logps": torch.tensor(anchor),
            "num_items_in_batch": mask_BT.sum(),
        },
    )  # fmt: skip
    loss.backward()
    assert logprobs.grad is not None
    return {"loss": loss.item(), "gradient": logprobs.grad.tolist()}


def main() -> None:
    settings = json.loads(sys.argv[1])
    folder = settings["folder"]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": trl.__version__,
    }
    serve(
        lambda name: prepare(name, settings["smoke"], folder),
        versions,
        {"parity": lambda **arrays: parity(**arrays, folder=folder)},
    )


if __name__ == "__main__":
    main()
