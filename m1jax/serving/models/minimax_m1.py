"""MiniMax-M1 (and Text-01) for SGLang: lightning and softmax layers, weighted residuals, top-2 mixture of experts.

One layer, with a for alpha and b for beta of its kind (`postnorm` False carries h and r instead of u and v):

    u = RMSNorm(h);   r = a u + b Attention(u)
    v = RMSNorm(r);   h = a v + b MoE(v)

Letters: T tokens of the batch, whoever's they are, D hidden size, N heads, K key/value heads, H head width.

Run on a CPU in float32 with one rank. Tensor parallelism is written down throughout (heads, experts, vocabulary) and
has not run; no pipeline stages, no data-parallel attention, no quantised weights.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.dp_attention import is_dp_attention_enabled
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_loader.weight_utils import default_weight_loader, sharded_weight_loader
from sglang.srt.runtime_context import get_parallel, get_server_args
from torch import nn

from m1jax.serving.checkpoint import IGNORED, expected, problems
from m1jax.serving.config import SOFTMAX, MiniMaxM1Config
from m1jax.serving.experts import MixtureOfExperts


class MiniMaxM1ForCausalLM(nn.Module):
    """The decoder with its head, which is float32, stored (unless tied) and multiplied (`enable_lm_head_fp32`)."""

    def __init__(self, config: MiniMaxM1Config, quant_config=None, prefix: str = ""):
        super().__init__()
        if quant_config is not None or is_dp_attention_enabled() or get_parallel().pp_size > 1:
            # Each changes how tensors are named, split or stored; a set-up that nobody has checked is not guessed at.
            raise ValueError(
                "MiniMax-M1 is served without --quantization, --enable-dp-attention and --pp-size; leave them out"
            )
        self.config = config
        self.model = Decoder(config, "model")
        if config.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(
                config.vocab_size, config.hidden_size, params_dtype=torch.float32, prefix="lm_head"
            )
        self.logits_processor = LogitsProcessor(config)

    @torch.no_grad()
    def forward(self, input_ids, positions, forward_batch, input_embeds=None):
        """input_ids and positions int64 [T] -> SGLang's logits of the positions that it asks for."""
        hidden = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Copy a folder's tensors over all parameters, at the start and at every update.

        Raises:
            ValueError: the tensors are not exactly those of the config. What came before is copied by then, so an
                update is checked before it begins (`plugin.refuse_bad_folders`).
        """
        wanted, parameters, loaded = expected(self.config), dict(self.named_parameters()), {}
        for name, tensor in weights:
            if IGNORED.fullmatch(name):
                continue
            if faults := problems({name: tuple(tensor.shape)}, {name: wanted[name]} if name in wanted else {}):
                raise ValueError("; ".join(faults))
            loaded[name] = tuple(tensor.shape)
            self._load(parameters, name, tensor)
        if faults := problems(loaded, wanted):
            raise ValueError("; ".join(faults))

    def _load(self, parameters: dict[str, nn.Parameter], name: str, tensor: torch.Tensor) -> None:
        if expert := EXPERT.fullmatch(name):
            block, number, shard = expert["block"], int(expert["number"]), expert["shard"]
            parameter = parameters[f"{block}.experts.{'w2' if shard == 'w2' else 'w13'}_weight"]
            self.get_submodule(f"{block}.experts").weight_loader(parameter, tensor, name, shard, number)
        elif projection := PROJECTION.fullmatch(name):
            parameter = parameters[f"{projection['attention']}.qkv_proj.weight"]
            parameter.weight_loader(parameter, tensor, projection["letter"])
        else:
            getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], tensor)


EXPERT = re.compile(
    r"(?P<block>model\.layers\.\d+\.block_sparse_moe)\.experts\.(?P<number>\d+)\.(?P<shard>w[123])\.weight"
)
PROJECTION = re.compile(r"(?P<attention>model\.layers\.\d+\.self_attn)\.(?P<letter>[qkv])_proj\.weight")


class MiniMaxText01ForCausalLM(MiniMaxM1ForCausalLM):
    """Text-01: the same network under its own name."""


class Decoder(nn.Module):
    """Embedding, layers, final norm."""

    def __init__(self, config: MiniMaxM1Config, prefix: str):
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        layers = [Layer(config, i, f"{prefix}.layers.{i}") for i in range(config.num_hidden_layers)]
        self.layers = nn.ModuleList(layers)
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids, positions, forward_batch, input_embeds=None) -> torch.Tensor:
        """-> hidden states [T, D]."""
        h = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        for layer in self.layers:
            h = layer(h, positions, forward_batch)
        return self.norm(h)


class Layer(nn.Module):
    """One decoder layer; the module's docstring has its equations."""

    def __init__(self, config: MiniMaxM1Config, layer: int, prefix: str):
        super().__init__()
        softmax = config.attn_type_list[layer] == SOFTMAX
        kind, attention = ("full", SoftmaxAttention) if softmax else ("linear", LightningAttention)
        self.postnorm = config.postnorm
        self.attention_alpha = getattr(config, f"layernorm_{kind}_attention_alpha")
        self.attention_beta = getattr(config, f"layernorm_{kind}_attention_beta")
        self.mlp_alpha, self.mlp_beta = config.layernorm_mlp_alpha, config.layernorm_mlp_beta
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = attention(config, layer, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.block_sparse_moe = MixtureOfExperts(config, layer, f"{prefix}.block_sparse_moe")

    def forward(self, h, positions, forward_batch) -> torch.Tensor:
        """h [T, D] -> [T, D]."""
        u = self.input_layernorm(h)
        y = self.self_attn(u, positions, forward_batch)
        r = self.attention_alpha * (u if self.postnorm else h) + self.attention_beta * y
        v = self.post_attention_layernorm(r)
        h = self.mlp_alpha * (v if self.postnorm else r)  # before the experts: SGLang's kernels write over their input
        return h + self.mlp_beta * self.block_sparse_moe(v)


class SoftmaxAttention(nn.Module):
    """Grouped queries; the first `rotary_dim` channels of each head rotate, in halves (NeoX)."""

    def __init__(self, config: MiniMaxM1Config, layer: int, prefix: str):
        super().__init__()
        c, H = config, config.head_dim
        self.qkv_proj = QKVParallelLinear(
            c.hidden_size, H, c.num_attention_heads, c.num_key_value_heads, bias=False, prefix=f"{prefix}.qkv_proj"
        )
        self.widths = [self.qkv_proj.num_heads * H, self.qkv_proj.num_kv_heads * H, self.qkv_proj.num_kv_heads * H]
        self.o_proj = RowParallelLinear(c.num_attention_heads * H, c.hidden_size, bias=False, prefix=f"{prefix}.o_proj")
        # The released bound of ten million positions would be a table of 2.6 GB.
        bound = min(c.max_position_embeddings, get_server_args().context_length or c.max_position_embeddings)
        self.rotary_emb = get_rope(H, c.rotary_dim, bound, c.rope_theta, is_neox_style=True)
        self.attn = RadixAttention(
            self.qkv_proj.num_heads, H, H**-0.5, num_kv_heads=self.qkv_proj.num_kv_heads, layer_id=layer,
            prefix=f"{prefix}.attn",
        )  # fmt: skip

    def forward(self, u, positions, forward_batch) -> torch.Tensor:
        """u [T, D] -> [T, D]."""
        q, k, v = self.qkv_proj(u)[0].split(self.widths, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        return self.o_proj(self.attn(q, k, v, forward_batch))[0]


class LightningAttention(nn.Module):
    """(sigmoid(u W_gate) * RMSNorm(recurrence(silu(u W_qkv)))) W_out: no rotary embedding, no scale.

    Float32 from the SiLU to behind the gate. The rows of W_qkv are per head [q | k | v], so a rank's heads are one
    piece of them and nothing is laid out anew. The norm is over all heads of all ranks.
    """

    def __init__(self, config: MiniMaxM1Config, layer: int, prefix: str):
        super().__init__()
        c, width = config, config.num_attention_heads * config.head_dim
        self.heads, self.head_dim = c.num_attention_heads // get_parallel().tp_size, c.head_dim
        self.width, self.eps = width, c.lightning_norm_eps
        self.qkv_proj = ColumnParallelLinear(c.hidden_size, 3 * width, bias=False, prefix=f"{prefix}.qkv_proj")
        self.output_gate = ColumnParallelLinear(c.hidden_size, width, bias=False, prefix=f"{prefix}.output_gate")
        self.out_proj = RowParallelLinear(width, c.hidden_size, bias=False, prefix=f"{prefix}.out_proj")
        self.norm = nn.Module()
        scale = nn.Parameter(torch.ones(self.heads * self.head_dim, dtype=torch.float32), requires_grad=False)
        scale.weight_loader = sharded_weight_loader(0)
        self.norm.register_parameter("weight", scale)
        self.attn = RadixAttention(
            self.heads, c.head_dim, 1.0, num_kv_heads=self.heads, layer_id=layer, prefix=f"{prefix}.attn"
        )

    def forward(self, u, positions, forward_batch) -> torch.Tensor:
        """u [T, D] -> [T, D]; positions are not used, the decay knows them."""
        qkv = F.silu(self.qkv_proj(u)[0].float()).view(-1, self.heads, 3, self.head_dim)
        q, k, v = (x.contiguous() for x in qkv.unbind(2))
        o = self.attn(q, k, v, forward_batch).float().view(-1, self.heads * self.head_dim)
        squares = o.square().sum(-1, keepdim=True)
        if get_parallel().tp_size > 1:
            squares = tensor_model_parallel_all_reduce(squares)
        o = o * torch.rsqrt(squares / self.width + self.eps) * self.norm.weight
        gated = torch.sigmoid(self.output_gate(u)[0].float()) * o
        return self.out_proj(gated.to(u.dtype))[0]


EntryClass = [MiniMaxM1ForCausalLM, MiniMaxText01ForCausalLM]
