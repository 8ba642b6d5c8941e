"""What a decoder costs, by arithmetic on its shape: parameters, FLOPs, bytes, money. Instant, and without a device.

    count = parameters(config)                            # by part, in all, active per token
    shape = footprint(config)                             # what FLOPs depend on; DEEPSEEK_R1.footprint() has one too
    sequence_flops(shape, 65_536, "causal")               # F(n) = 2 N_act n + kappa n^2 + lin n
    cache_bytes(config, rows=8, slots=131_072)

A FLOP is a multiplication or an addition, so a parameter that acts on a token costs two. Counted are the products with
parameters, attention's products of tokens with tokens, and the recurrence of lightning attention. Left out: softmax,
norms, activations and rotary embedding (their parameters are counted as if multiplied), the router's top-k, sampling.

Of what a program holds besides its arguments, `training_bytes` counts the large arrays: what a compiler takes for a
program is its own to say (experiments/plan_aot.py asks one). Not known here: how fast any device is, communication, and
whether an expert's weights have to be read. Nothing here imports jax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from m1jax.mesh import GATHERED, ROWS, TOKENS
from m1jax.model.config import ModelConfig

ACCOUNTINGS = {
    "causal": "every query times the keys that it sees: h (d_qk + d_v) a layer and pair of tokens",
    "full": "the masked half as well: twice that",
    "chart": "as Figure 1 of the M1 report counts: scores causal, values full, h (d_qk + 2 d_v)",
    "absorbed": "causal, multi-head latent attention read in its latent space: h (2 d_latent + d_rope)",
}
"""Ways to count softmax attention. A claim about FLOPs means nothing without one of them."""

_SIZES = {"bfloat16": 2, "float32": 4, "float64": 8}


# Parameters ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """How many parameters a decoder has.

    Attributes:
        parts: by part of the model; a part that the decoder lacks is 0.
        total: their sum.
        active: what acts on one token, without embedding and head (MiniMax-M1: "45.9B").
        active_with_head: and the head's D * V, tied or not. This is N_act of the FLOPs: a lookup multiplies nothing.
        active_with_both: and the embedding, where it is not the head.
    """

    parts: dict[str, int]
    total: int
    active: int
    active_with_head: int
    active_with_both: int


def parameters(config: ModelConfig) -> Parameters:
    """Parameters of `transformer.init(key, config)`, without making any."""
    c = config
    D, V, N, K, H, F, E = (
        c.hidden_size, c.vocab_size, c.num_heads, c.num_kv_heads, c.head_dim, c.expert_dim, c.num_experts,
    )  # fmt: skip
    lightning, softmax = c.kinds.count("lightning"), c.kinds.count("softmax")
    parts = {
        "embedding": V * D,
        "head": 0 if c.tied_embeddings else D * V,
        "router gates": c.num_layers * D * E,
        "experts": c.num_layers * E * 3 * D * F,
        "dense MLP": 0 if E else c.num_layers * 3 * D * F,
        # q, k and v, gate, out; the norm over all heads
        "lightning attention": lightning * (D * 3 * N * H + D * N * H + N * H * D + N * H),
        # q and out; k and v; biases
        "softmax attention": softmax * (2 * D * N * H + 2 * D * K * H + c.qkv_bias * (N + 2 * K) * H),
        "norms": (2 * c.num_layers + 1) * D,
    }
    total = sum(parts.values())
    idle = parts["experts"] - parts["experts"] * c.experts_per_token // max(E, 1)
    active = total - parts["embedding"] - parts["head"] - idle
    return Parameters(parts, total, active, active + D * V, active + D * V + parts["head"])


# What FLOPs depend on ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Footprint:
    """What FLOPs, and memory while decoding, depend on, for any of the decoders compared.

    Attributes:
        active: N_act, parameters that act on one token, with the head and without the embedding.
        head: those of the head.
        softmax_layers, heads: how much softmax attention.
        score_dim, value_dim: d_qk and d_v of one head.
        absorbed_dims: the two where latent attention is read in its latent space; None for all other attention.
        lightning_flops: of the lightning recurrence per token.
        cache_bytes: of keys and values per token.
        state_bytes: of lightning states per sequence, whatever its length.
    """

    active: int
    head: int
    softmax_layers: int
    heads: int
    score_dim: int
    value_dim: int
    absorbed_dims: tuple[int, int] | None
    lightning_flops: int
    cache_bytes: int
    state_bytes: int


def footprint(config: ModelConfig) -> Footprint:
    """The footprint of one of our decoders."""
    c = config
    # Per head and token: H^2 each for the decay, and two for k v^T and its addition, two for q S. The chunked form of
    # training and prefill spends 4 H^2 + 4 C H instead (chunk C, masked half included): matrix units like it better.
    recurrence = c.kinds.count("lightning") * c.num_heads * 5 * c.head_dim**2
    return Footprint(
        active=parameters(c).active_with_head,
        head=c.hidden_size * c.vocab_size,
        softmax_layers=c.kinds.count("softmax"),
        heads=c.num_heads,
        score_dim=c.head_dim,
        value_dim=c.head_dim,
        absorbed_dims=None,
        lightning_flops=recurrence,
        cache_bytes=kv_bytes(c, 1, 1),
        state_bytes=state_bytes(c, 1),
    )


@dataclass(frozen=True)
class LatentDecoder:
    """A mixture of experts with multi-head latent attention: what DeepSeek-V3's config.json calls its sizes.

    Norms are not counted: 0.001% of the parameters.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    dense_layers: int
    dense_dim: int
    experts: int
    experts_per_token: int
    shared_experts: int
    expert_dim: int

    def active(self) -> int:
        """Parameters that act on one token, with the head and without the embedding."""
        s, D = self, self.hidden_size
        score_dim = s.qk_nope_head_dim + s.qk_rope_head_dim
        attention = (
            D * s.q_lora_rank + s.q_lora_rank * s.heads * score_dim
            + D * (s.kv_lora_rank + s.qk_rope_head_dim)
            # Absorbed into queries and outputs these two cost as much per token as they do on keys and values.
            + s.kv_lora_rank * s.heads * (s.qk_nope_head_dim + s.v_head_dim)
            + s.heads * s.v_head_dim * D
        )  # fmt: skip
        mixture = (s.experts_per_token + s.shared_experts) * 3 * D * s.expert_dim + D * s.experts
        mlps = s.dense_layers * 3 * D * s.dense_dim + (s.layers - s.dense_layers) * mixture
        return s.layers * attention + mlps + D * s.vocab_size

    def footprint(self) -> Footprint:
        """As `footprint` of a ModelConfig; the latent cache in bfloat16."""
        s = self
        return Footprint(
            active=s.active(),
            head=s.hidden_size * s.vocab_size,
            softmax_layers=s.layers,
            heads=s.heads,
            score_dim=s.qk_nope_head_dim + s.qk_rope_head_dim,
            value_dim=s.v_head_dim,
            absorbed_dims=(s.kv_lora_rank + s.qk_rope_head_dim, s.kv_lora_rank),
            lightning_flops=0,
            cache_bytes=2 * s.layers * (s.kv_lora_rank + s.qk_rope_head_dim),
            state_bytes=0,
        )


DEEPSEEK_R1 = LatentDecoder(
    vocab_size=129_280,
    hidden_size=7168,
    layers=61,  # num_hidden_layers; the multi-token-prediction layer behind them is not run when decoding
    heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    dense_layers=3,  # first_k_dense_replace
    dense_dim=18_432,  # intermediate_size
    experts=256,  # n_routed_experts
    experts_per_token=8,
    shared_experts=1,  # n_shared_experts
    expert_dim=2048,  # moe_intermediate_size
)
"""DeepSeek-R1: the released config.json, which is DeepSeek-V3's (arXiv 2412.19437)."""

QWEN3_235B = ModelConfig(
    vocab_size=151_936,
    num_layers=94,
    hidden_size=4096,
    num_heads=64,
    num_kv_heads=4,
    head_dim=128,
    rotary_dim=128,
    num_experts=128,
    experts_per_token=8,
    expert_dim=1536,  # moe_intermediate_size
    lightning_alpha=1.0,
    softmax_alpha=1.0,
    mlp_alpha=1.0,
    postnorm=False,
    layer_pattern=("softmax",),
    rope_theta=1e6,
    norm_eps=1e-6,
    dtype="bfloat16",
    param_dtype="bfloat16",
)
"""Qwen3-235B-A22B: the released config.json, as far as costs go. Its norms of queries and keys (24,064 parameters) have
no place in our decoder, so this is a shape to count with, not a model to load."""


# FLOPs ---------------------------------------------------------------------------------------------------------------


def attention_flops(shape: Footprint, accounting: str = "causal") -> int:
    """kappa: FLOPs of softmax attention over n tokens, divided by n^2.

    One query and one key cost 2 h (d_qk + d_v); a causal mask leaves n^2 / 2 pairs (the diagonal's n / 2 more are left
    out, as in the report's chart).

    Raises:
        ValueError: an accounting that is not one of ACCOUNTINGS.
    """
    scores, values = shape.score_dim, shape.value_dim
    if accounting == "absorbed" and shape.absorbed_dims:
        scores, values = shape.absorbed_dims
    if accounting not in ACCOUNTINGS:
        raise ValueError(f"accounting: {accounting!r} must be one of {', '.join(ACCOUNTINGS)}")
    if accounting == "full":
        scores, values = 2 * scores, 2 * values
    elif accounting == "chart":
        values = 2 * values
    return shape.softmax_layers * shape.heads * (scores + values)


def sequence_flops(shape: Footprint, tokens: int, accounting: str = "causal") -> float:
    """F(n) = 2 N_act n + kappa n^2 + lin n: all of n tokens once, each with its logits; training's forward pass."""
    per_token = 2 * shape.active + shape.lightning_flops
    return float(per_token * tokens + attention_flops(shape, accounting) * tokens**2)


def prefill_flops(shape: Footprint, tokens: int, accounting: str = "causal") -> float:
    """Of reading a prompt of n tokens: F(n) with the logits of the last token only."""
    return sequence_flops(shape, tokens, accounting) - 2.0 * shape.head * (tokens - 1)


def decode_flops(shape: Footprint, context: int, accounting: str = "causal") -> float:
    """Of one more token that attends to `context` tokens, itself included.

    Only "causal" and "absorbed" describe work that a decoder does; the other two spread the cost of a mask over tokens.
    """
    return 2.0 * shape.active + shape.lightning_flops + 2.0 * attention_flops(shape, accounting) * context


def generation_flops(shape: Footprint, tokens: int, accounting: str = "causal", prompt: int = 0) -> float:
    """Of n tokens generated one by one behind a prompt that is already read: F(prompt + n) - F(prompt)."""
    return sequence_flops(shape, prompt + tokens, accounting) - sequence_flops(shape, prompt, accounting)


def training_passes(remat: str) -> int:
    """Forward passes that forward and backward together are worth: 3, and 4 where layers are computed again.

    The gradient of a product is two products. Both numbers round what our training step does. More: the head's logits
    are computed again in any case (`model/logprobs.py`), and so is attention longer than one block. Less: what a layer
    computes last (the down projection) is not computed again, since no gradient needs it.
    """
    return 3 if remat == "none" else 4


def train_flops(shape: Footprint, tokens: int, accounting: str = "causal", remat: str = "none") -> float:
    """Of forward and backward pass over one sequence of n tokens; AdamW's share is negligible."""
    return training_passes(remat) * sequence_flops(shape, tokens, accounting)


# Bytes ---------------------------------------------------------------------------------------------------------------


def weight_bytes(config: ModelConfig) -> int:
    """Of the parameters in param_dtype, router gates at least float32. Their gradients take as many."""
    count, size = parameters(config), _SIZES[config.param_dtype]
    gates = count.parts["router gates"]
    return (count.total - gates) * size + gates * max(4, size)


def optimizer_bytes(config: ModelConfig, moments: str = "", master: bool = False) -> int:
    """Of AdamW's m and v, without two counters of 4 bytes.

    Args:
        config: the model.
        moments: as `optimizer.moments` of a config: one dtype for all, or "" for that of each parameter.
        master: add a float32 copy of the parameters that are narrower than that. Our trainer keeps none: it trains
            float32 parameters and computes in `dtype` (ModelConfig.param_dtype, .dtype).
    """
    count = parameters(config)
    narrow = count.total - count.parts["router gates"] if _SIZES[config.param_dtype] < 4 else 0
    both = 2 * (count.total * _SIZES[moments] if moments else weight_bytes(config))
    return both + master * 4 * narrow


def state_bytes(config: ModelConfig, rows: int) -> int:
    """Of the lightning states of `rows` sequences: N H^2 values a layer, at least float32."""
    c = config
    return rows * c.kinds.count("lightning") * c.num_heads * c.head_dim**2 * max(4, _SIZES[c.dtype])


def kv_bytes(config: ModelConfig, rows: int, slots: int) -> int:
    """Of the keys and values of `rows` sequences with `slots` tokens each, padding included: 2 K H a softmax layer."""
    c = config
    return rows * slots * c.kinds.count("softmax") * 2 * c.num_kv_heads * c.head_dim * _SIZES[c.dtype]


def cache_bytes(config: ModelConfig, rows: int, slots: int) -> int:
    """Of `model.cache.empty(config, rows, slots)`: states, keys and values, int32 position and segment of each slot."""
    return state_bytes(config, rows) + kv_bytes(config, rows, slots) + 4 * (2 * rows * slots + rows + 1)


def logits_bytes(config: ModelConfig, tokens: int) -> int:
    """Of the logits of `tokens` tokens, at least float32. Training holds ModelConfig.head_rows tokens' at a time."""
    return tokens * config.vocab_size * max(4, _SIZES[config.dtype])


# Bytes of a device --------------------------------------------------------------------------------------------------


def training_bytes(
    config: ModelConfig, rows: int, tokens: int, moments: str, blocked: bool = False
) -> dict[str, float]:
    """What one device of `config.mesh` holds at the fullest moment of an update, by kind.

    Args:
        config: the model; its mesh says what is dealt out, its remat what is kept for the backward pass.
        rows, tokens: of a micro-batch, on all devices together.
        moments: dtype of AdamW's, "" for that of the parameters.
        blocked: softmax attention writes the scores of a block of queries to memory (no kernel serves it).

    The moment is the backward pass of a layer, or that of the head, whichever takes more: both are held against what a
    compiler found in BUILD.md. Not counted: the batch, what a compiler keeps twice, fragments.
    """
    c, mesh, sizes = config, config.mesh, _SIZES
    B, T = rows // mesh.along(ROWS), tokens // mesh.context
    M = B * T
    D, V, wide = c.hidden_size, c.vocab_size // mesh.tensor, max(4, sizes[c.dtype])
    held = held_parameters(c)
    narrow = sizes[c.dtype]
    parts = {
        "parameters": held * sizes[c.param_dtype],
        "AdamW's moments": 2 * held * sizes[moments or c.param_dtype],
        "gradients of a micro-batch, and their sum": held * (sizes[c.param_dtype] + max(4, sizes[c.param_dtype])),
        f"kept for the backward pass (remat {c.remat!r})": c.num_layers * M * _kept_per_token(c) * narrow,
    }
    F, A = c.expert_dim // mesh.tensor, max(c.experts_per_token, 1)
    X = c.num_heads * c.head_dim // mesh.tensor
    own = c.num_experts // mesh.expert or 1
    slots = M * A * (mesh.expert_capacity if mesh.expert > 1 else 1)
    weights = own * 3 * D * F
    mlp = (4 * slots * D + 5 * slots * F + 2 * M * A * D + weights) * narrow + (M * D + weights) * wide
    weights = 5 * D * X
    attention = (4 * M * D + 12 * M * X + weights) * narrow + weights * wide
    if blocked and "softmax" in c.kinds:
        scores = c.num_heads // mesh.tensor * B * min(c.attention_block, T) * tokens * wide
        attention += BLOCKED_SCORES * scores
    block = min(M, 2**24 // V)
    head = D * V * (sizes[c.param_dtype] + 2 * wide) + 3 * block * V * wide + 2 * M * D * narrow
    return parts | {"the layer, or the head, that is computed": max(mlp, attention, head)}


BLOCKED_SCORES = 3
"""Times that the scores of a block are in memory at once in the backward pass (their exponentials, the gradients of
both), by XLA's compiler for CPUs; by that for TPUs it is 2, since what lies between two products is part of them. Not
known for GPUs, where blocks are used most: the larger is taken."""


def decoding_bytes(config: ModelConfig, rows: int, slots: int) -> dict[str, float]:
    """What one device of `config.mesh` holds while `rows` answers decode in the local engine, by kind.

    Weights are in `dtype`, the head in its own, and whole along `data`, `fsdp` and `context`, where rows are dealt out;
    `slots` are the tokens that a row may have.
    """
    c, mesh = config, config.mesh
    whole = replace(c, mesh=replace(mesh, data=1, fsdp=1, context=1))
    here = rows // mesh.along(TOKENS)
    head = c.vocab_size * c.hidden_size // mesh.tensor * (_SIZES[c.param_dtype] - _SIZES[c.dtype])
    return {
        f"weights in {c.dtype}, head in {c.param_dtype}": held_parameters(whole) * _SIZES[c.dtype] + head,
        "caches of answers": (state_bytes(c, here) + kv_bytes(c, here, slots)) / mesh.tensor,
    }


def held_parameters(config: ModelConfig) -> float:
    """Parameters that one device of `config.mesh` holds."""
    c, mesh, parts = config, config.mesh, parameters(config).parts
    gathered = mesh.along(GATHERED)
    # Norms over heads and biases have no width to be dealt out and gathered.
    narrow = c.kinds.count("lightning") * c.num_heads + c.kinds.count("softmax") * c.qkv_bias * (
        c.num_heads + 2 * c.num_kv_heads
    )
    narrow *= c.head_dim / mesh.tensor * (1 - 1 / gathered)
    dealt = {
        "experts": gathered * mesh.tensor * mesh.expert,
        "router gates": gathered,
        "norms": 1,
    }
    return sum(n / dealt.get(name, gathered * mesh.tensor) for name, n in parts.items()) + narrow


def _kept_per_token(config: ModelConfig) -> float:
    """Numbers that a layer keeps of a token for its backward pass: its input, the outputs of its products, or all."""
    c, mesh = config, config.mesh
    X, F, A = c.num_heads * c.head_dim // mesh.tensor, c.expert_dim // mesh.tensor, max(c.experts_per_token, 1)
    products = 5 * X + c.hidden_size
    everything = 8 * X + 6 * c.hidden_size + 3 * A * F
    return c.hidden_size + {"layer": 0, "products": products, "none": everything}[c.remat]


# Money ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunCost:
    """What a run takes: hours of one GPU, hours on the clock, US dollars."""

    gpu_hours: float
    hours: float
    dollars: float


def run_cost(
    rollout_flops: float,
    training_flops: float,
    *,
    devices: int,
    peak_flops: float,
    rollout_utilisation: float,
    training_utilisation: float,
    dollars_per_gpu_hour: float,
) -> RunCost:
    """Time and money of an RL run whose rollouts and updates take turns on all devices.

    Args:
        rollout_flops, training_flops: of the whole run.
        devices: GPUs.
        peak_flops: dense FLOP/s of one.
        rollout_utilisation, training_utilisation: share of the peak that each stage reaches, in (0, 1]. Decoding reads
            weights and cache for every token, so its share is the smaller one.
        dollars_per_gpu_hour: rent.
    """
    seconds = (rollout_flops / rollout_utilisation + training_flops / training_utilisation) / peak_flops
    gpu_hours = seconds / 3600
    return RunCost(gpu_hours, gpu_hours / devices, gpu_hours * dollars_per_gpu_hour)
