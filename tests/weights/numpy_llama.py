"""A Llama in float64 NumPy, computed straight from a GGUF file: what our reader and our model are checked against.

It shares nothing with them: rows of the query and key projections stay as the file has them, with interleaved rotary
pairs, and the blocks are decoded here. Only the container (names, metadata, raw bytes) is read by the `gguf` library.
Each layer is decoded when its turn comes, so the whole model is never in memory.
"""

import functools

import numpy as np
from gguf import GGUFReader


def token_logprobs(gguf_path, ids) -> np.ndarray:
    """log p(ids[t + 1] | ids[:t + 1]), float64 [T - 1]."""
    ids = np.asarray(ids)
    return _log_softmax(logits(gguf_path, ids[:-1]))[np.arange(len(ids) - 1), ids[1:]]


def greedy(gguf_path, ids, num_tokens, stop) -> list[int]:
    """The tokens after `ids` that have the highest logit, up to `stop` (left out) or `num_tokens` of them."""
    out = []
    while len(out) < num_tokens and (token := int(logits(gguf_path, [*ids, *out])[-1].argmax())) != stop:
        out.append(token)
    return out


def logits(gguf_path, ids) -> np.ndarray:
    """Logits after each token, float64 [T, vocabulary]."""
    meta, raw = _contents(str(gguf_path))
    weight = functools.partial(_decoded, raw)
    heads, kv_heads = meta["llama.attention.head_count"], meta["llama.attention.head_count_kv"]
    width = meta["llama.embedding_length"] // heads
    eps, length = meta["llama.attention.layer_norm_rms_epsilon"], len(ids)

    pair = np.arange(width // 2)
    angles = np.arange(length)[:, None] * meta["llama.rope.freq_base"] ** (-2.0 * pair / width)  # [T, width / 2]
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]  # the same for every head

    def rotated(x):  # [T, heads, width]
        even, odd = x[..., 0::2], x[..., 1::2]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)

    embedding = weight("token_embd.weight")
    x = embedding[np.asarray(ids)]
    future = np.triu(np.full((length, length), -np.inf), 1)
    for layer in range(meta["llama.block_count"]):
        w = {name: weight(f"blk.{layer}.{name}.weight") for name in LAYER}
        h = _rms_norm(x, w["attn_norm"], eps)
        q = rotated((h @ w["attn_q"].T).reshape(length, heads, width))
        k = rotated((h @ w["attn_k"].T).reshape(length, kv_heads, width))
        v = (h @ w["attn_v"].T).reshape(length, kv_heads, width)
        k, v = (np.repeat(a, heads // kv_heads, axis=1) for a in (k, v))  # query head i has key head i // group
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(width) + future
        mixed = np.einsum("hqk,khd->qhd", np.exp(_log_softmax(scores)), v)
        x = x + mixed.reshape(length, -1) @ w["attn_output"].T
        h = _rms_norm(x, w["ffn_norm"], eps)
        gate = h @ w["ffn_gate"].T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["ffn_up"].T)) @ w["ffn_down"].T
    x = _rms_norm(x, weight("output_norm.weight"), eps)
    return x @ (weight("output.weight") if "output.weight" in raw else embedding).T


LAYER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down")


@functools.lru_cache(maxsize=2)
def _contents(path):
    """The scalars of the metadata, and name -> (type, shape, bytes as stored)."""
    reader = GGUFReader(path)
    scalars = {key: field.contents() for key, field in reader.fields.items() if field.types[0].name != "ARRAY"}
    raw = {t.name: (t.tensor_type.name, tuple(map(int, t.shape[::-1])), np.asarray(t.data)) for t in reader.tensors}
    return scalars, raw


def _decoded(raw, name) -> np.ndarray:
    kind, shape, data = raw[name]
    if kind in ("F32", "F16"):
        return data.astype(np.float64).reshape(shape)
    if kind == "Q8_0":  # 32 numbers in 34 bytes: scale, then signed bytes
        blocks = data.reshape(-1, 34)
        scale = blocks[:, :2].copy().view(np.float16).astype(np.float64)
        return (scale * blocks[:, 2:].copy().view(np.int8)).reshape(shape)
    if kind == "Q4_1":  # 32 numbers in 20 bytes: scale, minimum, then 16 low nibbles before 16 high ones
        blocks = data.reshape(-1, 20)
        scale, minimum = blocks[:, :4].copy().view(np.float16).astype(np.float64).T[:, :, None]
        nibbles = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1)
        return (scale * nibbles + minimum).reshape(shape)
    raise ValueError(f"{name}: no decoder for {kind}")


def _rms_norm(x, weight, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _log_softmax(x):
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
