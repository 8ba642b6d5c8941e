"""The experts' MLPs as a sort and a batched matrix product, in plain JAX with a hand-written backward pass.

Rows are the R = T A pairs (token, selected expert). They are put in expert order and every expert's rows are filled
up to whole blocks of C slots, so that one block belongs to one expert and the G blocks make one batched product:

    selected     t0: e1 e2    t1: e0 e1    t2: e1 e2                     R = 6 rows, E = 3, C = 2
    block           0         1         2         3
    slots        t1  --    t0  t1    t2  --    t0  t2                    G = 4, as many as any routing can need
    expert          0         1         1         2

G is known beforehand, so shapes are static and no token is dropped. The order is known in both directions (the slot
of a row, the row of a slot), so rows only ever move by gathers, backward too: a scatter-add of rows is slow on CPU,
and elsewhere adds in an order that may change.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp


@jax.custom_vjp
def expert_mlp(x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD):
    """Return y_TD; `api.expert_mlp` says what the arguments mean."""
    return _forward(x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD)[0]


def _forward(x_TD, expert_ids_TA, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD):
    layout = _layout(expert_ids_TA, w_gate_EDF.shape[0])
    x_GCD = _to_slots(x_TD, layout)
    wide = jnp.promote_types(x_TD.dtype, jnp.float32)
    product = partial(jnp.einsum, preferred_element_type=wide)
    gate_GCF = product("gcd,gdf->gcf", x_GCD, w_gate_EDF[layout.expert_G])
    up_GCF = product("gcd,gdf->gcf", x_GCD, w_up_EDF[layout.expert_G])
    hidden_GCF = (jax.nn.silu(gate_GCF) * up_GCF).astype(x_TD.dtype)
    out_GCD = product("gcf,gfd->gcd", hidden_GCF, w_down_EFD[layout.expert_G])
    y_TD = _sum_slots(out_GCD, layout, combine_weights_TA)
    return y_TD.astype(x_TD.dtype), (layout, gate_GCF, up_GCF)


def _fwd(*inputs):
    y_TD, saved = _forward(*inputs)
    return y_TD, (inputs, saved)


def _bwd(saved, dy_TD):
    (x_TD, _, combine_weights_TA, w_gate_EDF, w_up_EDF, w_down_EFD), (layout, gate_GCF, up_GCF) = saved
    E=w_gate_EDF.shape[0]
    x_GCD = _to_slots(x_TD, layout)
    dy_GCD = _to_slots(dy_TD, layout)
    weight_GC = _to_slots_rows(combine_weights_TA.reshape(-1), layout)[...,None]
    sig = jax.nn.sigmoid(gate_GCF)
    act = gate_GCF*sig
    hidden = act*up_GCF
    dh1 = jnp.einsum("gcd,gfd->gcf", dy_GCD, w_down_EFD[layout.expert_G])
    dweight_GC = jnp.sum(dh1*hidden, -1)
    dh = dh1*weight_GC
    dup = dh*act
    dgate = dh*up_GCF*(sig+act*(1-sig))
    dx_GCD = jnp.einsum("gcf,gdf->gcd", dgate, w_gate_EDF[layout.expert_G]) + jnp.einsum("gcf,gdf->gcd", dup, w_up_EDF[layout.expert_G])
    mine = (jnp.arange(E)[:,None]==layout.expert_G).astype(dh.dtype)
    dwg = jnp.einsum('eg,gdf->edf',mine,jnp.einsum("gcd,gcf->gdf", x_GCD, dgate))
    dwu = jnp.einsum('eg,gdf->edf',mine,jnp.einsum("gcd,gcf->gdf", x_GCD, dup))
    dwd = jnp.einsum('eg,gfd->efd',mine,jnp.einsum("gcf,gcd->gfd", hidden, dy_GCD*weight_GC))
    dx=_sum_slots(dx_GCD,layout,None)
    dweight=dweight_GC.reshape(-1)[layout.slot_TA]
    return dx,None,dweight,dwg,dwu,dwd

expert_mlp.defvjp(_fwd,_bwd)

class _Layout(NamedTuple):
    slot_TA: jax.Array
    row_GC: jax.Array
    expert_G: jax.Array

B=256
def _layout(ids_TA, E):
    T,A=ids_TA.shape; R=T*A
    C=B
    G=(R+E*(C-1))//C
    mine_RE = ids_TA.reshape(R,1)==jnp.arange(E)
    rank_RE = jnp.cumsum(mine_RE, axis=0, dtype=jnp.int32)
    ends_E = jnp.cumsum(-(-rank_RE[-1]//C))
    starts_E = jnp.concatenate([jnp.zeros(1,jnp.int32), ends_E[:-1]])*C
    slot_R = jnp.sum(jnp.where(mine_RE, starts_E+rank_RE-1,0),1)
    row_S = jnp.full(G*C,R,jnp.int32).at[slot_R].set(jnp.arange(R,dtype=jnp.int32),unique_indices=True,mode='promise_in_bounds')
    expert_G = jnp.minimum(jnp.sum(jnp.arange(G)[:,None]>=ends_E,1),E-1)
    return _Layout(slot_R.reshape(T,A), row_S.reshape(G,C), expert_G)

def _to_slots(x_TD, layout):
    A=layout.slot_TA.shape[1]
    return x_TD.at[layout.row_GC//A].get(mode='fill',fill_value=0)
def _to_slots_rows(x_R, layout):
    return x_R.at[layout.row_GC].get(mode='fill',fill_value=0)
def _sum_slots(x_GCD, layout, weights):
    G,C,D=x_GCD.shape
    x=x_GCD.reshape(G*C,D)
    A=layout.slot_TA.shape[1]
    parts=[x.at[layout.slot_TA[:,a]].get(mode='promise_in_bounds') for a in range(A)]
    if weights is not None: parts=[p*weights[:,a,None] for a,p in enumerate(parts)]
    return sum(parts)
