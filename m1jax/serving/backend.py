"""Lightning layers over a server's pool of states: ours in plain torch on a CPU, SGLang's Triton kernels on a GPU.

The scheduler owns the states. Every request has a slot of the pool; a prefix that is found in the cache is copied into
the slot before the forward pass, and the slot is copied out where a prefix is kept. A backend reads and writes slots.

SGLang's `LightningAttentionBackend` has M1's conventions with the kernel "seg_la" (`MiniMaxM1Config.linear_backend`):
slopes by layer among all layers, decay before the new token, a float32 state [N, H, H] with the key axis first, and
`layer.scaling` as the only scale, 1 here. The kernel's arithmetic was run by Triton's interpreter on a CPU and is
ours to 1e-6 (tests/serving/test_recurrence.py); on a GPU neither it nor the backend has run, where its products of
float32 tensors become TF32 unless Triton is told otherwise, as launch/sglang.sh does. It decodes heads whose width is a
multiple of 128; and prompts of one token, whose slots SGLang has to have zeroed, which it does. SGLang's other kernel,
"minimax", was not looked into further: it has no prefix tracking.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase
from sglang.srt.runtime_context import get_parallel

from m1jax.serving import recurrence


def lightning_backend(model_runner):
    """The backend for the device that the server runs on; SGLang calls it by the name that the plugin gives."""
    if model_runner.device == "cpu":
        return TorchLightningBackend(model_runner)
    if (width := model_runner.model_config.hf_config.head_dim) % 128:
        # The kernel's decoding takes blocks of 128 channels (sglang 0.5.23, seg_la); MiniMax-M1's heads have 128.
        raise ValueError(
            f"head_dim {width}: SGLang's lightning kernel decodes 128, 256, ...; serve it with --device cpu"
        )
    from sglang.srt.layers.attention.linear.lightning_backend import LightningAttentionBackend

    return LightningAttentionBackend(model_runner)


class TorchLightningBackend(MambaAttnBackendBase):
    """`recurrence` over the slots of a batch, float32 throughout. Run on a CPU, one rank.

    Prompts go one after another (whole, in the scheduler's chunks, or after a cached prefix), decoded tokens of all
    requests at once. No speculative decoding, no CUDA graphs, no states kept from inside a prompt ("extra_buffer").
    """

    def __init__(self, model_runner):
        super().__init__(model_runner)
        config, parallel = model_runner.model_config.hf_config, get_parallel()
        self.conv_states_shape = self.req_to_token_pool.mamba_pool.mamba_cache.conv[0].shape
        heads = config.num_attention_heads // parallel.attn_tp_size
        mine = slice(parallel.attn_tp_rank * heads, (parallel.attn_tp_rank + 1) * heads)
        self._rates = [
            recurrence.slopes(config.num_attention_heads, layer, config.num_hidden_layers)[mine].to(self.device)
            for layer in range(config.num_hidden_layers)
        ]

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **_):
        """q, k, v [tokens of all prompts, N * H] -> o of the same shape, float32."""
        if forward_batch.forward_mode.is_target_verify() or self.forward_metadata.has_mamba_track_mask:
            # By default a CPU server does neither: both need the state in the middle of what is computed.
            raise ValueError(
                "speculative decoding and --mamba-radix-cache-strategy extra_buffer are for the GPU backend; "
                "start a CPU server without them"
            )
        q, k, v = self._heads(layer, q, k, v)
        states, slots = self._states(layer), self.forward_metadata.mamba_cache_indices
        outputs, at = torch.zeros_like(v), 0
        lengths, prefixes = forward_batch.extend_seq_lens.tolist(), forward_batch.extend_prefix_lens.tolist()
        for slot, length, prefix in zip(slots.tolist(), lengths, prefixes, strict=True):
            # A prompt from its first token on starts from zero, whoever had the slot before.
            before = states[slot].float() if prefix else torch.zeros(states.shape[1:], device=states.device)
            stretch = slice(at, at + length)
            outputs[stretch], after = recurrence.prefill(
                q[stretch], k[stretch], v[stretch], self._rates[layer.layer_id], before
            )
            states[slot] = after.to(states.dtype)
            at += length
        return outputs.flatten(1)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **_):
        """q, k, v [B, N * H], one token a request -> o of the same shape, float32."""
        q, k, v = self._heads(layer, q, k, v)
        states, slots = self._states(layer), self.forward_metadata.mamba_cache_indices.long()
        outputs, after = recurrence.step(q, k, v, self._rates[layer.layer_id], states[slots].float())
        states[slots] = after.to(states.dtype)
        return outputs.flatten(1)

    def _states(self, layer) -> torch.Tensor:
        """The pool of a layer: [slots, N, H, H], float32 unless the server was told otherwise."""
        return self.req_to_token_pool.mamba2_layer_cache(layer.layer_id).temporal

    @staticmethod
    def _heads(layer, *tensors: torch.Tensor) -> list[torch.Tensor]:
        return [x.reshape(-1, layer.tp_q_head_num, layer.head_dim).float() for x in tensors]
