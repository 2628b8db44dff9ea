# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What every optimiser must do. A new one enters by a line in `TABLE`."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import wlab
from wlab.core import is_weight, leaves_with_paths, map_with_path
from wlab.optim import (
    classp,
    drop_muon,
    eco,
    eco_muon,
    eco_sgd,
    frugal,
    lisa,
    mup,
    mup_adamw,
)
from wlab.quant import quantize_tree
from wlab.train import Checkpoints


class Entry(NamedTuple):
    """An optimiser, and the form of the parameters that it is given."""

    make: Callable[[Any], optax.GradientTransformation]  # of a learning rate
    rate: float
    form: Callable[[Any], Any]  # from dense parameters to those that it trains
    left: float  # share of the quadratic's loss that may be left after the run
    only_matrices: bool = True  # a tree without any is an error
    compact: bool = False  # its state is of parts of leaves


def packed(grid: str, **options: Any) -> Callable[[Any], Any]:
    return lambda params: quantize_tree(params, grid, **options)


def on_grid(grid: str, **options: Any) -> Callable[[Any], Any]:
    """Dense, with the values of the packed form."""
    return lambda params: wlab.materialise(quantize_tree(params, grid, **options))


def as_is(params: Any) -> Any:
    return params


def twice_as_wide(params: Any) -> Any:
    """The classes of the leaves of a model that is twice as wide as its base."""

    def width(_: str, x: Any) -> mup.Width:
        return mup.Width("matrix" if x.ndim > 1 else "vector", 2.0, 2.0)

    return map_with_path(width, params)


def over_blocks(make: Callable[..., Any]) -> Callable[[Any], Any]:
    """A transform over the stack of layers, where the tree has one."""

    def with_rate(learning_rate: Any) -> optax.GradientTransformation:
        def tx(params: Any) -> Any:
            paths = [path for path, _ in leaves_with_paths(params)]
            blocks = any(path.startswith("blocks/") for path in paths)
            return make(learning_rate, layers="blocks" if blocks else None)

        def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
            return tx(params).update(grads, state, params, **extra)

        return optax.GradientTransformationExtraArgs(lambda p: tx(p).init(p), update)

    return with_rate


TABLE = {
    "eco-fp8": Entry(eco, 0.05, on_grid("fp8_e4m3"), 0.02),
    "eco-fp8-stochastic-packed": Entry(
        lambda lr: eco(lr, rounding="stochastic"), 0.05, packed("fp8_e4m3"), 0.02
    ),
    "eco-int4-packed": Entry(
        lambda lr: eco(lr, grid="int4"),
        0.05,
        packed("int4", granularity="tensor"),
        0.15,
    ),
    "eco_sgd-exact": Entry(
        lambda lr: eco_sgd(lr, grid="int8", injection="exact"),
        0.1,
        on_grid("int8"),
        0.02,
    ),
    "eco_muon-packed": Entry(eco_muon, 0.1, packed("fp8_e4m3"), 0.15),
    "classp": Entry(lambda lr: classp(lr, 1e-6, 2.0), 0.7, as_is, 0.02, False),
    "mup_adamw": Entry(
        lambda lr: mup_adamw(lr, 1e-3, twice_as_wide), 0.1, as_is, 0.02, False
    ),
    "drop_muon": Entry(over_blocks(drop_muon), 0.1, as_is, 0.15, False),
    "lisa": Entry(
        over_blocks(functools.partial(lisa, k=2, interval=4, weight_decay=1e-3)),
        0.1,
        as_is,
        0.02,
        False,
        compact=True,
    ),
    "lisa-keep": Entry(
        over_blocks(functools.partial(lisa, k=2, interval=4, state="keep")),
        0.1,
        as_is,
        0.02,
        False,
    ),
    "frugal-block": Entry(
        lambda lr: frugal(lr, 0.5, 3), 0.05, as_is, 0.02, compact=True
    ),
    "frugal-columns": Entry(
        lambda lr: frugal(lr, 0.5, 3, projection="columns"),
        0.05,
        as_is,
        0.02,
        compact=True,
    ),
}

SPECS = {
    "up": {"kernel": jax.P(None, "model"), "bias": jax.P("model")},
    "down": {"kernel": jax.P("data", "model")},
    "blocks": {"kernel": jax.P(None, "data", "model")},
}
SHAPES = {
    "up": {"kernel": (8, 12), "bias": (12,)},
    "down": {"kernel": (12, 8)},
    "blocks": {"kernel": (3, 8, 4)},  # stacked layers
}
SMALL_TREES = {
    "scalar": {"gain": ()},
    "vector": {"dense": {"bias": (12,)}},
    "matrix": {"dense": {"kernel": (8, 12)}},
}
FEW_SHAPES = {"up": {"bias": (12,)}, "blocks": {"kernel": (3, 8, 4)}}
STEPS = 80


def random_params(seed: int, shapes: Any = SHAPES) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def make_step(tx: Any) -> Callable[..., Any]:
    """A step towards the target on the sum of squares."""

    def step(params: Any, state: Any, target: Any) -> Any:
        grads = jax.tree.map(
            lambda w, t: w - t.astype(w.dtype), wlab.materialise(params), target
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


@jax.jit
def distance(params: Any, target: Any) -> jax.Array:
    return optax.tree.norm(optax.tree.sub(wlab.materialise(params), target)) ** 2


@jax.jit
def copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


class Run:
    """One entry, its compiled step, and a run of it that the tests look at."""

    def __init__(self, entry: Entry):
        self.entry = entry
        self.tx = entry.make(entry.rate)
        self.target = random_params(1)
        self.traces = 0
        step = make_step(self.tx)

        def counted(*args: Any) -> Any:
            self.traces += 1
            return step(*args)

        self.step = jax.jit(counted, donate_argnums=(0, 1))
        self.pack = jax.jit(entry.form)
        self.init = jax.jit(self.tx.init)

    def start(self, seed: int = 0) -> tuple[Any, Any]:
        params = self.pack(random_params(seed))
        # On a device by name, as what is restored is: one program serves both.
        return jax.device_put(copy((params, self.init(params))), jax.devices()[0])

    def go(self, params: Any, state: Any, steps: int) -> tuple[Any, Any]:
        """A run; what is given stays as it is."""
        params, state = copy((params, state))
        for _ in range(steps):
            params, state = self.step(params, state, self.target)
        return params, state

    def whole(self, params: Any, target: Any, steps: int) -> tuple[Any, Any]:
        """Start and end of a run in one program, from dense parameters."""
        step = make_step(self.tx)

        @jax.jit
        def go(params: Any, target: Any) -> tuple[Any, Any]:
            start = self.entry.form(params)

            def body(_: Any, carry: Any) -> Any:
                return step(*carry, target)

            carry = jax.lax.fori_loop(0, steps, body, (start, self.tx.init(start)))
            return start, carry[0]

        return go(params, target)


@functools.cache
def run_of(name: str) -> Run:
    return Run(TABLE[name])


@pytest.fixture(params=list(TABLE))
def run(request: pytest.FixtureRequest) -> Run:
    return run_of(request.param)


# One form of each optimiser, for what its variants share.
ONE_OF_EACH = [
    "eco-fp8-stochastic-packed",
    "eco_sgd-exact",
    "eco_muon-packed",
    "classp",
    "mup_adamw",
    "drop_muon",
    "lisa",
    "frugal-columns",
]
# Placed as the others of their kind.
ALIKE = ["eco-int4-packed", "lisa-keep"]
one_of_each = pytest.mark.parametrize("run", ONE_OF_EACH, indirect=True)


def assert_same(got: Any, want: Any, tol: float = 0.0) -> None:
    """Equal trees of arrays, keys and narrow integers, to a tolerance."""
    assert jax.tree.structure(got) == jax.tree.structure(want)

    def plain(x: Any) -> np.ndarray:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return np.asarray(x, np.float64)

    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(plain(a), plain(b), rtol=tol, atol=tol)


def abstract(tree: Any) -> Any:
    return jax.eval_shape(lambda: tree)


def test_converges_on_a_quadratic(run: Run):
    start, state = run.start()
    end, _ = run.go(start, state, STEPS)
    left = distance(end, run.target) / distance(start, run.target)
    assert left < run.entry.left


@pytest.mark.parametrize("shapes", SMALL_TREES.values(), ids=SMALL_TREES)
def test_converges_on_one_leaf(run: Run, shapes: Any):
    start, target = (random_params(seed, shapes) for seed in (0, 1))
    if run.entry.only_matrices and "kernel" not in shapes.get("dense", {}):
        with pytest.raises(ValueError, match="select="):
            run.tx.init(start)
        return
    start, end = run.whole(start, target, STEPS)
    assert distance(end, target) < run.entry.left * distance(start, target)


@one_of_each
def test_eager_equals_compiled(run: Run):
    # Every op is a program, so that the tree has matrices of one shape.
    params = run.pack(random_params(0, FEW_SHAPES))
    target = random_params(1, FEW_SHAPES)

    def first(params: Any) -> Any:
        return make_step(run.tx)(params, run.tx.init(params), target)

    assert_same(first(params), jax.jit(first)(params), 1e-5)


@one_of_each
def test_hyperparameters_are_injected(run: Run):
    """The learning rate is an array of the state, and the numbers are the same."""
    params, state = run.start()
    # Said, because optax looks for a dtype of all leaves, and 4-bit codes have none.
    inject = optax.inject_hyperparams(
        lambda learning_rate: run.entry.make(learning_rate),
        hyperparam_dtype=jnp.float32,
    )
    tx = inject(learning_rate=run.entry.rate)
    step = jax.jit(make_step(tx))
    got, injected = step(params, jax.jit(tx.init)(params), run.target)
    assert_same(got, run.go(params, state, 1)[0], 1e-5)
    rate = injected.hyperparams["learning_rate"]
    injected.hyperparams["learning_rate"] = jnp.zeros_like(rate)
    still, _ = step(got, injected, run.target)
    assert_same(wlab.materialise(still), wlab.materialise(got), 1e-6)


@one_of_each
def test_multi_steps_averages_gradients(run: Run):
    """Two half batches make one step; a packed tree says what to do instead."""
    params, state = run.start()
    tx = optax.MultiSteps(run.tx, 2)
    if any(is_weight(leaf) for _, leaf in leaves_with_paths(params)):
        with pytest.raises(TypeError, match="dense"):
            jax.eval_shape(lambda p: make_step(tx)(p, tx.init(p), run.target), params)
        return
    held = jax.jit(tx.init)(params)
    start = params

    @jax.jit
    def half(held: Any, params: Any, scale: float) -> Any:
        grads = optax.tree.sub(start, run.target)
        updates, held = tx.update(optax.tree.scale(scale, grads), held, params)
        return optax.apply_updates(params, updates), held

    got, held = half(held, params, 0.5)
    assert_same(got, params)
    got, held = half(held, got, 1.5)
    assert_same(got, run.go(params, state, 1)[0], 1e-5)


def test_second_call_does_not_compile_again(run: Run):
    """Nor do shapes, dtypes or weak types of parameters and state ever change."""
    run.go(*run.start(), 2)
    assert run.traces == 1


def test_parameters_and_state_are_donated_whole(run: Run):
    """Every buffer is used again; one that cannot be is a warning, here an error."""
    params, state = run.start()
    run.step(params, state, run.target)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))


def test_unknown_extra_arguments_are_accepted(run: Run):
    params, state = map(abstract, run.start())

    def update(grads: Any, state: Any, params: Any) -> Any:
        return run.tx.update(
            grads, state, params, value=1.0, value_fn=None, unheard_of="x"
        )

    updates, new = jax.eval_shape(update, run.target, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert_same_avals(new, state)


def assert_same_avals(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)


def test_state_from_abstract_parameters(run: Run):
    params, state = run.start()
    assert_same_avals(jax.eval_shape(run.tx.init, abstract(params)), abstract(state))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_parameters_keep_their_dtype(run: Run, dtype: Any):
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(0))
    params = jax.eval_shape(run.entry.form, params)
    state = jax.eval_shape(run.tx.init, params)
    step = make_step(run.tx)
    new, new_state = jax.eval_shape(step, params, state, run.target)
    assert_same_avals(new, params)
    assert_same_avals(new_state, state)
    dense = jax.eval_shape(wlab.materialise, new)
    assert {x.dtype for x in jax.tree.leaves(dense)} == {jnp.dtype(dtype)}


def test_trees_without_leaves(run: Run):
    for tree in ({}, {"a": None, "b": optax.MaskedNode()}):
        state = run.tx.init(tree)
        updates, state = run.tx.update(tree, state, tree)
        assert updates == tree


def test_optax_finds_the_parameters_in_the_state(run: Run):
    """`optax.tree.map_params` reaches all leaves of a parameter's shape, no others."""
    params, state = run.start()
    shapes = {x.shape for x in jax.tree.leaves(wlab.materialise(params))}
    mapped = optax.tree.map_params(
        run.tx,
        lambda x: "parameter",
        state,
        transform_non_params=lambda x: x if x is None else "other",
    )
    for kind, leaf in zip(jax.tree.leaves(mapped), jax.tree.leaves(state), strict=True):
        # The parts of a leaf count as it.
        if not run.entry.compact or leaf.shape in shapes or not leaf.ndim:
            assert (kind == "parameter") == (leaf.shape in shapes)


@one_of_each
def test_seeds_under_vmap_equal_single_runs(run: Run):
    starts = [run.start(seed) for seed in (0, 1)]
    ends = [run.go(*start, 2) for start in starts]

    @jax.jit
    def stacked(trees: Any) -> Any:
        return jax.tree.map(lambda *x: jnp.stack(x), *trees)

    step = jax.jit(jax.vmap(make_step(run.tx), (0, 0, None)))
    got = stacked(starts)
    for _ in range(2):
        got = step(*got, run.target)
    assert_same(got, stacked(ends), 1e-5)


@one_of_each
def test_nnx_state_gives_the_numbers_of_a_dict(run: Run):
    def as_nnx(tree: Any) -> Any:
        nodes = {
            name: nnx.Dict({leaf: nnx.Param(x) for leaf, x in layer.items()})
            for name, layer in tree.items()
        }
        return nnx.state(nnx.Dict(nodes))

    want, _ = run.go(*run.start(), 2)
    _, params = run.whole(*(as_nnx(random_params(seed)) for seed in (0, 1)), 2)
    assert isinstance(params, nnx.State)
    got, want = (dict(leaves_with_paths(wlab.materialise(t))) for t in (params, want))
    assert_same({path: got[path] for path in want}, want, 1e-6)


def test_checkpoints_continue_to_the_same_numbers(run: Run, tmp_path: pathlib.Path):
    middle = run.go(*run.start(), 3)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, middle)
        _, back, _ = checkpoints.restore(abstract(middle))
    assert_same(run.go(*back, 3), run.go(*middle, 3))


@pytest.mark.parametrize(
    ("run", "mesh"),
    [
        *((name, "explicit") for name in TABLE if name not in ALIKE),
        *((name, "auto") for name in ONE_OF_EACH),
    ],
    indirect=True,
)
def test_mesh(run: Run, mesh: jax.sharding.Mesh):
    """One device's numbers; what has a parameter's shape is sharded as it, always."""
    start, _ = run.start()
    want = run.go(*run.start(), 2)
    # Codes, moments and buffers as the parameter; its scales likewise where they vary.
    specs = {}
    for path, leaf in leaves_with_paths(start):
        spec = dict(leaves_with_paths(SPECS))[path]
        for x in jax.tree.leaves(leaf):
            names = [p if n > 1 else None for p, n in zip(spec, x.shape, strict=True)]
            specs[x.shape] = jax.NamedSharding(mesh, jax.P(*names))

    def check(tree: Any) -> None:
        for x in jax.tree.leaves(tree):
            if x.shape in specs:
                assert x.sharding.is_equivalent_to(specs[x.shape], x.ndim), x.shape

    def place(tree: Any) -> Any:
        return jax.tree.map(lambda x: jax.device_put(x, specs[x.shape]), tree)

    with jax.set_mesh(mesh):
        params, target = place(start), place(run.target)
        # Where a compiled one puts its zeros under Auto axes is the compiler's choice.
        explicit = mesh.are_all_axes_explicit
        state = (jax.jit(run.tx.init) if explicit else run.tx.init)(params)
        check((params, state))
        step = jax.jit(make_step(run.tx))
        for _ in range(2):
            params, state = step(params, state, target)
            check((params, state))
    assert_same((params, state), want, 1e-5)
