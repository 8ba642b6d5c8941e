"""Rollouts on disk: what a run trained on, and an engine that gives it back.

    rollouts/00000003-0000000192.npz     for the batch that updates the weights after step 3, from prompt 192 on

One file holds one round of prompts: its temperature, and for each of N rollouts its prompt's index and ids, sample
number, ids, log-probabilities, ending and versions of the weights, and the experts that served where the engine kept
them. A replay needs no sampler: it
repeats the updates of a run exactly, or tries another loss on the same rollouts (whose ratios stay right, for they are
taken against the log-probabilities on file).
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m1jax.errors import UserError
from m1jax.types import ENDINGS, Params, Problem, Prompt, Rollout, Sampling

ROLLOUTS = "rollouts"
SAME = "config.tasks, problems, tokenizer, seed, rollout and reward have to be"


FIELDS = (
    "prompt_index", "prompt_lengths", "prompt_ids", "temperature", "responses", "lengths", "token_ids",
    "rollout_logprobs", "endings", "weight_versions",
)  # fmt: skip


class ReplayEngine:
    """The rollouts of a run folder in place of an engine.

    Args:
        run: a run folder that was trained with `rollout.save`.
        steps: generation batches that will be asked.

    Raises:
        UserError: it has no rollouts, or not of so many steps; later, that it was asked something else there.
    """

    def __init__(self, run: str | Path, steps: int):
        self.folder, self.version = Path(run) / ROLLOUTS, -1
        if not self.folder.is_dir():
            raise UserError(
                f"config.rollout.replay: {run} holds no saved rollouts; train it with --config.rollout.save=true"
            )
        there = len({path.name.partition("-")[0] for path in self.folder.glob("*-*.npz")})
        if steps > there:
            raise UserError(
                f"config.rollout.replay: {run} holds the rollouts of {there} steps, config.steps is {steps}; lower it"
            )

    def set_weights(self, params: Params, version: int) -> None:
        self.version = version

    def generate(self, prompts: Sequence[Prompt], responses: int, sampling: Sampling, seed: int) -> list[list[Rollout]]:
        path = file_name(self.folder, self.version, prompts[0].index)
        if not path.is_file():
            raise UserError(f"{path}: no such rollouts; {SAME} those of the run that was saved")
        kept, rollouts, temperature = load_rollouts(path)
        if [p.token_ids for p in kept] != [p.token_ids for p in prompts]:
            raise UserError(f"{path}: answers to other prompts; {SAME} those of the run that was saved")
        if temperature != sampling.temperature:
            raise UserError(
                f"{path}: sampled at temperature {temperature:g}, where its log-probabilities hold; "
                f"config.sampling.temperature is {sampling.temperature:g}"
            )
        longest = max(len(r.token_ids) for group in rollouts for r in group)
        if len(rollouts[0]) != responses or longest > sampling.max_tokens:
            raise UserError(
                f"{path}: {len(rollouts[0])} responses of up to {longest} tokens; config.rollout.responses is "
                f"{responses} and config.sampling.max_tokens {sampling.max_tokens}"
            )
        return rollouts


def file_name(folder: Path, version: int, first: int) -> Path:
    """The file of one round: version of the weights that are updated with it, index of its first prompt."""
    return folder / f"{version:08d}-{first:010d}.npz"


def save_rollouts(
    path: Path, prompts: Sequence[Prompt], rollouts: Sequence[Sequence[Rollout]], temperature: float
) -> None:
    """Write one round's rollouts, whole or not at all."""
    flat = [r for group in rollouts for r in group]
    arrays = {
        "prompt_index": np.array([p.index for p in prompts], np.int64),
        "prompt_lengths": np.array([len(p.token_ids) for p in prompts], np.int32),
        "prompt_ids": np.concatenate([np.array(p.token_ids, np.int32) for p in prompts]),
        "temperature": np.array(temperature),
        "responses": np.array(len(rollouts[0]), np.int32),
        "lengths": np.array([len(r.token_ids) for r in flat], np.int32),
        "token_ids": np.concatenate([r.token_ids for r in flat]).astype(np.int32),
        "rollout_logprobs": np.concatenate([r.rollout_logprobs for r in flat]).astype(np.float32),
        "endings": np.array([ENDINGS.index(r.ending) for r in flat], np.int32),
        "weight_versions": np.array([r.weight_version for r in flat], np.int32),
    }
    if any(r.weight_versions is not None for r in flat):
        arrays["token_versions"] = np.concatenate(
            [
                np.full(len(r.token_ids), r.weight_version) if r.weight_versions is None else r.weight_versions
                for r in flat
            ]
        ).astype(np.int32)
    experts = [r.expert_ids for r in flat if r.expert_ids is not None]
    if len(experts) == len(flat):
        arrays["expert_ids"] = np.concatenate(experts)
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_suffix(".new")
    with staging.open("wb") as stream:
        np.savez_compressed(stream, **arrays)
    staging.replace(path)


def load_rollouts(path: Path) -> tuple[list[Prompt], list[list[Rollout]], float]:
    """(prompts, rollouts, temperature) as `save_rollouts` got them; the prompts come without their problems.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(path) as file:
            a = {name: file[name] for name in (*FIELDS, *({"expert_ids", "token_versions"} & set(file.files)))}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and record the run again") from error
    ids = np.split(a["prompt_ids"], np.cumsum(a["prompt_lengths"])[:-1])
    prompts = [
        Prompt(int(i), Problem("", "", None), tuple(map(int, x))) for i, x in zip(a["prompt_index"], ids, strict=True)
    ]
    cuts, responses = np.cumsum(a["lengths"])[:-1], int(a["responses"])
    tokens, logprobs = np.split(a["token_ids"], cuts), np.split(a["rollout_logprobs"], cuts)
    experts: Sequence[np.ndarray | None] = [None] * len(tokens)
    if "expert_ids" in a:
        experts = np.split(a["expert_ids"], np.cumsum(np.repeat(a["prompt_lengths"], responses) + a["lengths"])[:-1])
    versions: Sequence[np.ndarray | None] = [None] * len(tokens)
    if "token_versions" in a:
        versions = [v if (v != v[0]).any() else None for v in np.split(a["token_versions"], cuts)]
    flat = [
        Rollout(
            prompt_index=prompts[n // responses].index, sample=n % responses, token_ids=tokens[n],
            rollout_logprobs=logprobs[n], ending=ENDINGS[a["endings"][n]], weight_version=int(a["weight_versions"][n]),
            expert_ids=experts[n], weight_versions=versions[n],
        )
        for n in range(len(tokens))
    ]  # fmt: skip
    groups = [flat[p * responses : (p + 1) * responses] for p in range(len(prompts))]
    return prompts, groups, float(a["temperature"])
