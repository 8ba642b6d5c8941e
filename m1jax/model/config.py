"""The shape of a decoder, as data: one frozen record that every part of the model reads its own fields from.

It knows no arrays. The numbers of MiniMax-M1 stand beside each field; a config file chooses others. Qwen2 and Llama
are the same decoder with softmax layers only, `num_experts` 0 and `postnorm` False (configs/models.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

from m1jax.config import DERIVED
from m1jax.mesh import GATHERED, ONE, MeshConfig

LAYER_KINDS = ("lightning", "softmax")
REMAT = ("none", "products", "layer")
LIGHTNING_KERNELS = ("auto", "reference", "xla", "mosaic_tpu", "mosaic_gpu")
SOFTMAX_KERNELS = ("auto", "blocked", "splash")
MOE_KERNELS = ("auto", "reference", "xla", "mosaic_tpu", "mosaic_gpu", "ragged_dot", "tokamax")


@dataclass(frozen=True)
class KernelConfig:
    """Who computes attention and the experts; every choice gives the same numbers up to rounding.

    Attributes:
        lightning: "auto" is the best one for the backend and dtype: "mosaic_gpu" (Hopper, bfloat16), "mosaic_tpu", or
            "xla"; "reference" goes token by token. It serves the norm behind it and decoding too.
        softmax: in training, whose rows are packed: "auto" is "splash" on TPUs, else "blocked". The cache is always
            served by "blocked".
        moe: the experts' MLPs: "auto" is the best one for the backend and dtype, as for lightning; "ragged_dot" and
            "tokamax" leave the grouped products to JAX's own ragged product and to that library's.
    """

    lightning: str = "auto"
    softmax: str = "auto"
    moe: str = "auto"

    def __post_init__(self):
        known_kernels = {"lightning": LIGHTNING_KERNELS, "softmax": SOFTMAX_KERNELS, "moe": MOE_KERNELS}
        for name, known in known_kernels.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: {getattr(self, name)!r} must be one of {known}")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder of lightning and softmax layers (MiniMax-M1's released config.json in brackets).

    Attributes:
        vocab_size: rows of the embedding and columns of the LM head [200,064].
        num_layers: decoder layers; a multiple of the pattern's length [80].
        hidden_size: residual width D [6144].
        num_heads: query heads N, also the heads of lightning layers [64].
        num_kv_heads: key/value heads K of softmax layers; divides num_heads [8].
        head_dim: head width H; N * H need not equal D [128].
        rotary_dim: leading channels of each head that rotate in softmax layers; even [64].
        num_experts, experts_per_token, expert_dim: E, A and F of the mixture of experts [32, 2, 9216]. E = A = 0 is
            a dense MLP of width F.
        lightning_alpha, softmax_alpha, mlp_alpha: weight of the residual branch
            [(2 * 80) ** (1/4) = 3.5566, DeepNorm; 1 in Qwen2 and Llama].
        lightning_beta, softmax_beta, mlp_beta: weight of the attention and expert branches [1].
        postnorm: the residual branch carries the normalised tensor; False carries the raw one (pre-norm) [True].
        qkv_bias: softmax layers add a bias to queries, keys and values [False; True in Qwen2].
        tied_embeddings: the LM head is the embedding [False].
        max_positions: longest sequence the model was made for; longer windows are refused; 0 sets no bound
            [10,240,000].
        layer_pattern: kinds of one period, repeated to num_layers [7 lightning, then 1 softmax].
        rope_theta: base of the rotary frequencies [1e7].
        norm_eps: eps of the layer norms and of the final norm [1e-5].
        lightning_norm_eps: eps of the norm over all heads inside lightning attention [1e-6, the reference code's
            default argument, which ignores rms_norm_eps].
        init_std: standard deviation of every weight matrix and of the embedding at initialisation [0.02].
        dtype: dtype of activations and of the matrix products. Norms, router, decay, states, softmax and the LM
            head are at least float32 whatever this says.
        param_dtype: dtype of the stored parameters; router gates are at least float32.
        remat: what the backward pass computes again. "none"; "products": all but the outputs of matrix products outside
            the experts; "layer": everything but each layer's input. Weights that lie along `fsdp` are gathered again
            in any case.
        scan_layers: training scans over the layers of a kind: compile time does not grow with depth. False runs them
            one after another, which is faster on a CPU. With a cache they always do.
        lightning_chunk: chunk length of the lightning recurrence in training and prefill, for "xla".
        attention_block: block length of softmax attention.
        head_rows: tokens whose logits exist at the same time in training; 0 chooses as many as make 64 MiB.
        kernels: who computes attention and the experts; set by the section of that name of a run.
        mesh: the devices that compute together, where the model runs inside `jax.shard_map`; set by who maps it.
    """

    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    num_experts: int
    experts_per_token: int
    expert_dim: int
    lightning_alpha: float
    softmax_alpha: float
    mlp_alpha: float
    lightning_beta: float = 1.0
    softmax_beta: float = 1.0
    mlp_beta: float = 1.0
    postnorm: bool = True
    qkv_bias: bool = False
    tied_embeddings: bool = False
    max_positions: int = 0
    layer_pattern: tuple[str, ...] = ("lightning",) * 7 + ("softmax",)
    rope_theta: float = 1e7
    norm_eps: float = 1e-5
    lightning_norm_eps: float = 1e-6
    init_std: float = 0.02
    dtype: str = "float32"
    param_dtype: str = "float32"
    remat: str = "none"
    scan_layers: bool = True
    lightning_chunk: int = 64
    attention_block: int = 128
    head_rows: int = 0
    kernels: KernelConfig = field(default=KernelConfig(), metadata=DERIVED)
    mesh: MeshConfig = field(default=ONE, metadata=DERIVED)

    def __post_init__(self):
        positive = ("vocab_size", "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim",
                    "expert_dim", "lightning_chunk", "attention_block")  # fmt: skip
        for name in positive:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 1")
        for name in ("num_experts", "experts_per_token", "max_positions", "head_rows"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: {getattr(self, name)} must be at least 0")
        if unknown := set(self.layer_pattern) - set(LAYER_KINDS):
            raise ValueError(f"layer_pattern: {sorted(unknown)} unknown; choose from {LAYER_KINDS}")
        if not self.layer_pattern or self.num_layers % len(self.layer_pattern):
            raise ValueError(
                f"num_layers: {self.num_layers} is not a multiple of layer_pattern's {len(self.layer_pattern)} layers"
            )
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads: {self.num_kv_heads} does not divide num_heads {self.num_heads}")
        if self.rotary_dim % 2 or not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"rotary_dim: {self.rotary_dim} must be even and at most head_dim {self.head_dim}")
        if self.experts_per_token > self.num_experts:
            raise ValueError(f"experts_per_token: {self.experts_per_token} exceeds num_experts {self.num_experts}")
        if self.num_experts and not self.experts_per_token:
            raise ValueError(
                f"experts_per_token: 0 of {self.num_experts} experts would do nothing; num_experts=0 is dense"
            )
        for name in ("dtype", "param_dtype"):
            if getattr(self, name) not in ("float32", "bfloat16", "float64"):
                raise ValueError(f"{name}: {getattr(self, name)!r} must be float32, bfloat16 or float64")
        if self.remat not in REMAT:
            raise ValueError(f"remat: {self.remat!r} must be one of {REMAT}")
        self._check_mesh()

    def _check_mesh(self) -> None:
        """Raise ValueError where what lies along an axis cannot be dealt out evenly."""
        if self.mesh.expert != 1 and not self.num_experts:
            raise ValueError(f"mesh.expert: {self.mesh.expert}, but a dense model has no experts; use data or fsdp")
        dealt_out = {
            ("tensor",): ("num_heads", "num_kv_heads", "expert_dim", "vocab_size"),
            GATHERED: ("hidden_size",),
            ("expert",): ("num_experts",),
        }
        for axes, names in dealt_out.items():
            devices = self.mesh.along(axes)
            for name in names:
                if devices and getattr(self, name) % devices:
                    told = " x ".join(f"mesh.{axis}" for axis in axes if getattr(self.mesh, axis) > 1)
                    size = getattr(self, name)
                    raise ValueError(f"{told}: {devices} devices do not divide model.{name}, {size}; choose a divisor")

    @property
    def num_periods(self) -> int:
        return self.num_layers // len(self.layer_pattern)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of every layer."""
        return self.layer_pattern * self.num_periods

    @property
    def runs(self) -> tuple[tuple[str, int], ...]:
        """The pattern as runs of equal layers, ("lightning", 7), ("softmax", 1): each run is one scan."""
        return tuple((kind, len(tuple(group))) for kind, group in groupby(self.layer_pattern))
