"""Optional: a folder that we export gives the same logits in the library that most people will load it with.

Our side imports a recorded model, keeps it as a checkpoint, exports that and computes float32 logits from the
checkpoint. It exports twice: with the config.json that came with the weights, and with one that is written anew, as
for a model that was trained here. The other side reads the exported folder with
`AutoModelForCausalLM.from_pretrained` in float32, in a process of its own: by this Python where it has torch and
transformers, else by the one that M1JAX_PEER_PYTHON names (`python -m venv PEER && PEER/bin/pip install torch
transformers`; tried with torch 2.13 and transformers 5.24).
Without either the test is skipped.

Qwen2 and Llama are loaded as they are. MiniMax-M1 needs help on the other side, because the class `MiniMax` of
Transformers was made for folders that its authors converted first, and leaves some of the network out:

- `minimax_m1` is no model type that it knows, and of the released spelling it takes only the sizes. The residual
  factors would silently become 1 and every other layer softmax attention. They are handed over under its names.
- Rotary embedding turns whole heads; no spelling of `rotary_dim` has any effect. Its rotation is replaced by one that
  leaves the channels from `rotary_dim` on alone, with the frequencies of a head of that width.
- Positions of continued sequences are counted by the cache of layer 0, which a lightning layer does not fill. So no
  cache is used.

Left as it is: its slopes divide by L - 1 + 1e-5 where the released code divides by L - 1, which is below rounding here.
"""

import importlib.util
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m1jax.model import transformer
from m1jax.train.convert import convert
from m1jax.train.pretrained import HUGGINGFACE, find_pretrained
from m1jax.weights.hf_folder import with_dtype
from tests.model.golden import GOLDENS, NAMES, numbers

TOLERANCE = 2e-5
"""Absolute, on logits of up to 4: rounding of two correct float32 implementations, as for the recorded numbers."""

EXPORTS = ("copied", "written")
"""Where the config.json of an export comes from."""

PEER = """
import json, re, sys
import numpy as np, torch
from transformers import AutoModelForCausalLM

def load(folder):
    values = json.load(open(f"{folder}/config.json"))
    if values["model_type"] != "minimax_m1":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    from transformers.models.minimax import modeling_minimax as theirs

    rotary = values.pop("rotary_dim")
    def partial(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turn = lambda x: x * cos + theirs.rotate_half(x) * sin
        return tuple(torch.cat([turn(x[..., :rotary]), x[..., rotary:]], dim=-1) for x in (q, k))
    theirs.apply_rotary_pos_emb = partial

    theta = values.pop("rope_theta")
    names = {"layernorm_linear_attention": "linear_attn", "layernorm_full_attention": "full_attn",
             "layernorm_mlp": "mlp"}
    factors = {f"{new}_{w}_factor": values.pop(f"{old}_{w}") for old, new in names.items() for w in ("alpha", "beta")}
    kinds = ["full_attention" if kind else "linear_attention" for kind in values.pop("attn_type_list")]
    for key in ("model_type", "architectures"):
        del values[key]
    config = theirs.MiniMaxConfig(
        **values, **factors, layer_types=kinds, rope_parameters={"rope_type": "default", "rope_theta": theta},
    )
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, config=config, dtype=torch.float32, output_loading_info=True
    )
    inverse = 1.0 / theta ** (torch.arange(0, rotary, 2).float() / rotary)
    model.model.rotary_emb.inv_freq = torch.nn.Buffer(inverse, persistent=False)
    return model, info

for folder in sys.argv[1:]:
    model, info = load(folder)
    # What follows from the config is no weight: the decays, and a head that is the embedding.
    made = r"slope_rate|query_decay|key_decay|diagonal_decay|"
    made += "lm_head" if model.config.tie_word_embeddings else "!"
    odd = [n for n in info["missing_keys"] if not re.search(made, n)] + sorted(info["unexpected_keys"])
    assert not odd and not info["mismatched_keys"], (folder, odd, info["mismatched_keys"])
    ids = torch.from_numpy(np.load(f"{folder}/ids.npy").astype(np.int64))
    with torch.no_grad():
        logits = model.eval()(input_ids=ids, use_cache=False).logits
    assert logits.dtype == torch.float32, logits.dtype
    np.savez(f"{folder}/peer.npz", logits=logits.numpy())
"""


def quiet(_):
    pass


def peer_python() -> str | None:
    """A Python that can import both libraries, as far as that can be told without starting it."""
    if all(importlib.util.find_spec(name) for name in ("torch", "transformers")):
        return sys.executable
    return os.environ.get("M1JAX_PEER_PYTHON")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with, for every recorded model, `NAME/ours`, a checkpoint, and its exports with the peer's logits."""
    python = peer_python()
    if python is None:
        pytest.skip("no torch and transformers here, and M1JAX_PEER_PYTHON names no Python that has them")
    root = tmp_path_factory.mktemp("transformers")
    for name in NAMES:
        convert(GOLDENS / name, root / name / "ours", log=quiet)
        convert(root / name / "ours", root / name / "copied", log=quiet)
        shutil.rmtree(root / name / "ours" / HUGGINGFACE)
        convert(root / name / "ours", root / name / "written", log=quiet)
        for export in EXPORTS:
            np.save(root / name / export / "ids.npy", numbers(name)["input_ids"])
    folders = [str(root / name / export) for name in NAMES for export in EXPORTS]
    child = subprocess.run(
        [python, "-c", PEER, *folders],
        env=os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-4000:]
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_an_exported_folder_gives_our_logits_in_transformers(models, name):
    """Logits of all positions of two sequences, also of the bfloat16 weights, which both sides widen to float32."""
    model = find_pretrained(models / name / "ours")
    config = with_dtype(model.config, "float32")
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), model.load())
    ids_BT = jnp.asarray(numbers(name)["input_ids"])

    @jax.jit
    def logits(params):
        with jax.default_matmul_precision("highest"):
            hidden_MD, _, _ = transformer.hidden_states(params, config, ids_BT, jnp.ones_like(ids_BT))
            return transformer.head(params, hidden_MD).reshape(*ids_BT.shape, -1)

    ours_BTV = np.asarray(logits(params))
    for export in EXPORTS:
        theirs_BTV = np.load(models / name / export / "peer.npz")["logits"]
        assert theirs_BTV.shape == ours_BTV.shape and theirs_BTV.std() > 0.3, "flat logits would agree with anything"
        np.testing.assert_allclose(ours_BTV, theirs_BTV, rtol=0, atol=TOLERANCE, err_msg=export)
