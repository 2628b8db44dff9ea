# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The integer model and its evolution against the authors' functions, to the bit.

The reference numbers leaves in the order of the flattened tree; its keys and its table
of noise are inputs.
"""

from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from tests.parity import Computed
from wlab.es import _integer, integer_eggroll
from wlab.models import egg

# The leaves' names there and here.
_NAMES = {
    **{f"blocks.att.{n}": f"blocks/att/{n}" for n in ("Uf", "Uh", "Wf", "Wh")},
    **{f"blocks.att.{n}": f"blocks/att/{n}" for n in ("bf", "bh")},
    "blocks.ln1.weight": "blocks/ln1/scale",
    "blocks.ln2.weight": "blocks/ln2/scale",
    "blocks.mlp.0.weight": "blocks/mlp/in",
    "blocks.mlp.1.weight": "blocks/mlp/out",
    "emb": "emb",
    "head": "head",
    "ln_out.weight": "ln_out/scale",
}
INPUTS = (
    *(f"p.{name}" for name in _NAMES),
    *(f"key.{name}" for name in _NAMES),
    *("rand_table", "tokens", "state0", "epoch", "sigma_shift", "alpha", "use_clt"),
    *("unit.u", "unit.state"),
)


def compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    keys = [jax.random.wrap_key_data(inputs[f"key.{name}"]) for name in _NAMES]
    with mock.patch.object(_integer, "leaf_keys", lambda *_: keys):
        # The epoch of the file is the one that is folded in.
        return _compute(inputs)


def _compute(inputs: Mapping[str, np.ndarray]) -> dict[str, Computed]:
    params = _tree({name: inputs[f"p.{name}"] for name in _NAMES})
    table = jnp.asarray(inputs["rand_table"])
    limit = _integer.threshold(float(inputs["alpha"]))
    search = integer_eggroll(
        [limit],
        int(inputs["sigma_shift"]),
        table_size=table.size,
        use_clt=bool(inputs["use_clt"]),
    )
    state = search.init(0, params)._replace(
        table=table, epoch=jnp.int32(inputs["epoch"])
    )
    tokens = jnp.asarray(inputs["tokens"])
    n = tokens.shape[0]
    members = jnp.arange(n)
    state0 = jnp.asarray(inputs["state0"])

    @jax.jit
    def everything() -> dict[str, Any]:
        def noisy(member: Any, tokens: Any, s: Any) -> Any:
            return egg.apply(search.perturb(state, params, member), tokens, s)

        def noise(member: Any) -> Any:
            tree = search.perturb(state, params, member)
            att, mlp = tree["blocks"]["att"], tree["blocks"]["mlp"]
            made = {
                "head": (tree["head"].a, tree["head"].b),
                "emb": (tree["emb"].a, tree["emb"].b),
                "Wf0": (att["Wf"].a[0], att["Wf"].b[0]),
                "mlp0_1": (mlp["out"].a[0], mlp["out"].b[0]),
            }
            drawn = search.draw(state, params, member)["blocks/att/bf"][0]
            sign = 1 - 2 * (member % 2)
            unit = jax.tree.map(lambda x: x[0], att["Wf"])
            return {
                **{f"noiseA.{k}": a for k, (a, _) in made.items()},
                **{f"noiseB.{k}": b for k, (_, b) in made.items()},
                "noise.bf0": drawn * sign,
                "unit.mm_noisy": jax.vmap(lambda u: egg.product(u, unit))(u),
            }

        u = jnp.asarray(inputs["unit.u"])
        layer = jax.tree.map(lambda x: x[0], params["blocks"])
        clean = jax.vmap(lambda t, s: egg.apply(params, t, s))(tokens[:, :-1], state0)
        moved = jax.vmap(noisy)(members, tokens[:, :-1], state0)
        scores = egg.log_likelihood(moved[0], tokens[:, 1:]).sum(1)
        signs = _integer.fitness_signs(scores)
        new, _ = search.update(state, params, scores)
        found = jax.vmap(noise)(members)
        plus = {k: v[::2].astype(jnp.int32) for k, v in found.items() if "noise" in k}
        out = {
            "logits_clean": clean[0],
            "state_clean": clean[1],
            "logits_noisy": moved[0],
            "state_noisy": moved[1],
            "scores": scores,
            "fitness": signs,
            "unit.ln": jax.vmap(lambda u: egg.norm(u, params["ln_out"]["scale"]))(u),
            "unit.gru": jax.vmap(lambda u, s: egg.gru(u, s, layer["att"]))(
                u, jnp.asarray(inputs["unit.state"])
            ),
            "unit.mlp": jax.vmap(
                lambda u: egg.product(
                    egg.product(u, layer["mlp"]["in"]), layer["mlp"]["out"]
                )
            )(u),
            "unit.mm_clean": jax.vmap(lambda u: egg.product(u, layer["att"]["Wf"]))(u),
            **{f"new.{name}": x for name, x in _names(params, new).items()},
        }
        for name in ("head", "emb", "Wf0", "mlp0_1"):
            a, b = plus[f"noiseA.{name}"], plus[f"noiseB.{name}"]
            if not bool(inputs["use_clt"]):
                a, b = jnp.sign(a), jnp.sign(b)
            weighted = a * signs.astype(jnp.int32)[:, None, None]
            out[f"Z.{name}"] = jnp.einsum("pir,pjr->ij", weighted, b)
        found["unit.mm_noisy"] = found["unit.mm_noisy"][:4]
        return out | found

    out = everything() | {"threshold": limit, "exp2": egg.EXP2}
    return {name: Computed(np.asarray(x), 0.0) for name, x in out.items()}


def _tree(arrays: Mapping[str, np.ndarray]) -> Any:
    """The parameters as the model has them."""
    out: dict[str, Any] = {}
    for name, x in arrays.items():
        *parents, last = _NAMES[name].split("/")
        inside = out
        for part in parents:
            inside = inside.setdefault(part, {})
        inside[last] = jnp.asarray(x)
    return out


def _names(params: Any, updates: Any) -> dict[str, jax.Array]:
    """The new parameters under the reference's names."""
    new = jax.tree.map(lambda w, u: (w + u).astype(jnp.int32), params, updates)
    return dict(zip(_NAMES, jax.tree.leaves(new), strict=True))
