# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Scores of layers and the widths that they get."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab import quant

REDUCTIONS: tuple[Any, ...] = ("flat", "sequence", "token")


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


X, Y = normal(0, 2, 3, 5, 8)
lim_scores = jax.jit(quant.lim_scores, static_argnames="reduce")
zd_score = jax.jit(quant.zd_score, static_argnames=("sided", "pool"))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_change_is_measured_by_its_angle(reduce: Any):
    scores = np.asarray(lim_scores(np.stack([X, X, -X, Y, 0 * X]), reduce=reduce))
    np.testing.assert_allclose(scores[:2], [-1, 1], atol=1e-6)
    assert -1 < float(scores[2]) < 1 and float(scores[3]) == 0
    scaled = lim_scores(np.stack([2 * X, 3 * Y]), reduce=reduce)
    same = lim_scores(np.stack([X, Y]), reduce=reduce)
    np.testing.assert_allclose(scaled, same, atol=1e-6)
    if reduce == "flat":
        one = np.stack([X, Y])[:, :1, :1]
        np.testing.assert_allclose(
            lim_scores(one), lim_scores(one, reduce="token"), atol=1e-6
        )


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_batches_and_padding(reduce: Any):
    """Batch by batch, and with tokens that do not count, the same comes out."""
    score = quant.lim(reduce)
    mask = np.arange(7) < np.full((3, 1), 5)

    @jax.jit
    def three(x: jax.Array, y: jax.Array) -> Any:
        start = score.init()
        parts = score.add(score.add(start, x[:1], y[:1]), x[1:], y[1:])
        pads = [(0, 0), (0, 2), (0, 0)]
        padded = [jnp.pad(a, pads, constant_values=9) for a in (x, y)]
        states = score.add(start, x, y), parts, score.add(start, *padded, mask)
        return [score.read(state) for state in states]

    whole, parts, masked = three(X, Y)
    np.testing.assert_allclose(parts, whole, atol=1e-6)
    np.testing.assert_allclose(masked, whole, atol=1e-6)


def test_narrow_streams_are_summed_in_float32():
    scores = lim_scores(np.ones((2, 4, 64, 64), jnp.bfloat16))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, -1, atol=1e-6)


def test_shares_of_far_weights():
    w = normal(1, 250, 400)
    share = float(zd_score(w))
    assert abs(share - 0.1587) < 0.005
    assert abs(float(zd_score(w, sided=2)) - 0.3173) < 0.005
    np.testing.assert_allclose(zd_score(3 * w[::-1].T + 7), share, atol=1e-4)
    heavy = np.random.default_rng(2).standard_t(2.5, (250, 400)).astype(np.float32)
    assert float(zd_score(heavy)) < share - 0.01
    assert float(zd_score(np.ones((3, 3), np.float32))) == 0
    # Pooled, the wide matrix has the far weights; one by one both have their share.
    both = {"a": {"kernel": w}, "b": {"kernel": 100 * w}}
    assert float(zd_score(both)) < share - 0.03
    np.testing.assert_allclose(zd_score(both, pool="matrix"), share, atol=1e-5)
    # A mean far from zero in a narrow dtype.
    narrow = (w + 8).astype(jnp.bfloat16)
    assert abs(float(zd_score(narrow)) - 0.1587) < 0.03


def test_layers_of_a_model_stacked_or_not():
    layers = {
        "attention": {"query": {"kernel": normal(0, 3, 8, 2, 4)}},
        "mlp": {"up": {"kernel": normal(1, 3, 8, 20)}},
        "mlp_norm": {"scale": np.ones((3, 8), np.float32)},
    }
    zd_scores = jax.jit(quant.zd_scores, static_argnums=1)
    scores = np.asarray(zd_scores({"blocks": layers, "head": np.eye(2)}, "blocks"))
    listed = {
        f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(3)
    }
    np.testing.assert_allclose(zd_scores(listed, "blocks_*"), scores, atol=1e-6)
    assert len(set(scores.tolist())) > 1
    layers["mlp_norm"]["scale"] += normal(2, 3, 8)  # does not count
    again = zd_scores({"blocks": layers}, "blocks")
    np.testing.assert_array_equal(again, scores)


def test_bits_meet_their_target():
    scores = np.random.default_rng(0).normal(size=10)
    best = np.argsort(-scores)
    last = np.full(10, 2)
    for target in np.linspace(2, 8, 61):
        bits = quant.allocate_bits(scores, target, (2, 4, 8))
        step = 2 if target <= 4 else 4
        assert abs(bits.mean() - target) <= step / 20 + 1e-9
        assert (np.diff(bits[best]) <= 0).all() and (bits >= last).all()
        last = bits
    assert (last == 8).all() and (quant.allocate_bits(scores, 2.0) == 2).all()
    for_zd = quant.allocate_bits(scores, 3.0, higher_is_important=False)
    assert set(np.flatnonzero(for_zd == 4)) == set(best[5:])
    assert quant.allocate_bits(np.zeros(4), 3.0).tolist() == [4, 4, 2, 2]
    example = quant.allocate_bits(np.arange(40.0), 3.5)
    assert (example == 4).sum() == 30


def test_layers_of_unlike_sizes():
    sizes = [10, 1, 1, 10]
    bits = quant.allocate_bits([4.0, 3.0, 2.0, 1.0], 3.0, sizes=sizes)
    assert bits.tolist() == [4, 4, 2, 2]
    assert np.average(bits, weights=sizes) == 3


def test_bad_input_is_told():
    with pytest.raises(ValueError, match="outside the levels"):
        quant.allocate_bits([1.0, 2.0], 5.0)
    with pytest.raises(ValueError, match="not finite"):
        quant.allocate_bits([1.0, np.nan], 3.0)
    with pytest.raises(ValueError, match="one positive size"):
        quant.allocate_bits([1.0, 2.0], 3.0, sizes=[1.0])
    with pytest.raises(ValueError, match="none of flat"):
        quant.lim("mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers \\+ 1"):
        quant.lim_scores(X)
    with pytest.raises(ValueError, match="is a kernel"):
        quant.zd_score({"norm": {"scale": jnp.ones(3)}})
    packed = jax.eval_shape(lambda: quant.rtn(jnp.ones((8, 8)), group=8))
    with pytest.raises(TypeError, match="before it is quantised"):
        quant.zd_score({"dense": {"kernel": packed}})
