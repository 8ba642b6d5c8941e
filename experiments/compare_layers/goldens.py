"""Ours against recorded numbers of another implementation: every array of the file, layer by layer.

What the file may hold (all optional; B sequences of T tokens, P stored positions, L layers, A experts a token):

    input_ids [B, T], positions [P]           the tokens, and the positions that are stored below (absent: all)
    hidden [L, B, P or T, D]                  raw output of each layer
    router_ids [L, B, T, A]                   chosen experts; router_weights [L, B, P, A], router_margin [L, B, T]
    states [lightning layers, B, N, H, H]     recurrent states after all tokens
    final_norm [B, P, D], logits [B, P, V]    input and output of the head
    logprobs [B, T - 1]                       log p(token t + 1 | tokens 0..t)
    padded_input_ids, padded_attention_mask, padded_logits, padded_states     a left-padded batch
    greedy_prompt, greedy_ids, greedy_logprobs                                a greedy continuation
    grad_input_ids [1, T], loss []            mean cross entropy; its gradients lie in grads/grads.safetensors beside

Ours runs in float64 on the recorded weights, so that what is left is the other side's rounding; the training path
runs in float32 too, and may be ten times as far off. In `hidden` that rounding grows with the activations, which reach
thousands in trained models: it may be 1e-4 off, or 5e-6 of the largest recorded activation where that is more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file

from m1jax.model.config import ModelConfig
from m1jax.model.logprobs import token_logprobs
from m1jax.model.observe import Observation, observe
from m1jax.rl.engine_local import sample
from m1jax.types import Params, Sampling
from m1jax.weights.hf_names import hf_tensors

ABSOLUTE = 1e-4
"""Of logits, log-probabilities, hidden states and router weights: both sides in float32 or better."""
HIDDEN = 5e-6
"""Of hidden states, as a share of the largest one of the file, where that is more than ABSOLUTE."""
STATES = 1e-5
"""Of a layer's states, as a share of their largest entry."""
LOSS, GRADIENTS = 1e-5, 1e-4
"""Of the loss; of a gradient, ||ours - theirs|| / ||theirs||."""
TIE = 1e-4
"""A token whose last chosen and first unchosen expert are this close in probability may be routed either way."""
FLOAT32 = 10.0
"""Times the tolerance that our float32 may be off: then both sides round, and in another order."""

KNOWN = frozenset(
    """input_ids positions hidden router_ids router_weights router_margin states final_norm logits logprobs
    padded_input_ids padded_attention_mask padded_logits padded_states greedy_prompt greedy_ids greedy_logprobs
    grad_input_ids loss""".split()  # noqa: SIM905
)


PATHS: dict[str, Any] = {"chunked": "prefill", "packed": "packed", "decode": "decode"}
"""How we say it -> how `observe` does: prefill is the chunked forward that keeps the states, so that they are seen."""

OF_SEQUENCES = frozenset({"hidden", "router_ids", "router_weights", "states", "final_norm", "logits", "logprobs"})
"""What is compared on `input_ids`."""


@dataclass(frozen=True)
class Check:
    """One array (of one layer) held against ours along one path.

    Attributes:
        array: its name in the file, or "gradient of NAME".
        path: how ours was computed.
        layer: its layer, or None.
        error: how far off; NaN counts as too far.
        tolerance: how far off it may be.
        largest: largest magnitude of the recorded values.
        left_out: tokens that were left out because of a tie in the routing.
        compared: values that were compared; 0 says nothing.
        correlation: of the recorded tokens' probabilities with ours (Pearson), where they are known.
    """

    array: str
    path: str
    layer: int | None
    error: float
    tolerance: float
    largest: float
    left_out: int = 0
    compared: int = 1
    correlation: float | None = None

    @property
    def share(self) -> float:
        """The error as a share of the tolerance; infinite where it is NaN, or where none is tolerated."""
        if np.isnan(self.error):
            return np.inf
        return self.error / self.tolerance if self.tolerance else np.inf if self.error else 0.0

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance


def check_goldens(
    params: Params, config: ModelConfig, arrays: Mapping[str, np.ndarray], gradients: Path | None
) -> Iterator[list[Check]]:
    """Lists of checks as they are done, in the order of the layers within each list.

    Args:
        params: the recorded weights.
        config: their decoder.
        arrays: the recorded numbers.
        gradients: a safetensors file with d loss / d weight by original name, or None.

    Dtypes and shapes are those that recorded.py asks for.
    """
    wide, wide_config = cast(params, config, "float64")
    narrow, narrow_config = cast(params, config, "float32")
    if "input_ids" in arrays and set(arrays) & OF_SEQUENCES:
        ids_BT = arrays["input_ids"].astype(np.int32)
        ones_BT = np.ones_like(ids_BT)
        for label, path in PATHS.items():
            yield _sequence_checks(observe(wide, wide_config, ids_BT, ones_BT, path), arrays, config, label)
        ours = observe(narrow, narrow_config, ids_BT, ones_BT, PATHS["chunked"])
        yield _sequence_checks(ours, arrays, config, "chunked, float32", FLOAT32)
    if "padded_input_ids" in arrays and "padded_attention_mask" in arrays:
        ids_BT = arrays["padded_input_ids"].astype(np.int32)
        mask_BT = arrays["padded_attention_mask"].astype(np.int32)
        for label in ("chunked", "decode"):
            ours = observe(wide, wide_config, ids_BT, mask_BT, PATHS[label])
            yield _padded_checks(ours, arrays, config, mask_BT > 0, f"{label}, padded")
    if "greedy_prompt" in arrays and set(arrays) & {"greedy_ids", "greedy_logprobs"}:
        yield _greedy_checks(wide, wide_config, arrays)
    if "grad_input_ids" in arrays and ("loss" in arrays or gradients is not None):
        yield _gradient_checks(wide, wide_config, arrays, gradients)


def cast(params: Params, config: ModelConfig, dtype: str) -> tuple[Params, ModelConfig]:
    """Parameters and config in `dtype`; router gates stay at least float32."""
    import jax.numpy as jnp

    def one(path: Any, leaf: Any) -> jax.Array:
        router = path[-1].key == "router"
        return jnp.asarray(leaf, jnp.promote_types(dtype, "float32") if router else dtype)

    params = jax.tree_util.tree_map_with_path(one, params)
    return params, dataclasses.replace(config, dtype=dtype, param_dtype=dtype)


def next_logprobs(logits_BTV: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """log p(token t + 1 | tokens 0..t), float64 [B, T - 1]."""
    logits = np.array(logits_BTV[:, :-1], np.float64)
    logits -= logits.max(-1, keepdims=True)
    chosen = np.take_along_axis(logits, tokens_BT[:, 1:, None].astype(int), -1)[..., 0]
    return chosen - np.log(np.exp(logits).sum(-1))


def pearson(p: np.ndarray, q: np.ndarray) -> float:
    """The correlation of two arrays; NaN where one is constant or not finite."""
    if not (np.ptp(p) > 0 and np.ptp(q) > 0):
        return np.nan
    p, q = p - p.mean(), q - q.mean()
    scale = float(np.sqrt((p * p).sum() * (q * q).sum()))
    return float((p * q).sum()) / scale if scale > 0 else np.nan


def unchecked(arrays: Mapping[str, np.ndarray], config: ModelConfig, gradients: Path | None) -> list[str]:
    """One line for every array that cannot be checked, with the reason."""
    lines = [f"{name}: not an array that is known here" for name in arrays if name not in KNOWN]
    need = {
        **dict.fromkeys(OF_SEQUENCES, ("input_ids",)),
        **dict.fromkeys(("padded_logits", "padded_states"), ("padded_input_ids", "padded_attention_mask")),
        **dict.fromkeys(("greedy_ids", "greedy_logprobs"), ("greedy_prompt",)),
        "router_margin": ("input_ids", "router_ids"),
        "loss": ("grad_input_ids",),
    }  # fmt: skip
    for name, needed in need.items():
        if name not in arrays:
            continue
        if name.startswith("router") and not config.num_experts:
            lines.append(f"{name}: the model routes nothing")
        elif name.endswith("states") and "lightning" not in config.kinds:
            lines.append(f"{name}: the model has no lightning layers")
        elif gone := [n for n in needed if n not in arrays]:
            lines.append(f"{name}: needs {' and '.join(gone)}")
    if gradients is not None and "grad_input_ids" not in arrays:
        lines.append(f"{gradients.name}: needs grad_input_ids")
    return lines


def _sequence_checks(
    ours: Observation, arrays: Mapping[str, np.ndarray], config: ModelConfig, path: str, slack: float = 1.0
) -> list[Check]:
    B, T = arrays["input_ids"].shape
    L = config.num_layers
    positions = arrays.get("positions", np.arange(T)).astype(int)
    valid_BT = np.ones((B, T), bool)  # tokens whose routing was the same so far
    checks: list[Check] = []

    def at(name: str, axis: int) -> np.ndarray:
        """The positions that an array holds along `axis`."""
        return positions if arrays[name].shape[axis] == len(positions) else np.arange(T)

    def compare(name: str, layer: int | None, mine: Any, theirs: np.ndarray, keep: np.ndarray) -> None:
        mine, theirs = np.asarray(mine, np.float64)[keep], theirs[keep].astype(np.float64)
        tolerance = slack * (hidden_tolerance if name == "hidden" else ABSOLUTE)
        check = _absolute(name, path, layer, mine, theirs, tolerance, int((~keep).sum()))
        if name in PROBABILITIES and check.compared:
            p, q = (PROBABILITIES[name](x) for x in (mine, theirs))
            check = dataclasses.replace(check, correlation=pearson(p, q))
        checks.append(check)

    hidden_tolerance = max(ABSOLUTE, HIDDEN * _largest(arrays["hidden"])) if "hidden" in arrays else ABSOLUTE
    lightning = [i for i, kind in enumerate(config.kinds) if kind == "lightning"]
    for layer in range(L):
        if ours.router_probabilities_LBTE is not None and set(arrays) & {"router_ids", "router_weights"}:
            p_BTE = np.asarray(ours.router_probabilities_LBTE[layer], np.float64)
            A = config.experts_per_token
            if "router_ids" in arrays:
                theirs_BTA = arrays["router_ids"][layer].astype(int)
                checks.append(_router_check(p_BTE, theirs_BTA, arrays, layer, path, valid_BT))
            if "router_weights" in arrays:
                where = at("router_weights", 2)
                top_BTA = -np.sort(-p_BTE, axis=-1)[..., :A]
                mine = (top_BTA / top_BTA.sum(-1, keepdims=True))[:, where]
                theirs = -np.sort(-arrays["router_weights"][layer].astype(np.float64), axis=-1)
                compare("router_weights", layer, mine, theirs, valid_BT[:, where])
        if "hidden" in arrays:
            where = at("hidden", 2)
            compare("hidden", layer, ours.output_LBTD[layer][:, where], arrays["hidden"][layer], valid_BT[:, where])
        if "states" in arrays and ours.states is not None and layer in lightning:
            place = lightning.index(layer)
            checks.append(
                _state_check(
                    "states",
                    path,
                    layer,
                    ours.states[place],
                    arrays["states"][place],
                    np.asarray(valid_BT.all(1)),
                    slack,
                )
            )
    for name, mine in (("final_norm", ours.final_BTD), ("logits", ours.logits_BTV)):
        if name in arrays:
            where = at(name, 1)
            compare(name, None, mine[:, where], arrays[name], valid_BT[:, where])
    if "logprobs" in arrays:
        mine = next_logprobs(ours.logits_BTV, arrays["input_ids"])
        compare("logprobs", None, mine, arrays["logprobs"], valid_BT[:, :-1])
    return checks


def _router_check(
    p_BTE: np.ndarray, theirs_BTA: np.ndarray, arrays: Mapping[str, np.ndarray], layer: int, path: str,
    valid_BT: np.ndarray,
) -> Check:  # fmt: skip
    """Count tokens routed otherwise; a tie is none, but spoils that token and the later ones of its sequence."""
    A = theirs_BTA.shape[-1]
    order = np.argsort(-p_BTE, axis=-1, kind="stable")
    flipped_BT = (np.sort(order[..., :A], -1) != np.sort(theirs_BTA, -1)).any(-1) & valid_BT
    if "router_margin" in arrays:
        margin_BT = arrays["router_margin"][layer].astype(np.float64)
    elif p_BTE.shape[-1] > A:
        sorted_BTE = -np.sort(-p_BTE, axis=-1)
        margin_BT = sorted_BTE[..., A - 1] - sorted_BTE[..., A]
    else:
        margin_BT = np.ones(flipped_BT.shape)
    tied_BT = flipped_BT & (margin_BT < TIE)
    valid_BT &= ~np.logical_or.accumulate(tied_BT, axis=1)
    wrong = int((flipped_BT & ~tied_BT).sum())
    left = int(valid_BT.sum()) + wrong  # a wrong one counts even where a tie spoils what comes after it
    return Check("router_ids", path, layer, wrong, 0, float(theirs_BTA.max()), int(tied_BT.sum()), left)


def _padded_checks(
    ours: Observation, arrays: Mapping[str, np.ndarray], config: ModelConfig, real_BT: np.ndarray, path: str
) -> list[Check]:
    checks = []
    lightning = [i for i, kind in enumerate(config.kinds) if kind == "lightning"]
    if "padded_states" in arrays and ours.states is not None:
        rows = np.ones(len(real_BT), bool)
        for place, layer in enumerate(lightning):
            theirs = arrays["padded_states"][place]
            checks.append(_state_check("padded_states", path, layer, ours.states[place], theirs, rows))
    if "padded_logits" in arrays:
        mine, theirs = np.asarray(ours.logits_BTV, np.float64), arrays["padded_logits"]
        checks.append(_absolute("padded_logits", path, None, mine[real_BT], theirs[real_BT], ABSOLUTE, 0))
    return checks


def _greedy_checks(params: Params, config: ModelConfig, arrays: Mapping[str, np.ndarray]) -> list[Check]:
    """The sampler of the rollout engine at temperature 0."""
    prompt = arrays["greedy_prompt"].astype(np.int32)[None]
    count = len(arrays["greedy_ids"] if "greedy_ids" in arrays else arrays["greedy_logprobs"])
    run: Callable[..., Any] = jax.jit(sample, static_argnames=("config", "sampling", "responses", "stop_ids"))
    (ids, logprobs, _, _), _ = run(
        params, prompt, np.ones_like(prompt), np.zeros((1,), np.uint32), 0,
        config=config, sampling=Sampling(max_tokens=count, temperature=0.0), responses=1, stop_ids=(),
    )  # fmt: skip
    checks = []
    if "greedy_ids" in arrays:
        theirs = arrays["greedy_ids"].astype(int)
        wrong = int((np.asarray(ids)[0] != theirs).sum())
        checks.append(Check("greedy_ids", "sampler", None, wrong, 0, float(theirs.max())))
    if "greedy_logprobs" in arrays:
        mine = np.asarray(logprobs, np.float64)[0]
        checks.append(_absolute("greedy_logprobs", "sampler", None, mine, arrays["greedy_logprobs"], ABSOLUTE, 0))
    return checks


def _gradient_checks(
    params: Params, config: ModelConfig, arrays: Mapping[str, np.ndarray], file: Path | None
) -> list[Check]:
    """The loss, and d loss / d weight of every weight, through the training path."""
    ids_BT = arrays["grad_input_ids"].astype(np.int32)

    def loss(params: Params) -> jax.Array:
        logprobs_BT, _, _ = token_logprobs(params, config, ids_BT, np.ones_like(ids_BT))
        return -logprobs_BT[:, 1:].mean()

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    checks = []
    if "loss" in arrays:
        checks.append(_absolute("loss", "training", None, np.asarray(value), arrays["loss"], LOSS, 0))
    if file is None:
        return checks
    theirs = load_file(file)
    tensors = hf_tensors(config)
    for tensor in tensors:
        leaf = grads
        for key in tensor.leaf:
            leaf = leaf[key]
        mine = tensor.to_theirs(np.asarray(leaf[tensor.index], np.float64))
        want = theirs[tensor.name].astype(np.float64)
        norm = np.linalg.norm(want)
        # An expert that no token chose has no gradient: then ours must have none either.
        error = np.linalg.norm(mine) if norm == 0 else np.linalg.norm(mine - want) / norm
        part = tensor.name.split(".")
        layer = int(part[2]) if part[1] == "layers" else None
        checks.append(
            Check(f"gradient of {tensor.name}", "training", layer, float(error), GRADIENTS, float(np.abs(want).max()))
        )
    return checks


def _absolute(
    name: str, path: str, layer: int | None, mine: np.ndarray, theirs: np.ndarray, tolerance: float, left_out: int
) -> Check:
    gap = np.abs(mine - theirs.astype(np.float64))
    error = float(gap.max()) if gap.size else 0.0
    return Check(name, path, layer, error, tolerance, _largest(theirs), left_out, gap.size)


def _state_check(
    name: str, path: str, layer: int, mine: Any, theirs: np.ndarray, rows: np.ndarray, slack: float = 1.0
) -> Check:
    mine, theirs = np.asarray(mine, np.float64)[rows], theirs[rows].astype(np.float64)
    largest = _largest(theirs)
    error = float(np.abs(mine - theirs).max()) / max(largest, 1e-30) if theirs.size else 0.0
    return Check(name, path, layer, error, STATES * slack, largest, int((~rows).sum()), mine.size)


def _largest(recorded: np.ndarray) -> float:
    """The largest finite magnitude."""
    return float(np.abs(recorded[np.isfinite(recorded)].astype(np.float64)).max(initial=0.0))


def _probabilities(logits_MV: np.ndarray) -> np.ndarray:
    p_MV = np.exp(logits_MV - logits_MV.max(-1, keepdims=True))
    return p_MV / p_MV.sum(-1, keepdims=True)


PROBABILITIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"logits": _probabilities, "logprobs": np.exp}
"""How token probabilities come out of an array: of all tokens, or of the next ones."""
