# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The noise of members and what is learnt from their fitness."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from wlab import es
from wlab.core import MatrixView
from wlab.es import _estimate

N = 12
FITNESS = np.random.default_rng(1).normal(size=N).astype(np.float32)

# Named after the leaves of Flax: a matrix, an attention kernel, a stack, an embedding,
# a convolution, and what is no matrix.
PARAMS = {
    "dense": {"kernel": jnp.zeros((5, 3)), "bias": jnp.zeros(3)},
    "query": {"kernel": jnp.zeros((4, 2, 3))},
    "blocks": {
        "norm": {"scale": jnp.ones((2, 5))},
        "up": {"kernel": jnp.zeros((2, 5, 3))},
    },
    "embed": {"embedding": jnp.zeros((7, 4))},
    "conv": {"kernel": jnp.zeros((3, 2, 4))},
}


def state_of(search: Any, params: Any = PARAMS, epoch: int = 0) -> Any:
    return search.init(jax.random.key(7), params)._replace(epoch=jnp.int32(epoch))


@functools.partial(jax.jit, static_argnums=(0, 3))
def members(search: Any, state: Any, params: Any = PARAMS, n: int = N) -> Any:
    """All members, dense, stacked."""
    return jax.vmap(lambda i: wlab.materialise(search.perturb(state, params, i)))(
        jnp.arange(n)
    )


def noise_of(search: Any, state: Any, params: Any = PARAMS, n: int = N) -> Any:
    """The noise of members, float32."""
    moved = members(search, state, params, n)
    return jax.tree.map(
        lambda x, p: np.asarray(x, np.float32) - np.asarray(p, np.float32),
        moved,
        params,
    )


FORMS = {
    "eggroll": es.eggroll(0.1),
    "rank 3, two epochs": es.eggroll(0.1, 3, noise_reuse=2),
    "binomial": es.eggroll(0.1, 2, noise="binomial"),
    "open_es": es.open_es(0.1),
    "frozen": es.eggroll(0.1, dense="freeze"),
    "position": es.eggroll(0.1, keys="position"),
}


# The last says only which noise is whose.
@pytest.fixture(params=[*FORMS][:-1], scope="module")
def form(request: pytest.FixtureRequest) -> Any:
    search = FORMS[request.param]
    state = state_of(search)
    return search, state, noise_of(search, state)


def test_pairs_are_exact_negatives(form: Any):
    # The perturbation of zeros is the noise itself, to the bit.
    search, state, _ = form
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    noise = members(search, state, zeros)
    for x in jax.tree.leaves(noise):
        np.testing.assert_array_equal(x[0::2], -x[1::2])
        assert len(np.unique(np.asarray(x[::2]).reshape(N // 2, -1), axis=0)) in (
            *(1, N // 2),
        )


def test_the_gradient_is_the_sum_over_members(form: Any):
    search, state, noise = form
    grads, after = jax.jit(search.update)(state, PARAMS, FITNESS)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, PARAMS)
    assert int(after.epoch) == 1 and int(after.failed) == 0
    chex.assert_trees_all_close(grads, sum_over(noise), atol=3e-7)


def sum_over(noise: Any) -> Any:
    z = es.shape_fitness(FITNESS)
    return jax.tree.map(lambda e: -np.tensordot(z, e, 1) / N**0.5, noise)


@pytest.mark.parametrize("name", ["rank 3, two epochs", "open_es"])
def test_numbered_members_and_kept_noise_give_the_same_gradient(name: str):
    search = FORMS[name]
    state = state_of(search)
    order = jax.random.permutation(jax.random.key(2), N)

    @jax.jit
    def updates() -> Any:
        kept = es.draw_pairs(search, state, PARAMS, N)
        return (
            # In any order, and with the noise that would be drawn again.
            search.update(state, PARAMS, FITNESS[order], order)[0],
            search.update(state, PARAMS, FITNESS, noise=kept)[0],
        )

    want = sum_over(noise_of(search, state))
    for got in updates():
        chex.assert_trees_all_close(got, want, atol=3e-7)


def test_members_of_kept_noise(form: Any):
    search, state, noise = form
    kept = jax.jit(lambda: search.draw(state, PARAMS, 5))()
    tree = jax.jit(
        lambda kept: wlab.materialise(search.perturb(state, PARAMS, 5, noise=kept))
    )(kept)
    want = jax.tree.map(lambda p, e: p + e[5], PARAMS, noise)
    chex.assert_trees_all_close(tree, want, atol=1e-6)


def test_what_equal_pairs_say():
    search = es.eggroll(0.1)
    fitness = np.repeat(FITNESS[: N // 2], 2)
    grads, _ = jax.jit(search.update)(state_of(search), PARAMS, fitness)
    assert not any(np.any(g) for g in jax.tree.leaves(grads))


def test_every_leaf_moves_and_layers_differ():
    noise = noise_of(FORMS["eggroll"], state_of(FORMS["eggroll"]))
    for x in jax.tree.leaves(noise):
        assert np.any(x[0])
    for stacked in jax.tree.leaves(noise["blocks"]):
        assert not np.allclose(stacked[0, 0], stacked[0, 1])


def test_noise_has_its_rank():
    search = FORMS["rank 3, two epochs"]
    noise = noise_of(search, state_of(search))
    kernel = noise["embed"]["embedding"][0]
    assert np.linalg.matrix_rank(kernel, tol=1e-4) == 3
    flat = noise["query"]["kernel"][0].reshape(4, 6)
    assert np.linalg.matrix_rank(flat, tol=1e-4) == 3
    flat = noise["conv"]["kernel"][0].reshape(6, 4)
    assert np.linalg.matrix_rank(flat, tol=1e-4) == 3


def test_epochs_share_noise_as_told():
    at = {e: noise_of(FORMS["rank 3, two epochs"], state_of(FORMS["eggroll"], epoch=e))
          for e in (0, 1, 2)}  # fmt: skip
    chex.assert_trees_all_equal(at[0], at[1])
    assert not np.allclose(at[0]["dense"]["kernel"], at[2]["dense"]["kernel"])
    forever = es.eggroll(0.1, noise_reuse=0)
    chex.assert_trees_all_equal(
        noise_of(forever, state_of(forever)),
        noise_of(forever, state_of(forever, epoch=5)),
    )


def test_keys_by_path_outlive_other_leaves():
    fewer = {"dense": PARAMS["dense"], "a new name": PARAMS["query"]}
    for form, same in (("eggroll", True), ("position", False)):
        search = FORMS[form]
        got = noise_of(search, state_of(search, fewer), fewer)
        want = noise_of(search, state_of(search))
        kernels = got["dense"]["kernel"], want["dense"]["kernel"]
        assert np.array_equal(*kernels) is same


@pytest.mark.parametrize("noise", ["normal", "binomial"])
@pytest.mark.parametrize("rank", [1, 4])
def test_moments(noise: Any, rank: int):
    """Mean 0, variance 1, kurtosis 3 + 6 / r of Gaussian factors' products."""
    params = {"w": jnp.zeros((64, 64))}
    search = es.eggroll(1.0, rank, noise=noise)
    x = noise_of(search, state_of(search, params), params, 512)["w"][::2]
    x = np.asarray(x, np.float64)
    # Of 256 members, each with 128 r numbers.
    assert abs(x.mean()) < 0.02
    assert abs(x.var() - 1) < 0.04
    exact = 3.0 if noise == "normal" else 3 - 1 / 16
    kurtosis = 3 + (exact**2 - 3) / rank
    assert abs((x**4).mean() / x.var() ** 2 - kurtosis) < 0.1 * kurtosis
    # Members, rows and columns are not correlated.
    flat = x.reshape(256, -1)
    assert abs(np.corrcoef(flat[:, ::37].T) - np.eye(111)).max() < 0.35
    # Of two members of rank 1 it is a product of two Gaussians: long tails.
    assert abs(np.corrcoef(flat[:20]) - np.eye(20)).max() < 0.2


def test_unbiased_on_a_linear_objective():
    """The mean of z E / sigma is the gradient, for raw fitness that is linear."""
    w = jax.random.normal(jax.random.key(3), (6, 4))
    params, sigma, n = {"w": jnp.zeros((6, 4))}, 0.5, 1 << 14
    search = es.eggroll(sigma, 2, shaping="none")
    state = state_of(search, params)

    @jax.jit
    def estimate() -> jax.Array:
        fitness = es.evaluate(search, lambda t: jnp.sum(t["w"] * w), state, params, n)
        return jax.jit(search.update)(state, params, fitness)[0]["w"]

    got = -estimate() / (sigma**2 * n**0.5)
    np.testing.assert_allclose(got, w, atol=0.12)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch):
    fitness = FITNESS
    for make in (es.eggroll, es.open_es):
        state = state_of(make(0.1))
        whole, _ = jax.jit(make(0.1).update)(state, PARAMS, fitness)
        with monkeypatch.context() as few:
            few.setattr(_estimate, "_AT_ONCE", 40)
            parts, _ = jax.jit(make(0.1).update)(state, PARAMS, fitness)
        chex.assert_trees_all_close(parts, whole, atol=3e-7)


def test_failed_members_are_dropped_and_counted():
    search = es.eggroll(0.1)
    state = state_of(search)
    fitness = np.where(np.arange(N) == 3, np.nan, FITNESS)
    grads, after = jax.jit(search.update)(state, PARAMS, fitness)
    assert int(after.failed) == 1
    noise = noise_of(search, state)
    z = es.shape_fitness(fitness)
    want = jax.tree.map(lambda e: -np.tensordot(z, e, 1) / (N - 1) ** 0.5, noise)
    chex.assert_trees_all_close(grads, want, atol=3e-7)
    all_failed, after = jax.jit(search.update)(state, PARAMS, jnp.full(N, jnp.nan))
    assert int(after.failed) == N
    assert not any(np.any(g) for g in jax.tree.leaves(all_failed))


def test_the_baseline_has_no_noise():
    search = es.eggroll(0.1, shaping="baseline", group_size=4)
    state = state_of(search)
    noise = noise_of(search, state)["dense"]["kernel"]
    still = [not np.any(x) for x in noise]
    assert still == [i % 4 < 2 for i in range(N)]
    fitness = FITNESS
    z = es.shape_fitness(fitness, "baseline", 4)
    grads, _ = jax.jit(search.update)(state, PARAMS, fitness)
    want = -np.tensordot(z, noise, 1) / N**0.5
    np.testing.assert_allclose(grads["dense"]["kernel"], want, atol=3e-7)


def test_sigma_follows_its_schedule_or_stays_as_set():
    search = es.eggroll(optax.linear_schedule(0.4, 0.0, 4), noise_reuse=0)
    state = state_of(search)
    first = noise_of(search, state)["dense"]["kernel"]
    fitness = jnp.arange(float(N))
    update = jax.jit(search.update)
    for want in (0.3, 0.2):
        _, state = update(state, PARAMS, fitness)
        np.testing.assert_allclose(state.sigma, want, rtol=1e-6)
    half = noise_of(search, state)["dense"]["kernel"]
    np.testing.assert_allclose(half, first / 2, atol=1e-6)
    fixed = es.eggroll(0.1)
    state = state_of(fixed)._replace(sigma=jnp.float32(0.7))
    assert float(jax.jit(fixed.update)(state, PARAMS, fitness)[1].sigma) == np.float32(
        0.7
    )


def test_signs_of_the_factors_alone():
    search = es.eggroll(0.1, 2, signs=True)
    state = state_of(search)
    fitness = FITNESS
    z = es.shape_fitness(fitness)
    a, b = jax.vmap(lambda i: search.draw(state, PARAMS, i)["dense/kernel"])(
        jnp.arange(N)
    )
    sign = jnp.array([1.0, -1.0] * (N // 2))
    total = jnp.einsum("n,nir,njr->ij", z * sign, jnp.sign(a), jnp.sign(b))
    grads, _ = jax.jit(search.update)(state, PARAMS, fitness)
    want = -0.1 / (2 * N) ** 0.5 * total
    np.testing.assert_allclose(grads["dense"]["kernel"], want, atol=1e-6)


def test_what_is_selected_moves():
    search = es.eggroll(0.1, select=["*kernel", "!conv*"])
    state = state_of(search)
    noise = noise_of(search, state)
    grads, _ = jax.jit(search.update)(state, PARAMS, jnp.arange(float(N)))
    for tree in (noise, grads):
        moved = {p for p, x in wlab.core.leaves_with_paths(tree) if np.any(x)}
        assert moved == {"dense/kernel", "query/kernel", "blocks/up/kernel"}


def test_bfloat16():
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    search = es.eggroll(0.1, 2)
    state = state_of(search, params)
    fitness = FITNESS
    grads, _ = jax.jit(search.update)(state, params, fitness)
    chex.assert_trees_all_equal_dtypes(grads, params)
    z = es.shape_fitness(fitness)
    noise = noise_of(search, state, params)["dense"]["kernel"]
    want = -np.tensordot(z, noise, 1) / N**0.5
    np.testing.assert_allclose(
        grads["dense"]["kernel"].astype(jnp.float32), want, atol=4e-3
    )


def test_integers_are_left_alone_unless_asked_for():
    params = {"w": jnp.zeros((3, 2)), "count": jnp.zeros((), jnp.int32)}
    search = es.eggroll(0.1)
    state = state_of(search, params)
    tree = search.perturb(state, params, 0)
    assert tree["count"].dtype == jnp.int32 and int(tree["count"]) == 0
    with pytest.raises(TypeError, match=r"'count' of shape \(\) holds int32"):
        es.eggroll(0.1, select="*").init(0, params)


def test_odd_trees():
    search = es.eggroll(0.1)
    state = search.init(0, {})
    assert jax.jit(search.update)(state, {}, jnp.arange(4.0))[0] == {}
    vectors = {"bias": jnp.zeros(3)}
    assert search.perturb(search.init(0, vectors), vectors, 0)["bias"].shape == (3,)
    with pytest.raises(ValueError, match="no leaf is searched: of 1 leaves"):
        es.eggroll(0.1, dense="freeze").init(0, vectors)
    # A rank above the matrix is allowed: its noise is nearer to a Gaussian.
    small = {"w": jnp.zeros((2, 1))}
    wide = es.eggroll(1.0, 64)
    x = noise_of(wide, state_of(wide, small), small, 2048)["w"][::2]
    assert abs(float((x**4).mean() / (x**2).mean() ** 2) - 3) < 0.6


def test_views_are_the_users():
    params = {"w": jnp.zeros((3, 4, 5))}
    search = es.eggroll(0.1, views={"w": MatrixView.of(2, 1)})
    noise = noise_of(search, state_of(search, params), params)["w"][0]
    assert np.linalg.matrix_rank(noise.reshape(12, 5), tol=1e-5) == 1


def test_nothing_of_the_parameters_size_is_kept():
    """Also for shapes alone: the state is a key and three scalars."""
    abstract = jax.eval_shape(lambda: PARAMS)
    state = jax.eval_shape(FORMS["eggroll"].init, jax.random.key(0), abstract)
    assert sum(x.size for x in jax.tree.leaves(state)) == 4


def test_the_update_compiles_alike_for_any_depth():
    """Leaves of one shape are one computation."""
    search = es.eggroll(0.1)

    def equations(depth: int) -> int:
        params = {f"dense_{i}": {"kernel": jnp.zeros((4, 4))} for i in range(depth)}
        state = search.init(0, params)
        jaxpr = jax.make_jaxpr(search.update)(state, params, jnp.zeros(8))
        names = ("random_bits", "dot_general")
        return sum(str(jaxpr).count(name) for name in names)

    assert equations(2) == equations(9)


def test_bad_arguments():
    with pytest.raises(ValueError, match="rank=0"):
        es.eggroll(0.1, 0)
    with pytest.raises(ValueError, match="sigma=-1"):
        es.eggroll(-1.0)
    with pytest.raises(ValueError, match="noise_reuse=-1"):
        es.eggroll(0.1, noise_reuse=-1)
    with pytest.raises(ValueError, match="group_size=0"):
        es.eggroll(0.1, group_size=0)
    with pytest.raises(ValueError, match="group_size=3: with shaping='baseline'"):
        es.eggroll(0.1, group_size=3, shaping="baseline")
    with pytest.raises(ValueError, match="dense='drop'"):
        es.eggroll(0.1, dense="drop")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no shaping"):
        es.eggroll(0.1, shaping="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"matches no leaf; near: .*dense/kernel"):
        es.eggroll(0.1, select="dense/kernal").init(0, PARAMS)
    search = es.eggroll(0.1, group_size=8)
    state = state_of(search)
    with pytest.raises(ValueError, match="5 members are no antithetic pairs"):
        jax.jit(search.update)(state, PARAMS, jnp.zeros(5))
    with pytest.raises(ValueError, match=r"group_size=8 does not divide .* 12"):
        jax.jit(search.update)(state, PARAMS, jnp.zeros(12))
    with pytest.raises(ValueError, match="give them the same shape"):
        jax.jit(search.update)(state, PARAMS, jnp.zeros(12), jnp.arange(6))
    with pytest.raises(TypeError, match="a member of a population is an integer"):
        search.perturb(state, PARAMS, 0.5)
