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
X, Y = jax.random.normal(jax.random.key(0), (2, 3, 5, 8))
KEYS = jax.random.split(jax.random.key(1), 2)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_change_is_measured_by_its_angle(reduce: Any):
    scores = quant.lim_scores(jnp.stack([X, X, -X, Y, 0 * X]), reduce=reduce)
    np.testing.assert_allclose(scores[:2], [-1, 1], atol=1e-6)
    assert -1 < float(scores[2]) < 1 and float(scores[3]) == 0
    scaled = quant.lim_scores(jnp.stack([2 * X, 3 * Y]), reduce=reduce)
    same = quant.lim_scores(jnp.stack([X, Y]), reduce=reduce)
    np.testing.assert_allclose(scaled, same, atol=1e-6)
    if reduce == "flat":
        one = jnp.stack([X, Y])[:, :1, :1]
        np.testing.assert_allclose(
            quant.lim_scores(one), quant.lim_scores(one, reduce="token"), atol=1e-6
        )


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_batches_and_padding(reduce: Any):
    """Batch by batch, and with tokens that do not count, the same comes out."""
    score = quant.lim(reduce)
    whole = score.read(score.add(score.init(), X, Y))
    parts = score.add(score.add(score.init(), X[:1], Y[:1]), X[1:], Y[1:])
    np.testing.assert_allclose(score.read(parts), whole, atol=1e-6)
    mask = jnp.ones((3, 7), bool).at[:, 5:].set(False)
    padded = [jnp.pad(x, [(0, 0), (0, 2), (0, 0)], constant_values=9) for x in (X, Y)]
    masked = score.read(score.add(score.init(), *padded, mask))
    np.testing.assert_allclose(masked, whole, atol=1e-6)


def test_narrow_streams_are_summed_in_float32():
    x = jnp.ones((4, 64, 64), jnp.bfloat16)
    scores = quant.lim_scores(jnp.stack([x, x]))
    assert scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, -1, atol=1e-6)


def test_shares_of_far_weights():
    w = jax.random.normal(jax.random.key(1), (250, 400))
    share = quant.zd_score(w)
    assert abs(float(share) - 0.1587) < 0.005
    assert abs(float(quant.zd_score(w, sided=2)) - 0.3173) < 0.005
    np.testing.assert_allclose(quant.zd_score(3 * w[::-1].T + 7), share, atol=1e-4)
    heavy = jax.random.t(jax.random.key(2), 2.5, (250, 400))
    assert float(quant.zd_score(heavy)) < float(share) - 0.01
    assert float(quant.zd_score(jnp.ones((3, 3)))) == 0
    # Pooled, the wide matrix has the far weights; one by one both have their share.
    both = {"a": {"kernel": w}, "b": {"kernel": 100 * w}}
    assert float(quant.zd_score(both)) < float(share) - 0.03
    np.testing.assert_allclose(quant.zd_score(both, pool="matrix"), share, atol=1e-5)
    # A mean far from zero in a narrow dtype.
    narrow = (w + 8).astype(jnp.bfloat16)
    assert abs(float(quant.zd_score(narrow)) - 0.1587) < 0.03


def test_layers_of_a_model_stacked_or_not():
    layers = {
        "attention": {"query": {"kernel": jax.random.normal(KEYS[0], (3, 8, 2, 4))}},
        "mlp": {"up": {"kernel": jax.random.normal(KEYS[1], (3, 8, 20))}},
        "mlp_norm": {"scale": jnp.ones((3, 8))},
    }
    scores = quant.zd_scores({"blocks": layers, "head": jnp.ones((2, 2))}, "blocks")
    listed = {
        f"blocks_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(3)
    }
    np.testing.assert_allclose(quant.zd_scores(listed, "blocks_*"), scores, atol=1e-6)
    assert len(set(scores.tolist())) > 1
    layers["mlp_norm"]["scale"] += jnp.arange(24.0).reshape(3, 8)  # does not count
    again = quant.zd_scores({"blocks": layers}, "blocks")
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
    packed = quant.rtn(jnp.ones((8, 8)), group=8)
    with pytest.raises(TypeError, match="before it is quantised"):
        quant.zd_score({"dense": {"kernel": packed}})
