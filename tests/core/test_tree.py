# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Paths, selection, and what a leaf is taken for; the view of a leaf as a matrix."""

import dataclasses
import math
import re
from typing import Any

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import wlab
from wlab.core import (
    LowRank,
    MatrixView,
    as_matrices,
    describe,
    from_matrices,
    leaves_with_paths,
    map_with_path,
    matrix_views,
    muon_dimension_numbers,
    select,
)
from wlab.models.decoder import Decoder, DecoderConfig

ROW, IN2, OUT2 = MatrixView.of(1, 1), MatrixView.of(2, 1), MatrixView.of(1, 2)


def paths(tree: Any) -> list[str]:
    return [p for p, _ in leaves_with_paths(tree)]


def chosen(tree: Any, pattern: Any) -> set[str]:
    return {p for p, taken in leaves_with_paths(select(tree, pattern)) if taken}


def abstract(model: nn.Module, *args: Any) -> Any:
    return jax.eval_shape(model.init, jax.random.key(0), *args)


def decoder(scan: bool, **options: Any) -> tuple[Decoder, jax.Array]:
    config = DecoderConfig(
        vocab=11, width=8, depth=3, heads=2, kv_heads=1, head_dim=4, hidden=12
    )
    config = dataclasses.replace(config, scan=scan, tied=False, **options)
    return Decoder(config), jnp.zeros((1, 5), jnp.int32)


# --- Paths -----------------------------------------------------------------------


def test_params_is_dropped_in_front_of_something_only():
    tree = {"params": {"a": {"params": {"kernel": 1.0}}}, "batch_stats": {"mean": 2.0}}
    assert paths(tree) == ["batch_stats/mean", "a/params/kernel"]
    assert paths({"params": 1.0}) == ["params"]
    assert paths({"a": {"params": 1.0}}) == ["a/params"]
    assert paths(1.0) == [""]


class Net(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.embed = nnx.Embed(7, 8, rngs=rngs)
        self.conv = nnx.Conv(8, 5, (3, 2), rngs=rngs)
        norm = nnx.BatchNorm(5, rngs=rngs)
        self.tail = nnx.List([nnx.LayerNorm(5, rngs=rngs), norm])
        self.head = nnx.Linear(5, 3, rngs=rngs)


def test_nnx_variables_lose_their_attribute_and_nothing_else_does():
    module = nnx.eval_shape(lambda: Net(nnx.Rngs(0)))
    state = nnx.state(module, nnx.Param)
    found = paths(state)
    assert {"tail/0/scale", "attention/value/kernel", "embed/embedding"} < set(found)
    assert not any(p.endswith("/value") for p in found)
    # The module itself is a tree too, with the statistics that are no parameters.
    assert set(paths(module)) == {*found, "tail/1/mean", "tail/1/var"}
    # A dict has no such attribute: there "value" is a name, as query and key are.
    plain = {"attention": {"query": 1.0, "value": 2.0}, "value": 3.0}
    assert paths(plain) == ["attention/query", "attention/value", "value"]


class Cell(eqx.Module):
    weight: Any
    layers: list[Any]
    name: str = eqx.field(static=True, default="cell")


def test_attributes_and_lists():
    tree = Cell(jnp.ones(2), [Cell(jnp.ones(1), []), (jnp.ones(3),)])
    assert paths(tree) == ["weight", "layers/0/weight", "layers/1/0"]
    doubled = map_with_path(lambda path, x: 2 * x if "0" in path else x, tree)
    assert doubled.layers[0].weight[0] == 2 and doubled.weight[0] == 1


def test_none_and_masked_nodes_survive():
    tree = {"a": None, "b": optax.MaskedNode(), "c": jnp.ones((3, 2))}
    assert paths(tree) == ["c"]
    assert select(tree, "c") == {"a": None, "b": optax.MaskedNode(), "c": True}
    assert muon_dimension_numbers(tree)["b"] == optax.MaskedNode()
    assert [leaf.path for leaf in describe(tree)] == ["c"]


def test_a_structured_weight_is_one_leaf():
    dense = jax.random.normal(jax.random.key(0), (4, 3))
    packed = wlab.quant.quantize(dense, "int4", axis=-1, view=ROW)
    low = LowRank(packed, jnp.ones((4, 2)), jnp.ones((3, 2)))
    tree = {"packed": packed, "low": low, "bias": jnp.ones(3)}
    assert paths(tree) == ["bias", "low", "packed"]
    assert select(tree, "packed") == {"bias": False, "low": False, "packed": True}
    assert {leaf.path: leaf.shape for leaf in describe(tree)}["low"] == (4, 3)


def test_two_leaves_of_one_path_are_an_error():
    tree = {"params": {"w": jnp.ones(2)}, "w": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"two leaves .* 'w'"):
        leaves_with_paths(tree)


# --- Selection -------------------------------------------------------------------

TREE = {
    "blocks_0": {"up": {"kernel": 1.0, "bias": 2.0}, "norm": {"scale": 3.0}},
    "blocks_1": {"up": {"kernel": 4.0, "bias": 5.0}, "norm": {"scale": 6.0}},
    "head": {"kernel": 7.0},
}


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("head/kernel", {"head/kernel"}),
        ("*kernel", {"blocks_0/up/kernel", "blocks_1/up/kernel", "head/kernel"}),
        ("blocks_[0]*kernel", {"blocks_0/up/kernel"}),
        (re.compile(r"_\d/up/k"), {"blocks_0/up/kernel", "blocks_1/up/kernel"}),
        (["*kernel", "!head*"], {"blocks_0/up/kernel", "blocks_1/up/kernel"}),
        (("!*kernel", "!*bias"), {"blocks_0/norm/scale", "blocks_1/norm/scale"}),
        (["*_0*", "!*_0*", "*_0*scale"], {"blocks_0/norm/scale"}),
        (["head*", re.compile("^blocks_1/n")], {"head/kernel", "blocks_1/norm/scale"}),
        (lambda path, leaf: leaf > 5, {"blocks_1/norm/scale", "head/kernel"}),
        (lambda path, leaf: path.startswith("head"), {"head/kernel"}),
    ],
)
def test_patterns(pattern: Any, wanted: set[str]):
    assert chosen(TREE, pattern) == wanted


def test_the_pattern_is_of_the_whole_path_and_knows_capitals():
    for pattern in ("kernel", "up/kernel", "*KERNEL"):
        with pytest.raises(ValueError, match="matches no leaf"):
            select(TREE, pattern)


def test_a_selection_is_a_mask_for_optax():
    tx = optax.masked(optax.scale(0.0), select(TREE, "*kernel"))
    updates, _ = tx.update(TREE, tx.init(TREE))
    assert updates["head"]["kernel"] == 0.0
    assert updates["blocks_0"]["up"]["bias"] == 2.0


def nothing(path: str, leaf: Any) -> bool:
    del path, leaf
    return False


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*kernels", r"'\*kernels' matches no leaf; near: .*head/kernel"),
        (re.compile("^kernel"), r"'\^kernel' matches no leaf; near: .*head/kernel"),
        (["*kernel", "*embedding"], r"'\*embedding' matches no leaf"),
        (["*kernel", "!heads*"], r"'!heads\*' matches no leaf; near: .*head/kernel"),
        (["head*", "!head*"], "matches no leaf"),
        (nothing, r"nothing.* matches no leaf; near: .*\(7 leaves"),
        ([], "matches no leaf"),
    ],
)
def test_what_matches_nothing_is_an_error_with_near_misses(pattern: Any, message: str):
    with pytest.raises(ValueError, match=message):
        select(TREE, pattern)


@pytest.mark.parametrize("tree", [{}, {"a": None}, optax.MaskedNode()])
def test_a_tree_without_leaves_is_an_error(tree: Any):
    with pytest.raises(ValueError, match="the tree has no leaf"):
        select(tree, "*")


# --- What a leaf is --------------------------------------------------------------


@pytest.mark.parametrize("scan", [False, True])
def test_the_decoder(scan: bool):
    model, tokens = decoder(scan)
    found = {x.path: (x.role, x.view) for x in describe(abstract(model, tokens))}
    wanted: dict[str, Any] = {
        "embed/embedding": ("embedding", ROW),
        "final_norm/scale": ("norm", None),
        "head/kernel": ("head", ROW),
    }
    for block in ["blocks"] if scan else ["blocks_0", "blocks_1", "blocks_2"]:
        for name in ("query", "key", "value"):
            wanted[f"{block}/attention/{name}/kernel"] = ("kernel", OUT2)
        wanted[f"{block}/attention/out/kernel"] = ("kernel", IN2)
        for name in ("gate", "up", "down"):
            wanted[f"{block}/mlp/{name}/kernel"] = ("kernel", ROW)
        for name in ("attention_norm", "mlp_norm"):
            wanted[f"{block}/{name}/scale"] = ("norm", None)
    assert found == wanted
    dtypes = {x.dtype for x in describe(abstract(model, tokens))}
    assert dtypes == {jnp.dtype("float32")}


class Block(nn.Module):
    norm: bool

    @nn.compact
    def __call__(self, x: jax.Array, _: Any = None) -> tuple[jax.Array, None]:
        h = nn.LayerNorm()(x) if self.norm else x
        gate = self.param("gate", nn.initializers.ones, (6,))
        h = nn.Conv(6, (3, 2))(h) * gate[None, None, None]
        return nn.MultiHeadDotProductAttention(num_heads=2, name="mix")(h), None


class Stack(nn.Module):
    norm: bool
    name_of_scan: str | None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        stack = nn.scan(
            Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=5
        )
        x, _ = stack(self.norm, name=self.name_of_scan)(x, None)
        x = nn.BatchNorm(use_running_average=False)(nn.Conv(6, (3, 2))(x))
        return nn.ConvTranspose(4, (3, 2))(x)


@pytest.mark.parametrize(
    ("norm", "name"), [(True, "layers"), (False, None), (False, "layers")]
)
def test_linen_attention_stacked_by_scan(norm: bool, name: str | None):
    """A norm nearby or the name of the scan tell of it; attention's rank by itself."""
    model = Stack(norm, name)
    tree = abstract(model, jnp.ones((1, 4, 4, 6)))
    mix = (name or "ScanBlock_0") + "/mix"
    found = {leaf.path: leaf for leaf in describe(tree)}
    for part, view in (("query", OUT2), ("key", OUT2), ("value", OUT2), ("out", IN2)):
        leaf = found[f"{mix}/{part}/kernel"]
        assert (leaf.role, leaf.view) == ("kernel", view)
        assert leaf.view.stack(4) == (0,) and leaf.shape[0] == 5
        assert found[f"{mix}/{part}/bias"].view is None
    if norm or name is None:
        stacked = found[mix.replace("mix", "Conv_0/kernel")]
        assert (stacked.role, stacked.view) == ("conv", MatrixView.of(3, 1))
        assert stacked.view.stack(5) == (0,)
        gate = found[mix.replace("mix", "gate")]
        assert (gate.shape, gate.role, gate.view) == ((5, 6), "other", None)
    assert (found["Conv_0/kernel"].role, found["Conv_0/kernel"].view) == (
        "conv",
        MatrixView.of(3, 1),
    )
    assert found["ConvTranspose_0/kernel"].role == "conv"
    for path in ("BatchNorm_0/scale", "batch_stats/BatchNorm_0/mean"):
        assert (found[path].role, found[path].view) == ("norm", None)


def test_linen_layers_by_themselves():
    mix = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=6)
    views = matrix_views(abstract(mix, jnp.ones((1, 4, 8))))
    assert views["query/kernel"] == OUT2 and views["out/kernel"] == IN2
    views = matrix_views(abstract(nn.Dense(3), jnp.ones((1, 4))))
    assert views == {"kernel": ROW, "bias": None}


def test_nnx_layers():
    state = nnx.state(nnx.eval_shape(lambda: Net(nnx.Rngs(0))), nnx.Param)
    found = {leaf.path: (leaf.role, leaf.view) for leaf in describe(state)}
    assert found["attention/query/kernel"] == ("kernel", OUT2)
    assert found["attention/out/kernel"] == ("kernel", IN2)
    assert found["embed/embedding"] == ("embedding", ROW)
    assert found["conv/kernel"] == ("conv", MatrixView.of(3, 1))
    assert found["head/kernel"] == ("head", ROW)
    assert found["head/bias"] == ("bias", None)
    assert found["tail/0/scale"] == found["tail/1/scale"] == ("norm", None)


def test_plain_leaves():
    tree = {
        "w1": (3, 4, 5),
        "v": (3,),
        "s": (),
        "qkv": (2, 3, 2, 2),
        "out": (2, 3, 4, 5),
    }
    tree = {name: jnp.ones(shape) for name, shape in tree.items()}
    found = {leaf.path: (leaf.role, leaf.view) for leaf in describe(tree)}
    assert found == {
        "w1": ("kernel", ROW),  # a stack of three matrices
        "v": ("other", None),
        "s": ("other", None),
        "qkv": ("kernel", MatrixView.of(1, 3)),
        "out": ("kernel", IN2),  # a stack of two
    }


def test_views_that_are_given_hold():
    tree = {"a": {"w": jnp.ones((2, 3, 4)), "bias": jnp.ones((2, 3))}, "v": jnp.ones(3)}
    given_views = {
        "a/*": MatrixView((0,), (1,)),
        re.compile("w$"): IN2,  # too late: the first that matches holds
    }
    found = {x.path: (x.role, x.view) for x in describe(tree, views=given_views)}
    assert found["a/w"] == ("kernel", MatrixView((-3,), (-2,)))
    assert found["a/bias"] == ("kernel", MatrixView((-2,), (-1,)))
    assert found["v"] == ("other", None)
    assert matrix_views(tree, views={"a/w": None})["a/w"] is None


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"a/v": ROW}, "'a/v' of shape .3,.: axis -2 of MatrixView.* does not exist"),
        ({"a/w": MatrixView((0,), (-2,))}, "'a/w' .* names an axis twice"),
        ({"a/w": MatrixView((), (1,))}, "'a/w' .* needs an input and an output axis"),
        ({"b/*": ROW}, r"'b/\*' matches no leaf; near: a/"),
    ],
)
def test_views_that_do_not_fit_are_errors_that_name_the_leaf(views: Any, message: str):
    tree = {"a": {"w": jnp.ones((2, 3)), "v": jnp.ones(3)}}
    with pytest.raises(ValueError, match=message):
        describe(tree, views=views)


def test_explain_prints_marks_stacks_and_sizes(capsys: pytest.CaptureFixture[str]):
    tree = {
        "blocks": {"norm": {"scale": jnp.ones((2, 4))}, "query": {"kernel": None}},
        "out": jnp.ones((3, 1200, 2), jnp.bfloat16),
    }
    tree["blocks"]["query"]["kernel"] = jnp.ones((2, 4, 3, 5))
    wlab.explain(tree, "*kernel")
    assert capsys.readouterr().out.splitlines() == [
        "  path                 shape         dtype     role    in -> out",
        "  blocks/norm/scale    (2, 4)        float32   norm    -",
        "* blocks/query/kernel  (2, 4, 3, 5)  float32   kernel  2 x (4) -> (3 5)",
        "  out                  (3, 1200, 2)  bfloat16  kernel  (3 1200) -> (2)",
        "3 leaves, 7,328 parameters",
    ]


@pytest.mark.parametrize("scan", [False, True])
def test_optax_muon_takes_the_views_of_the_decoder(scan: bool):
    """Hidden kernels move by orthogonal matrices, all others as Adam moves them."""
    params = abstract(*decoder(scan))
    dims = muon_dimension_numbers(params)
    roles = {leaf.path: leaf.role for leaf in describe(params)}
    is_dims = optax.contrib.MuonDimensionNumbers
    named = jax.tree.leaves(dims, is_leaf=lambda x: isinstance(x, is_dims))
    assert len(named) == list(roles.values()).count("kernel")
    tx = optax.contrib.muon(1.0, muon_weight_dimension_numbers=dims, ns_steps=9)
    state = jax.eval_shape(tx.init, params)
    updates, _ = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    if not scan:
        return
    # The same arithmetic for real, in the form that compiles sooner.
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape).astype("f"), params)
    update = jax.jit(lambda p: tx.update(p, tx.init(p), p)[0])
    views = matrix_views(params)
    for path, u in leaves_with_paths(jax.device_get(update(params))):
        if roles[path] == "kernel":
            s = np.linalg.svd(as_matrices(u, views[path]), compute_uv=False)
            assert s.max() / s.min() < 2, path
        else:
            np.testing.assert_allclose(abs(u), abs(u).max(), rtol=1e-3)


# --- Views -----------------------------------------------------------------------


def test_view_of_and_check():
    assert MatrixView.of(2, 1) == MatrixView((-3, -2), (-1,))
    assert OUT2.stack(5) == (0, 1)
    assert MatrixView((0,), (2,)).check((3, 4, 5)) == MatrixView((-3,), (-1,))
    with pytest.raises(ValueError, match=r"axes run from -2 to 1"):
        OUT2.check((3, 4))


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_matrices_of_any_view_and_back(data: st.DataObject):
    shape, view = data.draw(shapes_and_views())
    x = np.arange(math.prod(shape)).reshape(shape)
    m = as_matrices(x, view)
    ins, outs = (math.prod(shape[a] for a in side) for side in view)
    stack = tuple(shape[a] for a in view.stack(len(shape)))
    assert m.shape == (*stack, ins, outs)
    np.testing.assert_array_equal(from_matrices(m, view, shape), x)
    # One entry, by the definition.
    index = tuple(data.draw(st.integers(0, n - 1)) for n in shape)
    at = [
        int(np.ravel_multi_index([index[a] for a in side], [shape[a] for a in side]))
        for side in view
    ]
    lead = tuple(index[a] for a in view.stack(len(shape)))
    assert m[(*lead, *at)] == x[index]


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_view_of_a_transpose(data: st.DataObject):
    shape, view = data.draw(shapes_and_views())
    order = tuple(data.draw(st.permutations(range(len(shape)))))
    x = np.arange(math.prod(shape)).reshape(shape)
    stack = [order.index(a) for a in view.stack(len(shape))]
    got = as_matrices(x.transpose(order), view.transpose(order))
    want = as_matrices(x, view)
    lead = np.argsort(np.argsort(stack))
    want = want.transpose(*np.argsort(lead), want.ndim - 2, want.ndim - 1)
    np.testing.assert_array_equal(got, want)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_the_view_of_a_reshape(data: st.DataObject):
    """Where a reshape has a view, it is of the same matrices."""
    old, view = data.draw(shapes_and_views())
    new = data.draw(reshapes(old))
    x = np.arange(math.prod(old)).reshape(old)
    after = view.reshape(old, new)
    if after is None:
        return
    got, want = as_matrices(x.reshape(new), after), as_matrices(x, view)
    assert got.shape[-2:] == want.shape[-2:]
    np.testing.assert_array_equal(got.reshape(want.shape), want)


@pytest.mark.parametrize(
    ("view", "old", "new", "wanted"),
    [
        (OUT2, (6, 2, 3), (6, 6), ROW),
        (ROW, (6, 6), (2, 3, 6), IN2),
        (OUT2, (4, 6, 2, 3), (2, 2, 6, 2, 3), OUT2),
        (ROW, (6, 4), (6, 1, 4), OUT2),
        (ROW, (6, 4), (24,), None),
        (OUT2, (4, 2, 3), (4, 3, 2), MatrixView((-3,), (-2, -1))),
        (ROW, (2, 6, 4), (12, 4), None),
        (MatrixView((-1,), (-3,)), (2, 3, 4), (2, 3, 2, 2), MatrixView((-2, -1), (0,))),
    ],
)
def test_reshapes_that_keep_roles_apart_have_a_view(
    view: MatrixView, old: Any, new: Any, wanted: MatrixView | None
):
    got = view.reshape(old, new)
    if wanted is not None and got != wanted:
        got, wanted = got.check(new), wanted.check(new)
    assert got == wanted


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_to_optax_and_back(data: st.DataObject):
    shape, view = data.draw(shapes_and_views())
    assert MatrixView.from_optax(view.to_optax(), len(shape)) == view
    dims = optax.contrib.MuonDimensionNumbers(reduction_axis=0, output_axis=1)
    assert MatrixView.from_optax(dims, 3) == MatrixView((-3,), (-2,))


@st.composite
def shapes_and_views(draw: Any) -> Any:
    """A small shape, and a view of it with its axes in any order."""
    ndim = draw(st.integers(2, 5))
    shape = tuple(draw(st.integers(1, 4)) for _ in range(ndim))
    order = draw(st.permutations(range(-ndim, 0)))
    n_in = draw(st.integers(1, ndim - 1))
    n_out = draw(st.integers(1, ndim - n_in))
    ins, outs = order[:n_in], order[n_in : n_in + n_out]
    if draw(st.booleans()):
        ins, outs = sorted(ins), sorted(outs)
    return shape, MatrixView(tuple(ins), tuple(outs))


@st.composite
def reshapes(draw: Any, old: tuple[int, ...]) -> tuple[int, ...]:
    """A shape of the same size: axes merged, split, and of size one put in."""
    new: list[int] = []
    for n in old:
        if new and draw(st.booleans()):
            n *= new.pop()
        if n in (4, 6, 8, 9, 12, 16) and draw(st.booleans()):
            factor = next(k for k in (2, 3) if n % k == 0)
            new += [factor, n // factor]
        else:
            new.append(n)
        if draw(st.integers(0, 4)) == 0:
            new.append(1)
    return tuple(new)
