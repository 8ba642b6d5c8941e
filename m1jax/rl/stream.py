"""One answer, token by token as it is sampled: for a person who reads along.

The rule, the cache and the noise are the local engine's, so that the answer is the one that `LocalEngine` gives to
prompt number `prompt_index` as its sample 0. Two programs are compiled, one for the prompt (padded to a power of two)
and one for each further token; both hang on the padded length and the sampling setting alone.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from functools import partial

import jax
import numpy as np

from m1jax.errors import UserError
from m1jax.model import cache as cache_lib
from m1jax.model.cache import Cache
from m1jax.model.config import ModelConfig
from m1jax.model.transformer import head, hidden_states
from m1jax.rl.engine_local import sample_token
from m1jax.types import Params, Sampling


def stream(
    params: Params,
    config: ModelConfig,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    stop_ids: Collection[int],
    seed: int,
    prompt_index: int = 0,
) -> Iterator[tuple[int, float]]:
    """Yield (token id, its log-probability under the full tempered softmax), the stop token included.

    Args:
        params: arrays on the device; NumPy leaves would be sent there for every token.
        prompt_ids: the prompt as the model reads it.
        seed, prompt_index: what the sampling noise depends on, beside the number of the token.

    Raises:
        UserError: at once, not with the first token: no prompt, or more positions than the model was made for.
    """
    if not prompt_ids:
        raise UserError("the prompt has no tokens; give at least one")
    need, bound = len(prompt_ids) + sampling.max_tokens, config.max_positions
    if bound and need > bound:
        raise UserError(
            f"a prompt of {len(prompt_ids)} tokens and an answer of up to {sampling.max_tokens} need {need} positions, "
            f"the model was made for {bound}; lower max_tokens or shorten the prompt"
        )
    return _tokens(params, config, prompt_ids, sampling, frozenset(stop_ids), seed, prompt_index)


def _tokens(params, config, prompt_ids, sampling, stop_ids, seed, prompt_index) -> Iterator[tuple[int, float]]:
    length, width = len(prompt_ids), max(16, 1 << (len(prompt_ids) - 1).bit_length())
    tokens_BT = np.zeros((1, width), np.int32)
    tokens_BT[0, :length] = prompt_ids
    segment_ids_BT = (np.arange(width)[None] < length).astype(np.int32)
    key_B = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), np.uint32(prompt_index)), 0)[None]

    token_B, logprob_B, cache = _prefill(params, tokens_BT, segment_ids_BT, key_B, config=config, sampling=sampling)
    run = 0
    for t in range(1, sampling.max_tokens + 1):
        token, logprob = int(token_B[0]), float(logprob_B[0])
        yield token, logprob
        run = run + 1 if math.exp(logprob) > sampling.repetition_probability else 0
        if token in stop_ids or 0 < sampling.repetition_run <= run or t == sampling.max_tokens:
            return
        token_B, logprob_B, cache = _step(params, cache, token_B, key_B, t, config=config, sampling=sampling)


@partial(jax.jit, static_argnames=("config", "sampling"))
def _prefill(params, tokens_BT, segment_ids_BT, key_B, *, config: ModelConfig, sampling: Sampling):
    """(token_B, logprob_B, cache) after the prompt; the cache has room for `max_tokens` more."""
    B, T = tokens_BT.shape
    cache = cache_lib.empty(config, B, T + sampling.max_tokens)
    hidden_MD, cache, _ = hidden_states(params, config, tokens_BT, segment_ids_BT, cache)
    last_B = segment_ids_BT.sum(axis=1) - 1
    hidden_BD = hidden_MD.reshape(B, T, -1)[np.arange(B), last_B]
    return *sample_token(key_B, 0, head(params, hidden_BD), sampling), cache


@partial(jax.jit, static_argnames=("config", "sampling"), donate_argnames="cache")
def _step(params, cache: Cache, token_B, key_B, t, *, config: ModelConfig, sampling: Sampling):
    """(token_B, logprob_B, cache) one token further: token number t of the answer."""
    hidden_BD, cache, _ = hidden_states(params, config, token_B[:, None], np.ones((len(token_B), 1), np.int32), cache)
    return *sample_token(key_B, t, head(params, hidden_BD), sampling), cache
