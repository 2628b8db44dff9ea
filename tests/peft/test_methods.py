# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What single adapters promise beyond the common table."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab import optim, peft, quant
from wlab.peft._lora import column_norms, principal_factors
from wlab.peft._randlora import draw_bases
from wlab.peft._snella import distances, kernel_of, quantile, sparsify
from wlab.peft._tera import balanced
from wlab.peft._wara import dwt, idwt

KEY = jax.random.key(0)


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


W = normal(1, 16, 12)
PARAMS = {"w": {"kernel": W}}


def change(method: Any, train: Any, params: Any = PARAMS) -> jax.Array:
    """What an adapter adds to the one kernel."""

    @jax.jit
    def added(train: Any, params: Any) -> jax.Array:
        adapter = method.init(KEY, params)._replace(train={"w/kernel": train})
        merged = wlab.materialise(method.attach(adapter, params))
        return merged["w"]["kernel"] - params["w"]["kernel"]

    return added(train, params)


def begin(method: Any, params: Any = PARAMS) -> Any:
    return jax.jit(method.init)(KEY, params)


def drawn(method: Any, scale: float = 1.0) -> Any:
    train = jax.device_get(begin(method).train["w/kernel"])
    return {
        name: x + np.float32(scale) * normal(i, *x.shape)
        for i, (name, x) in enumerate(train.items(), 3)
    }


def rank(x: jax.Array) -> int:
    return int(np.linalg.matrix_rank(np.asarray(x), tol=1e-4))


# --- LoRA ------------------------------------------------------------------------


def test_lora_at_its_start():
    method = peft.lora(4)
    grads = jax.grad(
        lambda t: jnp.sum(jnp.sin(change(method, t) + W)), allow_int=False
    )(begin(method).train["w/kernel"])
    grads = jax.device_get(grads)
    assert not np.any(grads["a"]) and np.all(np.any(grads["b"], axis=1))


def test_dora_scales_columns_with_its_magnitudes():
    method = peft.lora(3, dora=True)
    train = drawn(method, 0.3)
    other = train | {"magnitude": 2 * train["magnitude"]}
    one, two = (np.asarray(change(method, t)) + W for t in (train, other))
    np.testing.assert_allclose(two, 2 * one, rtol=1e-5, atol=1e-5)
    lengths = np.linalg.norm(one, axis=0)
    np.testing.assert_allclose(lengths, abs(train["magnitude"]), rtol=1e-5)


def test_column_norms_of_zeros_are_not_zero():
    zero = jnp.zeros((4, 3))
    view = wlab.MatrixView.of(1, 1)
    found = column_norms(
        zero, jnp.zeros((4, 2)), jnp.zeros((3, 2)), jnp.ones(()), view, jnp.zeros(3)
    )
    assert np.all(np.asarray(found) > 0)


@pytest.mark.parametrize("niter", [None, 4])
def test_pissa_starts_at_the_best_approximation(niter: int | None):
    factors = functools.partial(principal_factors, rank=3, scale=0.5, niter=niter)
    a, b = map(np.asarray, jax.jit(factors)(W, key=KEY))
    u, s, vt = np.linalg.svd(W, full_matrices=False)
    best = (u[:, :3] * s[:3]) @ vt[:3]
    np.testing.assert_allclose(0.5 * a @ b.T, best, atol=2e-2 if niter else 2e-5)
    method = peft.lora(3, start="pissa", niter=niter)
    np.testing.assert_allclose(
        change(method, begin(method).train["w/kernel"]), 0, atol=1e-5
    )


def test_lora_plus_is_faster_in_b():
    method = peft.lora(2)
    adapter = method.init(KEY, PARAMS)
    tx = peft.lora_plus(method, 0.1, 8.0, make=optax.sgd)
    ones = jax.tree.map(jnp.ones_like, adapter.train)
    updates, _ = tx.update(ones, tx.init(adapter.train), adapter.train)
    part = updates["w/kernel"]
    np.testing.assert_allclose(part["a"], -0.1)
    np.testing.assert_allclose(part["b"], -0.8, rtol=1e-6)
    schedule = peft.lora_plus(method, lambda step: 0.1 + step, 8.0, make=optax.sgd)
    updates, _ = schedule.update(ones, schedule.init(adapter.train), adapter.train)
    np.testing.assert_allclose(updates["w/kernel"]["b"], -0.8, rtol=1e-6)


def test_an_embedding_is_looked_up_without_its_dense_sum():
    params = {"embed": {"embedding": normal(0, 50, 6)}}
    method = peft.lora(2, select="*embedding")
    ids = np.array([[3, 4], [49, 0]])

    @jax.jit
    def both(params: Any) -> Any:
        adapter = method.init(KEY, params)
        moved = jax.tree.map(lambda x: x + 0.5, adapter.train)
        tree = method.attach(adapter._replace(train=moved), params)
        table = tree["embed"]["embedding"]
        got = wlab.lift(lambda table: table[ids])(table)
        return adapter.train["embed/embedding"], got, table.materialise()[ids]

    part, got, want = jax.device_get(both(params))
    assert not np.any(part["a"]) and np.any(part["b"])
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_a_convolution():
    params = {"conv": {"kernel": normal(0, 3, 3, 4, 5)}}
    x = normal(1, 2, 6, 6, 4)

    def conv(p: Any) -> jax.Array:
        kernel = p["conv"]["kernel"]
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    for method in (peft.lora(2, select="*"), peft.hut(2, select="*")):

        @jax.jit
        def both(params: Any, method: Any = method) -> Any:
            adapter = method.init(KEY, params)
            moved = jax.tree.map(lambda x: x + 0.1, adapter.train)
            tree = method.attach(adapter._replace(train=moved), params)
            return wlab.lift(conv)(tree), conv(wlab.materialise(tree))

        np.testing.assert_allclose(*both(params), rtol=1e-4, atol=1e-4)


# --- Bone, HUT -------------------------------------------------------------------


def test_bone_is_one_block_for_all():
    delta = np.asarray(change(peft.bone(4), drawn(peft.bone(4))))
    blocks = delta.reshape(4, 4, 12)
    np.testing.assert_allclose(
        blocks, np.broadcast_to(blocks[:1], blocks.shape), atol=1e-6
    )
    assert rank(delta) == 4
    mini = peft.bone(4, variant="mini", mini_rank=12)
    train = drawn(peft.bone(4))
    np.testing.assert_allclose(change(mini, train), change(peft.bone(4), train))


def test_bat_with_multiples_of_one():
    method = peft.bone(4, variant="bat")
    half = np.eye(4, dtype=np.float32) / 2
    d = np.tile(half, (3, 1, 1))
    want = W / 2 + np.tile(half, (4, 3))
    np.testing.assert_allclose(change(method, {"d": d}), want, atol=1e-6)
    # A block of zeros leaves its outputs alone.
    d[1] = 0
    delta = np.asarray(change(method, {"d": d}))
    assert not np.any(delta[:, 4:8]) and np.all(np.any(delta[:, :4], axis=0))


def test_hut_keeps_zeros_and_has_full_rank():
    method = peft.hut(2, affine=False)
    train = drawn(method)
    assert rank(change(method, train)) == 12
    hole = W.copy()
    hole[3] = 0
    delta = np.asarray(change(method, train, {"w": {"kernel": hole}}))
    assert not np.any(delta[3])


# --- TeRA, RandLoRA, WaRA --------------------------------------------------------


def test_tera_is_linear_in_each_vector_and_of_high_rank():
    method = peft.tera()
    train = drawn(method)
    delta = np.asarray(change(method, train))
    np.testing.assert_allclose(
        change(method, train | {"d2": 3 * train["d2"]}), 3 * delta, rtol=1e-4, atol=1e-4
    )
    assert rank(delta) == 12
    two = {"w": {"kernel": W}, "v": {"kernel": W}, "u": {"kernel": W[:8]}}
    frozen = jax.eval_shape(method.init, KEY, two).frozen[""]
    assert len(frozen) == 2  # one core for the two of one shape


def test_tera_keeps_the_variance():
    net = peft.tera()
    params = {"w": {"kernel": np.zeros((256, 64), np.float32)}}

    @jax.jit
    def kernel(params: Any) -> jax.Array:
        start = net.init(KEY, params)
        train = jax.tree.map(jnp.ones_like, start.train)
        tree = net.attach(start._replace(train=train), params)
        return tree["w"]["kernel"].materialise()

    y = normal(0, 500, 256) @ np.asarray(kernel(params))
    assert np.var(y) == pytest.approx(1, abs=0.35)


def test_balanced_factors():
    for n, modes in itertools.product((1, 2, 3, 7, 12, 13, 30, 97, 128), (1, 2, 3)):
        dims = balanced(n, modes)
        assert len(dims) == modes and n <= np.prod(dims) <= 2 * n + modes


@pytest.mark.parametrize("pairing", ["paper", "hf"])
def test_randlora_has_full_rank_and_turns_with_its_weight(pairing: Any):
    method = peft.randlora(5, alpha=5, pairing=pairing)
    train = drawn(method)
    delta = np.asarray(change(method, train))
    assert rank(delta) == 12
    turned = {"w": {"kernel": W.T}}
    np.testing.assert_allclose(change(method, train, turned), delta.T, atol=1e-5)
    loss = jax.jit(jax.grad(lambda t: jnp.sum(jnp.sin(change(method, t)))))
    grads = jax.device_get(loss(begin(method).train["w/kernel"]))
    assert np.any(grads["lam"]) and not np.any(grads["gamma"])


@pytest.mark.parametrize("kind", ["uniform", "sparse", "very_sparse"])
def test_bases_have_unit_deviation(kind: Any):
    draw = jax.jit(draw_bases, static_argnums=(1, 2, 3, 4))
    bases = jax.device_get(draw(KEY, 8, 300, 200, kind))
    assert bases["a"].shape == (8, 200) and bases["b"].shape == (300, 25, 8)
    for x in bases.values():
        assert np.std(x) == pytest.approx(1, abs=1e-3)
    zeros = float((bases["b"] == 0).mean())
    wanted = {"uniform": 0, "sparse": 2 / 3, "very_sparse": 1 - 200**-0.5}[kind]
    assert zeros == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db3", "db4"])
def test_wavelets_are_orthonormal(wavelet: Any):
    x = normal(0, 3, 16)

    @jax.jit
    def both(x: jax.Array, line: jax.Array) -> Any:
        low, high = dwt(x, wavelet)
        return low, high, idwt(low, high, wavelet), dwt(line, wavelet)[1]

    line = np.arange(32, dtype=np.float32)
    low, high, back, ends = jax.device_get(both(x, line))
    np.testing.assert_allclose(back, x, atol=1e-5)
    power = np.sum(low**2) + np.sum(high**2)
    np.testing.assert_allclose(power, np.sum(x**2), rtol=1e-5)
    if wavelet != "haar":
        # Two vanishing moments at least: a straight line has no high band inside.
        np.testing.assert_allclose(ends[:12], 0, atol=1e-4)


def test_wara_is_a_kronecker_product():
    method = peft.wara(2)
    train = drawn(method)
    a, b = train["a_all1"], train["b_all1"]
    want = np.kron(a @ b.T, np.eye(2))
    np.testing.assert_allclose(change(method, train), want, atol=1e-5)
    assert rank(want) == 4
    # LL and HH alike and the others nothing: the shared form.
    bands = peft.wara(2, mode="subband", bands=("LL", "HH"))
    same = {f"{n}_{x}1": train[f"{n}_all1"] for n in "ab" for x in ("LL", "HH")}
    np.testing.assert_allclose(change(bands, same), want, atol=1e-5)
    coarse = peft.wara(2, mode="subband", bands=("LL",))
    flat = np.kron(a @ b.T, np.full((2, 2), 0.5))
    only = {f"{n}_LL1": train[f"{n}_all1"] for n in "ab"}
    np.testing.assert_allclose(change(coarse, only), flat, atol=1e-5)


# --- S2FT ------------------------------------------------------------------------


def test_units_by_their_scores():
    up, down = np.ones((2, 4, 6), np.float32), np.ones((2, 6, 4), np.float32)
    up[:, :, 5], down[0, 2] = 9, 7
    params = {"blocks": {"up": {"kernel": up}, "down": {"kernel": down}}}
    side: Any = {"blocks/up/kernel": "out", "blocks/down/kernel": "in"}
    views = {"*": wlab.MatrixView.of(1, 1)}
    scores = peft.unit_scores(params, side, views=views)
    found = peft.choose_units(scores, 1 / 6, side)
    assert found["blocks/up/kernel"].index.tolist() == [[5], [5]]
    assert found["blocks/down/kernel"].index[0].tolist() == [2]
    few = peft.choose_units(scores, 3 / 24, side, scope="global")
    assert few["blocks/up/kernel"].index.tolist() == [[5], [5]]
    assert few["blocks/down/kernel"].index.tolist() == [[2], [-1]]
    small = peft.choose_units(scores, 0.9, side, largest=False)
    assert 5 not in small["blocks/up/kernel"].index[0]
    grads = jax.tree.map(lambda x: x * 2, params)
    for score in ("gradient", "product"):
        peft.unit_scores(params, side, score=score, grads=grads, views=views)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs grads"):
        peft.unit_scores(params, side, score="gradient", views=views)
    method = peft.s2ft(units=few, views=views)

    @jax.jit
    def merge(params: Any) -> Any:
        adapter = method.init(0, params)
        train = jax.tree.map(lambda x: x + 1, adapter.train)
        return wlab.materialise(method.attach(adapter._replace(train=train), params))

    merged = jax.device_get(merge(params))
    moved = jax.tree.map(lambda a, b: a != b, merged, params)["blocks"]
    assert moved["down"]["kernel"].any(-1).tolist() == [
        [i == 2 for i in range(6)],
        [False] * 6,
    ]


def test_permuted_grouped_queries_are_the_same_function():
    shapes = {
        "q": {"kernel": (8, 4, 3), "bias": (4, 3)},
        "k": {"kernel": (8, 2, 3), "bias": (2, 3)},
        "v": {"kernel": (8, 2, 3), "bias": (2, 3)},
        "out": {"kernel": (4, 3, 8)},
    }
    params = {
        "attn": {
            name: {
                part: normal(10 * i + j, *shape)
                for j, (part, shape) in enumerate(parts.items())
            }
            for i, (name, parts) in enumerate(shapes.items())
        }
    }

    def attention(params: Any, x: jax.Array) -> jax.Array:
        p = params["attn"]
        q, k, v = (
            jnp.einsum("td,dhk->thk", x, p[n]["kernel"]) + p[n]["bias"][None]
            for n in ("q", "k", "v")
        )
        k, v = (jnp.repeat(y, 2, axis=1) for y in (k, v))
        weights = jax.nn.softmax(jnp.einsum("thk,shk->hts", q, k), -1)
        mixed = jnp.einsum("hts,shk->thk", weights, v)
        return jnp.einsum("thk,hkd->td", mixed, p["out"]["kernel"])

    assert list(peft.couplings(params)) == ["attn#heads"]
    x = normal(2, 5, 8)
    swap = jax.jit(lambda params: peft.permute(params, {"attn#heads": [1, 0]}))
    attend = jax.jit(attention)
    moved = swap(params)
    assert not np.allclose(moved["attn"]["k"]["bias"], params["attn"]["k"]["bias"])
    np.testing.assert_allclose(attend(moved, x), attend(params, x), atol=1e-5)
    chex.assert_trees_all_equal(swap(moved), params)
    with pytest.raises(ValueError, match="none of the groups"):
        peft.permute(params, {"mlp#heads": [0, 1]})
    with pytest.raises(ValueError, match="does not fit"):
        peft.permute(params, {"attn#heads": [2, 1, 0]})


def test_all_rows_are_full_fine_tuning():
    """The same course under Adam."""
    params = {"w": {"kernel": W}}
    x, goal = normal(0, 9, 16), normal(9, 9, 12)
    tx = optax.adam(1e-2)
    ends = []
    for method in (peft.s2ft(1.0), peft.full("*")):

        @jax.jit
        def trained(params: Any, method: Any = method) -> jax.Array:
            adapter = method.init(KEY, params)

            def kernel(train: Any) -> Any:
                tree = method.attach(adapter._replace(train=train), params)
                return tree["w"]["kernel"]

            def loss(train: Any) -> jax.Array:
                return jnp.mean((wlab.lift(jnp.dot)(x, kernel(train)) - goal) ** 2)

            def step(carry: Any, _: None) -> Any:
                train, state = carry
                updates, state = tx.update(jax.grad(loss)(train), state)
                return (optax.apply_updates(train, updates), state), None

            start = (adapter.train, tx.init(adapter.train))
            train = jax.lax.scan(step, start, length=5)[0][0]
            return wlab.materialise(kernel(train))

        ends.append(trained(params))
    np.testing.assert_allclose(ends[0], ends[1], atol=1e-5)


# --- SNELLA ----------------------------------------------------------------------


def test_kernels():
    train = {"p": normal(0, 2, 30, 3), "q": normal(4, 2, 20, 3)}
    same = np.ones((3, 2), np.float32)
    parts = (0.0, 0.3, 0.999, 1.0)

    @jax.jit
    def everything(train: Any) -> Any:
        k = kernel_of(train, kernel="distance")
        swapped = kernel_of({n: x[::-1] for n, x in train.items()}, kernel="distance")
        sparse = [sparsify(k, jnp.float32(part)) for part in (0.7, 0.0)]
        quantiles = [quantile(jnp.abs(k), part) for part in parts]
        grad = jax.grad(lambda p: jnp.sum(distances(p, same)))(same)
        return k, swapped, sparse, quantiles, grad

    k, swapped, sparse, quantiles, grad = jax.device_get(everything(train))
    np.testing.assert_allclose(swapped, -k, atol=1e-6)
    assert rank(k) == 20
    dropped = float((sparse[0] == 0).mean())
    assert dropped == pytest.approx(0.7, abs=1 / k.size + 1e-6)
    assert int((sparse[1] == 0).sum()) == 1
    np.testing.assert_allclose(quantiles, np.quantile(np.abs(k), parts), rtol=1e-5)
    assert not np.any(grad)


def test_allocation_shares_out_what_full_layers_leave():
    scores = {"a": jnp.float32(5.0), "b": jnp.array([1.0, 0.5], jnp.float32)}
    sizes = {"a": 100, "b": 400}
    found = jax.jit(lambda v: peft.allocate(scores, sizes, v))(500.0)
    kept = [100 * (1 - found["a"]), *(400 * (1 - found["b"]))]
    assert sum(map(float, kept)) <= 500 and float(found["a"]) == 0
    assert kept[1] > kept[2]
    nothing = peft.allocate({k: 0 * x for k, x in scores.items()}, sizes, 300.0)
    assert np.isfinite(float(nothing["a"]))
    with pytest.raises(ValueError, match="leave none between"):
        peft.budget(0, initial=1.0, target=0.5, total=400)


def test_thresholds_move_without_compiling():
    method = peft.snella(4, threshold=0.2, value="keep")
    adapter = begin(method)
    traces = []

    @jax.jit
    def kept(adapter: Any) -> jax.Array:
        traces.append(1)
        merged = wlab.materialise(method.attach(adapter, PARAMS))["w"]["kernel"]
        return (merged != W).mean()

    assert float(kept(adapter)) == pytest.approx(0.8, abs=0.02)
    later = peft.with_thresholds(adapter, {"w/kernel": jnp.float32(0.6)})
    assert float(kept(later)) == pytest.approx(0.4, abs=0.02)
    assert len(traces) == 1
    with pytest.raises(ValueError, match="has no"):
        peft.with_thresholds(adapter, {"v/kernel": jnp.float32(0.6)})


# --- IST -------------------------------------------------------------------------


def test_importance_rises_where_suppression_hurts():
    held = np.array([[0, 1], [2, 3]])
    update = jax.jit(lambda *args: peft.ist_update(peft.ist_init(4), *args).importance)
    half, two = (np.array([x, 0.5], np.float32) for x in (0.5, 2.0))
    np.testing.assert_array_equal(update(held, half), 0)
    found = np.asarray(update(held, two))
    assert np.all(found[:2] > 0) and np.all(found[2:] < 0)
    one = np.asarray(update(held[:, :1], two))
    assert not np.any(one[[1, 3]])


def test_layers_are_drawn_in_proportion():
    state = peft.Importance(jnp.array([2.0, 0.0, -2.0]), jnp.zeros((), jnp.int32))
    keys = jax.random.split(KEY, 4000)
    for suppress in (False, True):
        drawn = jax.vmap(lambda k, s=suppress: peft.ist_sample(k, state, 1, suppress=s))
        count = np.bincount(np.asarray(drawn(keys))[:, 0], minlength=3) / 4000
        weights = np.asarray(jax.nn.sigmoid((-1 if suppress else 1) * state.importance))
        np.testing.assert_allclose(count, weights / weights.sum(), atol=0.03)
    several = jax.vmap(lambda k: peft.ist_sample(k, state, 3))(keys[:50])
    assert np.all(np.sort(several, axis=1) == np.arange(3))


def test_layers_that_are_not_drawn_stay_to_the_bit():
    params = {"ScanLayers": {"kernel": normal(0, 4, 6, 5)}}
    train = jax.device_get(begin(peft.lora(2), params).train)
    tx = peft.ist(optax.adam(1e-2), 0.5, select="ScanLayers/*")
    state = jax.jit(tx.init)(train)
    count = np.zeros(4, int)
    importance = np.array([3, 0, 0, -3], np.float32)

    @jax.jit
    def step(grads: Any, state: Any, train: Any) -> Any:
        updates, state = tx.update(grads, state, train, importance=importance)
        return optax.apply_updates(train, updates), state

    alone = optax.adam(1e-2)
    own = jax.jit(jax.vmap(alone.init))(train)

    @jax.jit
    def step_alone(grads: Any, own: Any, want: Any, mask: jax.Array) -> Any:
        def pick(new: jax.Array, old: jax.Array) -> jax.Array:
            return jnp.where(mask.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

        moved, new = jax.vmap(alone.update)(grads, own)
        there = optax.apply_updates(want, moved)
        return jax.tree.map(pick, new, own), jax.tree.map(pick, there, want)

    want = train
    for i in range(6):
        grads = jax.tree.map(lambda x, i=i: normal(i, *x.shape), train)
        train, after = step(grads, state, train)
        (choice,) = {
            tuple(np.asarray(x).tolist()) for x in jax.tree.leaves(after.choice)
        }
        count[list(choice)] += 1
        own, want = step_alone(grads, own, want, np.isin(np.arange(4), choice))
        state = after
    chex.assert_trees_all_close(train, want, atol=1e-6)
    assert count.sum() == 12 and count[0] > count[3]
    counts = [x for x in jax.tree.leaves(state.inner) if x.dtype == jnp.int32]
    assert counts[0].tolist() == count.tolist()


# --- Together --------------------------------------------------------------------


def test_ranks_in_one_vmap():
    """Terms of zeros stay zero: a mask is a rank, and the scale goes with it."""
    method = peft.lora(4)
    adapter = begin(method)
    masks = np.array([[1, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    many = jax.tree.map(lambda x: np.asarray(x) * masks[:, None], adapter.train)

    def loss(train: Any) -> jax.Array:
        tree = method.attach(adapter._replace(train=train), PARAMS)
        return jnp.sum(jnp.sin(wlab.lift(jnp.dot)(W.T, tree["w"]["kernel"])))

    @jax.jit
    @jax.vmap
    def learn(train: Any) -> Any:
        tx = optax.adam(1e-2)

        def step(carry: Any, _: None) -> Any:
            train, state = carry
            updates, state = tx.update(jax.grad(loss)(train), state)
            return (optax.apply_updates(train, updates), state), None

        return jax.lax.scan(step, (train, tx.init(train)), None, 3)[0][0]

    done = jax.device_get(learn(many)["w/kernel"])
    products = np.einsum("sir,sor->sio", done["a"], done["b"])
    assert [rank(x) for x in products] == [1, 4]


def test_adapters_under_other_methods():
    """ECO over an adapter's numbers, and FRUGAL, on a packed base."""
    views = {"*": wlab.MatrixView.of(1, 1)}
    method = peft.lora(4)
    packed = jax.jit(lambda p: quant.quantize_tree(p, "int4", select="*"))(PARAMS)
    adapter = begin(method, packed)

    @jax.jit
    def loss(train: Any) -> jax.Array:
        tree = method.attach(adapter._replace(train=train), packed)
        return jnp.mean((wlab.lift(jnp.dot)(W.T, tree["w"]["kernel"]) - 1) ** 2)

    for tx in (
        optim.eco(1e-2, select="*", grid="int8", views=views),
        optim.frugal(1e-2, 0.5, 5, select="*", views=views),
    ):
        train = jax.tree.map(lambda x: np.asarray(x) + np.float32(0.01), adapter.train)
        state = jax.jit(tx.init)(train)
        before = loss(train)

        @jax.jit
        def step(train: Any, state: Any, tx: Any = tx) -> Any:
            updates, state = tx.update(jax.grad(loss)(train), state, train)
            return optax.apply_updates(train, updates), state

        for _ in range(8):
            train, state = step(train, state)
        assert float(loss(train)) < float(before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: peft.lora(0), "not positive"),
        (lambda: peft.lora(13).init(0, PARAMS), "above the smaller side"),
        (lambda: peft.lora(2, start="zeros"), "none of"),  # type: ignore[arg-type]
        (lambda: peft.lora(2, select="nothing*").init(0, PARAMS), "near: w/kernel"),
        (lambda: peft.lora(2).init(0, {"bias": W[0]}), "no target"),
        (lambda: peft.lora(2, select="*").init(0, {"b": W[0]}), "is no matrix"),
        (lambda: peft.lora_plus(peft.lora(2), 0.1, 0.5), "below 1"),
        (lambda: peft.bone(5, variant="bat").init(0, PARAMS), "do not divide"),
        (lambda: peft.bone(17).init(0, PARAMS), "above the 16 inputs"),
        (lambda: peft.bone(4, variant="mini"), "mini_rank"),
        (
            lambda: peft.bone(2, select="*").init(
                0, {"conv": {"kernel": jnp.ones((3, 3, 4, 4))}}
            ),
            "conv",
        ),
        (lambda: peft.hut(2, form="other"), "neither"),  # type: ignore[arg-type]
        (lambda: peft.tera(in_dims=(2, 2)).init(0, PARAMS), "do not hold the 16"),
        (lambda: peft.tera(ranks=(1, 2)).init(0, PARAMS), "one positive rank"),
        (lambda: peft.randlora(13).init(0, PARAMS), "above the smaller side"),
        (lambda: peft.wara(7).init(0, PARAMS), "above the smaller side, 6"),
        (lambda: peft.wara(2, bands=("XX",)), "some of"),
        (lambda: peft.s2ft(0.0), "above 0"),
        (
            lambda: peft.s2ft(units={"v": peft.Units(jnp.array([0]))}).init(0, PARAMS),
            "has not",
        ),
        (
            lambda: peft.s2ft(units={"w/kernel": peft.Units(jnp.array([3, 3]))}).init(
                0, PARAMS
            ),
            "must be different",
        ),
        (lambda: peft.snella(3), "even"),
        (lambda: peft.ist(optax.sgd(1.0), 0.0), "above 0"),
        (
            lambda: peft.join(peft.lora(2), peft.bone(2)).init(0, PARAMS),
            "both take the leaf",
        ),
    ],
)
def test_bad_input_is_told(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_adapters_of_another_model_are_told(tmp_path: Any):
    method = peft.lora(2)
    adapter = method.init(KEY, PARAMS)
    other = {"v": {"kernel": W}}
    with pytest.raises(ValueError, match="for another model"):
        method.attach(adapter, other)
    with pytest.raises(ValueError, match=r"w/kernel.*it has"):
        method.attach(adapter, {"w": {"kernel": W[:8]}})
    with pytest.raises(TypeError, match="only floats"):
        peft.lora(2, select="*").init(KEY, {"w": jnp.ones((4, 4), jnp.int32)})
    with pytest.raises(ValueError, match=r"scale of shape \(3,\)"):
        method.attach(adapter, PARAMS, jnp.ones(3))
    peft.save(tmp_path / "a", adapter)
    with pytest.raises(ValueError, match="another model or method"):
        peft.load(tmp_path / "a", method, other)
    with pytest.raises(FileNotFoundError):
        peft.load(tmp_path / "b", method, PARAMS)


def test_tied_leaves_are_a_choice():
    tied = {"embed": {"kernel": W}, "head": {"kernel": W}}
    method = peft.lora(2, select="head*")
    adapter = method.init(KEY, tied)
    moved = adapter._replace(train=jax.tree.map(lambda x: x + 1, adapter.train))
    with pytest.raises(ValueError, match="say tie="):
        peft.merge(method, moved, tied)
    both = peft.merge(method, moved, tied, tie="both")
    np.testing.assert_array_equal(both["embed"]["kernel"], both["head"]["kernel"])
    apart = peft.merge(method, moved, tied, tie="untie")
    assert apart["embed"]["kernel"] is W


def test_labels_of_a_merged_tree():
    params = PARAMS | {"norm": {"scale": W[0]}}
    found = peft.labels(peft.lora(2), params)
    assert found == {"w": {"kernel": "train"}, "norm": {"scale": "frozen"}}


def test_a_list_of_matrices():
    """Whose paths are numbers, which are no parts of joined methods."""
    params = [W, 2 * W]
    method = peft.lora(2, select="*")
    adapter = method.init(KEY, params)
    moved = adapter._replace(train=jax.tree.map(lambda x: x + 1, adapter.train))
    merged = peft.merge(method, moved, params)
    assert all((a != b).all() for a, b in zip(merged, params, strict=True))
