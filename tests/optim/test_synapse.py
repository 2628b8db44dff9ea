# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Synapses: the device's curve, the three schemes, the tree in optax and in Flax.

The common table's tests are run from here, but for three: there is no learning rate
that one could inject, trees without a synapse are refused in other words, and so is
`optax.MultiSteps`, by optax itself.
"""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import wlab
from tests.optim import test_common as common
from wlab.core import leaves_with_paths
from wlab.optim import synapse

Device = synapse.Device
DEVICES = [Device(), Device(1.0), Device(0.5), Device(0.2), Device(5.0, 16.0, 2.0)]
SCHEMES = ("unidirectional", "pair", "single")


def close(got: Any, want: Any, tol: float = 1e-6) -> None:
    np.testing.assert_allclose(got, want, rtol=tol, atol=tol)


def grid(n: int = 41) -> jax.Array:
    return jnp.asarray(np.linspace(0, 1, n), jnp.float32)


# --- The device ------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES, ids=str)
def test_pulses_follow_the_closed_form(device: Device):
    """B (1 - exp(-n / AN)) in float64, pulse by pulse and several at once."""
    n, a = device.levels, device.curvature
    count = np.arange(int(n) + 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        b = 1 / (1 - np.exp(-1 / a))
        want = b * (1 - np.exp(-count / (a * n))) if np.isfinite(a) else count / n

    @jax.jit
    def three_ways(count: jax.Array) -> Any:
        def pulse(g: jax.Array, _: Any) -> Any:
            return synapse.pulse_up(g, 1, device), g

        one_by_one = jax.lax.scan(pulse, jnp.zeros(()), count)[1]
        at_once = synapse.pulse_up(jnp.zeros(len(count)), count, device)
        return synapse.response(count, device), one_by_one, at_once

    for got in three_ways(count.astype(np.float32)):
        close(got, want, 1e-5)
    assert want[-1] == pytest.approx(1)


def test_large_curvature_is_linear():
    want = np.minimum(grid() + np.float32(1 / 64), 1)
    for curvature in (1e4, 1e8, 1e25, 1e37):
        got = synapse.pulse_up(grid(), 1, Device(curvature))
        close(got, want, 1e-4 if curvature < 1e5 else 1e-6)


@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("pulses", [0, 1, 7, 1000])
def test_down_mirrors_up_within_bounds(device: Device, pulses: int):
    g = np.asarray(grid())
    up, down, mirrored = (
        np.asarray(f(x, pulses, device))
        for f, x in (
            (synapse.pulse_up, g),
            (synapse.pulse_down, g),
            (synapse.pulse_up, 1 - g),
        )
    )
    close(down, 1 - mirrored)
    assert ((up >= g) & (up <= 1) & (down <= g) & (down >= 0)).all()
    if not pulses:
        np.testing.assert_array_equal(up, g)
        np.testing.assert_array_equal(down, g)


def test_steps_shrink_with_the_state_where_the_device_is_bent():
    def steps(device: Device) -> np.ndarray:
        return (np.asarray(synapse.pulse_up(grid(), 1, device)) - grid())[:-4]

    close(steps(Device()), np.full(37, 1 / 64), 1e-6)
    assert (np.diff(steps(Device(0.5))) < 0).all()


def test_devices_differ_within_their_bounds(key: jax.Array):
    device = synapse.vary(key, Device(2.0, 64.0), (200, 100), 0.5)
    for x, nominal in ((device.curvature, 2.0), (device.levels, 64.0)):
        part = np.asarray(x) / np.float32(nominal)
        assert part.shape == (200, 100) and part.max() < 3.1
        assert part.min() == np.float32(0.2)
        assert np.median(part) == pytest.approx(1, abs=0.02)
    assert (
        abs(np.corrcoef(np.ravel(device.curvature), np.ravel(device.levels))[0, 1])
        < 0.05
    )
    assert device.w_max == 1.0


# --- One update ------------------------------------------------------------------


def made(scheme: Any, device: Any = Device(1.0), seed: int = 0) -> synapse.Synapse:  # noqa: B008
    return synapse.init_conductance(jax.random.key(seed), (6, 5), device, scheme)


def error(seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(6, 5)).astype(np.float32)


def update(w: synapse.Synapse, e: Any, *args: Any, **options: Any) -> synapse.Synapse:
    return jax.jit(lambda w, e: synapse.synapse_update(w, e, *args, **options))(w, e)


def dense(w: synapse.Synapse) -> np.ndarray:
    return np.asarray(wlab.materialise(w))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_start_and_bounds(scheme: Any):
    w = made(scheme)
    low, high = (0, 0.1) if scheme == "unidirectional" else (0.4, 0.6)
    plus = np.asarray(w.plus)
    assert low <= plus.min() and plus.max() <= high
    if scheme == "single":
        close(w.minus, np.full((6, 5), 0.5))
    errors = np.stack([error(seed % 3) for seed in range(300)])

    @jax.jit
    def run(w: Any, errors: jax.Array) -> Any:
        def step(w: Any, e: jax.Array) -> Any:
            w = synapse.synapse_update(w, e, 0.2, scheme)
            return w, (w.plus, w.minus)

        return jax.lax.scan(step, w, errors)[1]

    for g in map(np.asarray, run(w, errors)):
        assert g.min() >= 0 and g.max() <= 1


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("max_pulses", [1, 4])
def test_under_the_threshold_nothing_moves(scheme: Any, max_pulses: int):
    w, e = made(scheme), error()
    step = jax.jit(
        lambda w, e, threshold: synapse.synapse_update(
            w, e, threshold, scheme, max_pulses=max_pulses
        )
    )
    new = step(w, e, 0.5)
    under = np.abs(e) <= 0.5
    for old, g in ((w.plus, new.plus), (w.minus, new.minus)):
        np.testing.assert_array_equal(np.asarray(g)[under], np.asarray(old)[under])
    moved = dense(new) - dense(w)
    assert (np.sign(moved)[~under] == np.sign(e)[~under]).all()
    chex.assert_trees_all_equal(step(w, 0 * e, 0.0), w)
    chex.assert_trees_all_equal(step(w, np.full_like(e, 0.5), 0.5), w)


def test_unidirectional_only_raises():
    w = made("unidirectional")
    new = update(w, error(), 0.1, "unidirectional")
    plus, minus = (
        np.asarray(a) - np.asarray(b)
        for a, b in ((new.plus, w.plus), (new.minus, w.minus))
    )
    assert (plus >= 0).all() and (minus >= 0).all()
    assert ((plus > 0) == (error() > 0.1)).all()
    assert ((minus > 0) == (error() < -0.1)).all()


@pytest.mark.parametrize("scheme", ["unidirectional", "pair"])
def test_swapping_the_pair_and_the_error_turns_the_weight(scheme: Any):
    w = made(scheme)
    swapped = synapse._with(w, w.minus, w.plus)
    a = update(w, error(), 0.1, scheme)
    b = update(swapped, -error(), 0.1, scheme)
    close(dense(a), -dense(b))


@pytest.mark.parametrize(("scheme", "steps"), [("unidirectional", 1), ("pair", 2)])
def test_linear_devices_do_signed_sgd(scheme: Any, steps: int):
    device = Device(levels=1000.0, w_max=3.0)
    w = made(scheme, device)
    want = dense(w)
    step = jax.jit(lambda w, e: synapse.synapse_update(w, e, 0.3, scheme))
    for seed in range(5):
        e = error(seed)
        w = step(w, e)
        want = want + np.where(np.abs(e) > 0.3, np.sign(e), 0) * steps * 3 / 1000
    close(dense(w), want)


def test_several_pulses_are_the_rounded_share_of_the_threshold():
    device = Device(0.5)
    w = synapse.Synapse(
        jnp.zeros(5), jnp.zeros(5), synapse._pair(device, (5,), ""), jnp.float32
    )
    e = jnp.array([0.05, 0.101, 0.26, -0.34, 9.0])
    new = synapse.synapse_update(w, e, 0.1, max_pulses=4)
    close(new.plus, synapse.response(jnp.array([0.0, 1, 3, 0, 4]), device))
    close(new.minus, synapse.response(jnp.array([0.0, 0, 0, 3, 0]), device))


@pytest.mark.parametrize("w_max", [1.0, 0.7])
def test_refresh_keeps_the_weight_to_the_bit(w_max: float):
    w = made("unidirectional", Device(1.0, w_max=w_max))
    w = synapse._with(w, w.plus.at[0].set(0.985), w.minus.at[1:3].set(1.0))
    new = synapse.refresh(w, 0.98)
    chex.assert_trees_all_equal(wlab.materialise(new), wlab.materialise(w))
    assert (new.minus[0] == 0).all() and (new.plus[1:3] == 0).all()
    chex.assert_trees_all_equal(new.plus[3:], w.plus[3:])
    coarse = synapse.refresh(w, 0.98, whole_pulses=True)
    pulses = synapse._pulses_to(coarse.plus, w.device[0])[0]
    close(pulses, jnp.round(pulses), 1e-3)
    off = wlab.materialise(coarse) - wlab.materialise(w)
    assert 0 < jnp.abs(off).max() < 1.6 / 64


def test_refresh_of_unlike_devices_keeps_the_weight():
    pair = (Device(w_max=1.0), Device(w_max=0.8))
    w = made("unidirectional", pair)
    w = synapse._with(w, w.plus.at[0].set(1.0), w.minus.at[1].set(1.0))
    new = synapse.refresh(w)
    close(wlab.materialise(new), wlab.materialise(w))
    assert (new.minus[0] == 0).all() and (new.plus[1] == 0).all()


# --- The tree --------------------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES)
def test_pack_writes_weights(scheme: Any):
    w = jnp.linspace(-0.9, 0.9, 12).reshape(3, 4)
    params = {"dense": {"kernel": w.astype(jnp.bfloat16), "bias": jnp.ones(4)}}
    pair = (Device(w_max=2.0), Device(w_max=1.9))
    packed = synapse.pack(params, pair, scheme)
    leaf = packed["dense"]["kernel"]
    assert isinstance(leaf, wlab.Weight) and leaf.dtype == jnp.bfloat16
    assert leaf.plus.dtype == jnp.float32
    assert packed["dense"]["bias"] is params["dense"]["bias"]
    close(
        leaf.materialise().astype(jnp.float32),
        w.astype(jnp.bfloat16).astype("f4"),
        5e-3,
    )
    over = synapse.pack({"kernel": jnp.array([[9.0, -9.0]])}, Device(w_max=0.5), scheme)
    high = 0.25 if scheme == "single" else 0.5
    close(wlab.materialise(over)["kernel"], [[high, -high]])


def test_pack_draws_conductances_and_devices(key: jax.Array):
    params = {n: {"kernel": jnp.ones((40, 30))} for n in ("a", "b")}
    packed = synapse.pack(params, Device(1.0), "pair", key=key, sigma=0.2)
    a, b = (packed[n]["kernel"] for n in ("a", "b"))
    drawn = [a.plus, a.minus, b.plus, *(d.levels / 320 for d in (*a.device, *b.device))]
    for i, x in enumerate(drawn):
        for y in drawn[:i]:
            assert abs(np.corrcoef(np.ravel(x), np.ravel(y))[0, 1]) < 0.2
    nominal = synapse.pack(params, Device(1.0), "pair", key=key)
    chex.assert_trees_all_equal(nominal["a"]["kernel"].plus, a.plus)


class Net(nn.Module):
    """A user's own model, not written for wlab."""

    scan: bool = False

    @nn.compact
    def __call__(self, x: Any) -> Any:
        x = nn.Conv(4, (2, 2), name="conv")(x).reshape(len(x), -1)
        x = nn.Dense(6, name="first")(x)
        if self.scan:
            layer = lambda m, x, _: (nn.relu(m(x)), None)  # noqa: E731
            dense = nn.Dense(6, name="stack")
            x, _ = nn.scan(
                layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )(dense, x, None)
        return nn.DenseGeneral((2, 3), name="last")(nn.relu(x))


@pytest.mark.parametrize("scan", [False, True])
def test_a_flax_model_runs_and_learns_on_them(scan: bool, key: jax.Array):
    rng = np.random.default_rng(0)
    x, target = (rng.normal(size=s).astype("f4") for s in ((8, 3, 3, 2), (8, 2, 3)))
    model = Net(scan)
    params = jax.jit(model.init)(key, x)["params"]
    device = Device(w_max=2.0, levels=128.0)
    packed = jax.jit(lambda p: synapse.pack(p, device, "pair"))(params)
    names = [p for p, w in leaves_with_paths(packed) if isinstance(w, synapse.Synapse)]
    assert len(names) == 3 + scan and all(n.endswith("kernel") for n in names)

    @jax.jit
    def outputs(params: Any, packed: Any) -> Any:
        weights = packed, wlab.materialise(packed), params
        return [wlab.lift(model.apply)({"params": w}, x) for w in weights]

    got, want, unpacked = outputs(params, packed)
    close(got, want, 1e-5)
    close(got, unpacked, 1e-4)

    loss = lambda p: jnp.mean((model.apply({"params": p}, x) - target) ** 2)  # noqa: E731
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        synapse.synapse({"last*": 0.02, "*": 0.01}, "pair", rest=optax.adam(0.01)),
    )

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(wlab.materialise(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    state = jax.jit(tx.init)(packed)
    trained, losses = packed, []
    for _ in range(40):
        trained, state, value = step(trained, state)
        losses.append(float(value))
    assert losses[-1] < 0.7 * losses[0]
    assert state[1].count == 40 and state[1].pulses > 0 and state[1].refreshed == 0


def test_updates_are_the_map_and_the_refresh_has_its_turn():
    params = {"kernel": made("unidirectional")}
    tx = synapse.synapse(0.1, refresh_every=3, refresh_level=0.5)
    state, want = jax.jit(tx.init)(params), params["kernel"]

    @jax.jit
    def step(params: Any, state: Any, want: Any, i: Any, e: Any) -> Any:
        updates, state = tx.update({"kernel": -e}, state, params)
        params = optax.apply_updates(params, updates)
        want = synapse.synapse_update(want, e, 0.1)
        refreshed = synapse.refresh(want, 0.5)
        turn = i % 3 == 2
        want = jax.tree.map(lambda a, b: jnp.where(turn, a, b), refreshed, want)
        return params, state, want

    for i in range(120):
        params, state, want = step(params, state, want, i, error(i % 2))
        chex.assert_trees_all_close(params["kernel"], want, atol=1e-6)
        plus, minus = (np.asarray(getattr(want, n)) for n in ("plus", "minus"))
        assert plus.max() <= 1 and minus.min() >= 0
    sent = sum(int((np.abs(error(s)) > 0.1).sum()) for s in (0, 1)) * 60
    assert state.pulses == sent and state.refreshed > 30


# --- The common table ------------------------------------------------------------

TABLE = {
    "unidirectional": common.Entry(
        lambda lr: synapse.synapse(0.05, refresh_every=4, rest=optax.sgd(lr)),
        0.1,
        lambda p: synapse.pack(p, Device(2.0, w_max=8.0), "unidirectional"),
        0.02,
    ),
    "pair": common.Entry(
        lambda lr: synapse.synapse({"*": 0.05}, "pair", rest=optax.adam(lr)),
        0.1,
        lambda p: synapse.pack(p, Device(w_max=4.0, levels=100.0), "pair"),
        0.02,
    ),
}
CHECKS = [
    getattr(common, name)
    for name in vars(common)
    if name.startswith("test_")
    and name
    not in (
        "test_hyperparameters_are_injected",
        "test_converges_on_one_leaf",
        "test_multi_steps_averages_gradients",
    )
]


@functools.cache
def run_of(name: str) -> common.Run:
    return common.Run(TABLE[name])


@pytest.mark.parametrize("name", list(TABLE))
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__[5:])
def test_common(name: str, check: Any, request: pytest.FixtureRequest):
    code = check.__code__
    arguments = code.co_varnames[: code.co_argcount]
    given = {"run": run_of(name), "dtype": jnp.bfloat16}
    if "mesh" in arguments:
        for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
            mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
            check(run=given["run"], mesh=mesh)
        return
    check(
        **{a: given[a] if a in given else request.getfixturevalue(a) for a in arguments}
    )


def test_specs_follow_the_weight():
    w = made("pair", Device(jnp.ones((6, 1)), jnp.full((5,), 64.0)))
    specs = w.specs(jax.P("data", "model"))
    assert specs.plus == specs.minus == jax.P("data", "model")
    assert specs.device[0].curvature == jax.P("data", None)
    assert specs.device[1].levels == jax.P(None, "model")
    assert specs.device[1].w_max == jax.P(None, None)


# --- The network of the hardware -------------------------------------------------


def test_neuron_and_its_derivative_of_one_bit():
    z = jnp.array([-3.0, -1.0, -0.5, 0.0, 0.9, 1.0, 2.0])
    close(synapse.hard_sigmoid(z), [0, 0, 0.25, 0.5, 0.95, 1, 1])
    grads = jax.vmap(jax.grad(synapse.hard_sigmoid))(z)
    chex.assert_trees_all_equal(grads, jnp.array([0.0, 0, 1, 1, 1, 0, 0]))


def test_saturated_outputs_learn_where_they_are_wrong():
    z, t = jnp.array([2.0, 2.0, -2.0, 0.5]), jnp.array([1.0, 0.0, 0.6, 1.0])
    value, grad = jax.value_and_grad(synapse.hardware_loss)(z, t)
    assert value == pytest.approx((1 + 0.36 + 0.0625) / 2)
    close(grad, [0, 1, -0.6, -0.25])


def test_backward_is_input_times_gated_error():
    """The gradient of the network is minus x d, with d as the hardware has it."""
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=s).astype("f4") for s in [(5, 7), (8, 3)])
    x, t = rng.uniform(size=4).astype("f4"), np.array([0, 1, 0], np.float32)

    def loss(w: Any) -> Any:
        return synapse.hardware_loss(synapse.hardware_mlp(w, x), t)

    def coarse_output(w: Any) -> Any:
        return synapse.hardware_mlp(w, x, pwm_levels=4)

    @jax.jit
    def run(w: Any) -> Any:
        slopes = jax.grad(lambda w: coarse_output(w).sum())(w)
        return jax.grad(loss)(w), coarse_output(w), slopes

    got, coarse, slopes = run((first, second))
    xb = np.append(x, 1)
    z1 = xb @ first
    h = np.append(np.clip(z1 / 2 + 0.5, 0, 1), 1)
    z2 = h @ second
    o = np.clip(z2 / 2 + 0.5, 0, 1)
    d2 = (t - o) * ((np.abs(z2) < 1) | (np.abs(t - o) > 0.5))
    d1 = (second[:-1] @ d2) * (np.abs(z1) < 1)
    close(-np.asarray(got[0]), np.outer(xb, d1), 1e-5)
    close(-np.asarray(got[1]), np.outer(h, d2), 1e-5)
    close(
        coarse,
        np.append(
            np.round(
                np.clip(np.append(np.round(x * 4) / 4, 1) @ first / 2 + 0.5, 0, 1) * 4
            )
            / 4,
            1,
        )
        @ second,
        1e-5,
    )
    assert np.any(slopes[0])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_online_training_is_a_loop_over_examples(scheme: Any):
    layers = [
        synapse.init_conductance(jax.random.key(i), s, Device(2.0), scheme)
        for i, s in enumerate([(5, 6), (7, 2)])
    ]
    x = np.random.default_rng(5).uniform(size=(23, 4)).astype(np.float32)
    t = np.eye(2, dtype=np.float32)[x.argmax(-1) % 2]
    got = jax.jit(
        lambda w: synapse.train_online(
            w, x, t, (0.02, 0.1), scheme, refresh_every=5, refresh_level=0.2
        )
    )(layers)

    @jax.jit
    def step(layers: Any, x: jax.Array, t: jax.Array, turn: Any) -> Any:
        grads = jax.grad(
            lambda w: synapse.hardware_loss(synapse.hardware_mlp(w, x), t)
        )([w.materialise() for w in layers])
        new = []
        for w, g, theta in zip(layers, grads, (0.02, 0.1), strict=True):
            w = synapse.synapse_update(w, -g, theta, scheme)
            if scheme == "unidirectional":
                refreshed = synapse.refresh(w, 0.2)
                w = jax.tree.map(lambda a, b: jnp.where(turn, a, b), refreshed, w)
            new.append(w)
        return new

    want = layers
    for i in range(23):
        want = step(want, x[i], t[i], i % 5 == 4)
    chex.assert_trees_all_close(got, tuple(want), atol=1e-5)
    assert not np.allclose(got[0].plus, layers[0].plus)


# --- Bad input -------------------------------------------------------------------

PARAMS = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: synapse.synapse(0.1, "both"), "scheme 'both' is none of"),
        (lambda: synapse.synapse(0.1, max_pulses=0), "max_pulses=0 must be"),
        (lambda: synapse.synapse(0.1, refresh_every=0), "refresh_every=0 must be"),
        (lambda: synapse.pack(PARAMS, which="*kernl"), "matches no leaf"),
        (lambda: synapse.pack({"bias": jnp.ones(2)}), "name the leaves with which="),
        (lambda: synapse.pack(PARAMS, sigma=0.1), "sigma=0.1 draws devices"),
        (
            lambda: synapse.pack(synapse.pack(PARAMS)),
            r"'dense/kernel' of shape \(3, 2\) is a Synapse already",
        ),
        (
            lambda: synapse.pack(PARAMS, Device(levels=jnp.ones(3))),
            r"'dense/kernel' .*levels of shape \(3,\) does not broadcast",
        ),
        (
            lambda: synapse.synapse(0.1).init(synapse.pack(PARAMS)),
            r"'dense/bias' of shape \(2,\) is no Synapse: pass rest=",
        ),
        (
            lambda: synapse.synapse({"*other": 1}).init(
                synapse.pack(PARAMS, which="*")
            ),
            r"pattern '\*other' matches no leaf",
        ),
        (
            lambda: synapse.synapse({"*bias": 1}).init(synapse.pack(PARAMS, which="*")),
            r"'dense/kernel' has no threshold \(1 such",
        ),
        (lambda: synapse.synapse_update(made("pair"), jnp.ones(3), 0.1), "has shape"),
        (
            lambda: synapse.vary(jax.random.key(0), Device(), (3,), fields=("A",)),
            "a Device has no 'A'",
        ),
        (lambda: synapse.train_online([], None, None, [0.1]), "1 thresholds for 0"),  # type: ignore[arg-type]
    ],
)
def test_bad_values_are_told(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_gradients_are_told():
    params = synapse.pack(PARAMS, which="*kernel")
    tx = synapse.synapse(0.1, rest=optax.sgd(0.1))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"'dense/kernel'.* wlab\.materialise"):
        tx.update(params, state, params)
    short = {"dense": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}}
    with pytest.raises(ValueError, match=r"'dense/kernel' is of shape \(2, 2\); the"):
        tx.update(short, state, params)
    with pytest.raises(ValueError, match=r"call update\(\.\.\., params\)"):
        tx.update(PARAMS, state)
