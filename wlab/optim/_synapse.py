# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""Learning on pairs of electronic synapses, by single pulses (a transform).

A weight is the difference of two conductances in [0, 1],
:math:`w = w_\max (g^+ - g^-)`. A pulse moves one of them by a step that its own state
decides: of a device that goes from 0 to 1 in :math:`N` pulses along
:math:`B (1 - e^{-n / AN})`,

.. math::

    g \leftarrow \min\bigl(B - (B - g)\, e^{-1 / AN},\ 1\bigr), \qquad
    B = \frac{1}{1 - e^{-1 / A}}

raises it, and the mirror image lowers it; :math:`A = \infty` is linear. Which synapses
get a pulse is decided by the sign of input times error against a threshold, and by the
scheme:

- *unidirectional*: only ever up, :math:`g^+` to raise the weight and :math:`g^-` to
  lower it; where one is full, both are written anew with their difference kept;
- *pair*: one up, the other down;
- *single*: :math:`g^-` stays at one half, :math:`g^+` goes up or down.

`Synapse` is a structured weight: any Flax model runs on a tree of them by `wlab.lift`
or `wlab.materialise`, and `synapse` trains such a tree through optax. The second part
is a network whose forward and backward pass are those of the hardware, trained one
example at a time.

The paper's full text could not be had: the rule (fixed pulses by sign and threshold, in
one direction) is its own; the response curves, the neuron's derivative of one bit and
the refresh are from the literature on such devices, and are arguments.

References:
    Lim, Bae, Eum, Lee, Kim, Kwon, Park and Lee, `Adaptive Learning Rule for
    Hardware-based Deep Neural Networks Using Electronic Synapse Devices
    <https://arxiv.org/abs/1707.06381>`_, 2017.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from wlab.core import (
    MatrixView,
    Pattern,
    Select,
    Weight,
    describe,
    fold_path,
    leaves_with_paths,
    map_with_path,
    select,
    typed_key,
)
from wlab.core._tree import matching

Scheme = Literal["unidirectional", "pair", "single"]
_SCHEMES = ("unidirectional", "pair", "single")


class Device(NamedTuple):
    """A device, or one for each synapse: arrays that broadcast to the weight's shape.

    What a smallest conductance adds to both of a pair cancels in the weight.
    """

    curvature: Any = jnp.inf  # A: inf is linear, 1 mild, 0.5 strong, 0.2 extreme
    levels: Any = 64.0  # N: pulses from empty to full
    w_max: Any = 1.0  # weight of a full conductance


_LINEAR = Device()


class Synapse(Weight):
    """The array ``w_max (plus - minus)`` of two conductances; see `pack`."""

    plus: jax.Array  # float32, in [0, 1], of the weight's shape
    minus: jax.Array  # likewise
    device: tuple[Device, Device]  # of plus and minus, each axis whole or of size one
    dense_dtype: Any = eqx.field(static=True)  # of the array that this stands for
    matrix_view: MatrixView | None = eqx.field(static=True, default=None)

    @property
    def view(self) -> MatrixView | None:
        """The axes read and written, if they are known."""
        return self.matrix_view

    def aval(self) -> jax.core.ShapedArray:
        """Shape and dtype, for jax."""
        return jax.core.ShapedArray(self.plus.shape, self.dense_dtype)

    def materialise(self) -> jax.Array:
        """The dense array."""
        up, down = (d.w_max for d in self.device)
        return (up * (self.plus - self.minus * (down / up))).astype(self.dense_dtype)

    def specs(self, spec: jax.P) -> "Synapse":
        """Every array as the weight itself, but for axes that it has not."""
        entries = [*spec, *[None] * (self.ndim - len(spec))]

        def of(x: jax.Array) -> jax.P:
            pairs = zip(entries, x.shape, self.shape, strict=True)
            return jax.P(*(entry if n == m else None for entry, n, m in pairs))

        return jax.tree.map(of, self)


class SynapseState(NamedTuple):
    """State of `synapse`: the conductances are the parameters themselves."""

    count: jax.Array  # int32, steps taken
    pulses: jax.Array  # float32, pulses sent so far
    refreshed: jax.Array  # float32, synapses written anew so far
    rest: optax.OptState  # of the optimiser of what is no synapse


# --- The device -------------------------------------------------------------------


def response(pulses: ArrayLike, device: Device) -> jax.Array:
    """The conductance after so many pulses up from empty.

    Args:
        pulses: how many, any shape.
        device: arrays that broadcast against it.

    Returns:
        Conductances, without the bound at 1.

    Examples:
        >>> print(response(jnp.array([0.0, 32.0, 64.0]), Device(curvature=1.0)))
        [0.         0.62245935 1.        ]
    """
    inverse = 1 / jnp.asarray(device.curvature, _dtype(device.curvature))
    part = jnp.asarray(pulses) / jnp.asarray(device.levels, inverse.dtype)
    # expm1: differences of exponentials vanish in the rounding where A is large.
    bent = jnp.where(inverse > _FLAT, inverse, 1.0)
    return jnp.where(
        inverse > _FLAT, jnp.expm1(-part * bent) / jnp.expm1(-bent), part + 0 * bent
    )


def pulse_up(conductance: jax.Array, pulses: ArrayLike, device: Device) -> jax.Array:
    """The conductance after pulses that raise it, from any state, in closed form.

    Args:
        conductance: in [0, 1].
        pulses: how many, a number or an array; booleans are a mask.
        device: arrays that broadcast against both.

    Returns:
        Conductances in [0, 1], of the given dtype; where there is no pulse, the same to
        the bit.
    """
    pulses = jnp.asarray(pulses)
    # Of a mask the step is that of one pulse: a number for each device, no array.
    n = jnp.ones((), bool) if pulses.dtype == bool else pulses
    n = n.astype(conductance.dtype)
    device = jax.tree.map(lambda x: jnp.asarray(x, conductance.dtype), device)
    # B - (B - g) k^n, with B (1 - k^n) as the response from empty, which is finite.
    fall = -jnp.expm1(-n / (device.curvature * device.levels))
    raised = conductance + response(n, device) - conductance * fall
    return jnp.where(pulses > 0, jnp.minimum(raised, 1), conductance)


def pulse_down(conductance: jax.Array, pulses: ArrayLike, device: Device) -> jax.Array:
    """The mirror image of `pulse_up`: ``1 - pulse_up(1 - conductance)``.

    Args:
        conductance: as in `pulse_up`.
        pulses: as in `pulse_up`.
        device: as in `pulse_up`.

    Returns:
        As `pulse_up` does.
    """
    lowered = 1 - pulse_up(1 - conductance, pulses, device)
    return jnp.where(jnp.asarray(pulses) > 0, lowered, conductance)


def vary(
    key: jax.Array,
    device: Device,
    shape: Sequence[int],
    sigma: float = 0.2,
    *,
    fields: Sequence[str] = ("curvature", "levels"),
    low: float = 0.2,
    high: float = 3.0,
) -> Device:
    """Devices that differ from one to the next.

    Args:
        key: a random key; another one for `plus` than for `minus`.
        device: the nominal one.
        shape: of the weight.
        sigma: standard deviation, in parts of the nominal value.
        fields: what differs.
        low: the least that may be drawn, in parts of the nominal value.
        high: the most.

    Returns:
        The device with arrays of `shape` in these fields.

    Raises:
        ValueError: for a field that a device has not.
    """
    for name in fields:
        if name not in Device._fields:
            raise ValueError(f"a Device has no {name!r}, but {Device._fields}")
    drawn = {}
    for i, name in enumerate(fields):
        normal = jax.random.normal(jax.random.fold_in(key, i), tuple(shape))
        drawn[name] = jnp.clip(1 + sigma * normal, low, high) * getattr(device, name)
    return device._replace(**drawn)


# --- Synapses ---------------------------------------------------------------------


def init_conductance(
    key: jax.Array,
    shape: Sequence[int],
    device: Device | tuple[Device, Device] = _LINEAR,
    scheme: Scheme = "unidirectional",
    *,
    dtype: Any = jnp.float32,
) -> Synapse:
    """A synapse for each weight, nearly empty or about half full.

    Args:
        key: a random key.
        shape: of the weight.
        device: of both of a pair, or one for each.
        scheme: "unidirectional" draws both in [0, 0.1]; "pair" and "single" in
            [0.4, 0.6], the latter with one half for the reference.
        dtype: of the array that it stands for.

    Returns:
        The weight.

    Raises:
        ValueError: for an unknown scheme, or a device of another shape.
    """
    _check_scheme(scheme)
    low, high = (0.0, 0.1) if scheme == "unidirectional" else (0.4, 0.6)
    plus, minus = (
        jax.random.uniform(k, tuple(shape), minval=low, maxval=high)
        for k in jax.random.split(key)
    )
    if scheme == "single":
        minus = jnp.full_like(minus, 0.5)
    return Synapse(plus, minus, _pair(device, tuple(shape), ""), np.dtype(dtype))


def pack(
    params: Any,
    device: Device | tuple[Device, Device] = _LINEAR,
    scheme: Scheme = "unidirectional",
    *,
    which: Select | None = None,
    key: jax.Array | int | None = None,
    sigma: float = 0.0,
) -> Any:
    """A tree whose chosen leaves are synapses.

    Args:
        params: dense parameters.
        device: of both of a pair, or one for each; numbers, or arrays that broadcast
            against every chosen leaf.
        scheme: as `synapse` is to train them.
        which: the leaves, as in `wlab.core.select`; None: kernels of linear layers and
            convolutions, not embeddings, head, norms or biases.
        key: None writes the given weights, those over `w_max` as that: with "pair" and
            "single" around one half, with "unidirectional" one of a pair stays empty. A
            key or a seed draws them anew, as `init_conductance` does.
        sigma: if not zero, every device differs by `vary`; it needs a key.

    Returns:
        The tree with a `Synapse` for each of these leaves.

    Raises:
        ValueError: for an unknown scheme, a pattern (or nothing) that matches no leaf,
            a leaf that is a structured weight already, `sigma` without a key, a device
            whose arrays do not fit a leaf.

    Examples:
        >>> params = {"dense": {"kernel": jnp.array([[0.5, -0.25]]), "bias": 0.0}}
        >>> packed = pack(params, Device(w_max=2.0))
        >>> packed["dense"]["kernel"].plus.tolist()
        [[0.25, 0.0]]
        >>> packed["dense"]["kernel"].materialise().tolist()
        [[0.5, -0.25]]
    """
    _check_scheme(scheme)
    if sigma and key is None:
        raise ValueError(f"sigma={sigma} draws devices: pass key= as well")
    key = None if key is None else typed_key(key)
    leaves = {leaf.path: leaf for leaf in describe(params)}
    chosen = {p for p, leaf in leaves.items() if leaf.role in ("kernel", "conv")}
    if which is not None:
        chosen = {p for p, hit in leaves_with_paths(select(params, which)) if hit}
    if not chosen:
        raise ValueError(
            "no leaf looks like the kernel of a layer: name the leaves with which= "
            "(wlab.explain(params) lists them)"
        )

    def convert(path: str, w: Any) -> Any:
        if path not in chosen:
            return w
        if isinstance(w, Weight):
            raise ValueError(
                f"leaf {path!r} of shape {w.shape} is a {type(w).__name__} already: "
                "pack dense parameters (wlab.materialise)"
            )
        shape, dtype = jnp.shape(w), jnp.result_type(w)
        devices = _pair(device, shape, path)
        if key is not None:
            own, *ks = jax.random.split(fold_path(key, path), 3)
            if sigma:
                of_plus, of_minus = devices
                devices = (
                    vary(ks[0], of_plus, shape, sigma),
                    vary(ks[1], of_minus, shape, sigma),
                )
            new = init_conductance(own, shape, devices, scheme, dtype=dtype)
            plus, minus = new.plus, new.minus
        else:
            plus, minus = _write(jnp.asarray(w, jnp.float32), devices, scheme)
        return Synapse(plus, minus, devices, np.dtype(dtype), leaves[path].view)

    return map_with_path(convert, params)


def synapse_update(
    weight: Synapse,
    error: jax.Array,
    threshold: ArrayLike,
    scheme: Scheme = "unidirectional",
    *,
    max_pulses: int = 1,
) -> Synapse:
    """The weight after the pulses that an error sends (a map).

    Args:
        weight: the conductances.
        error: the direction in which the weight should go, such as input times the
            error of the output: the negative gradient; of the weight's shape.
        threshold: where the error's size is over it there is a pulse.
        scheme: which conductances get it.
        max_pulses: 1 sends a single pulse. More send as many as the error has
            thresholds, rounded, up to so many.

    Returns:
        The weight with new conductances.

    Raises:
        ValueError: for an unknown scheme, or an error of another shape.
    """
    _check_scheme(scheme)
    if error.shape != weight.shape:
        raise ValueError(
            f"the error has shape {error.shape}, the weight {weight.shape}"
        )
    n = _pulses(error.astype(weight.plus.dtype), threshold, max_pulses)
    zero = jnp.zeros((), n.dtype)
    up, down = jnp.where(error > 0, n, zero), jnp.where(error < 0, n, zero)
    plus, minus = weight.plus, weight.minus
    of_plus, of_minus = weight.device
    if scheme == "unidirectional":
        plus, minus = pulse_up(plus, up, of_plus), pulse_up(minus, down, of_minus)
    else:
        plus = pulse_down(pulse_up(plus, up, of_plus), down, of_plus)
        if scheme == "pair":
            minus = pulse_down(pulse_up(minus, down, of_minus), up, of_minus)
    return _with(weight, plus, minus)


def refresh(
    weight: Synapse, level: ArrayLike = 0.98, *, whole_pulses: bool = False
) -> Synapse:
    """Writes full pairs anew, with one of the two empty and their difference kept.

    Args:
        weight: the conductances.
        level: a pair is full where one of it is at this or over it.
        whole_pulses: whether the new value is that of the nearest number of pulses from
            empty, as a device would be written, not the exact one.

    Returns:
        The weight with new conductances.
    """
    plus, minus, full = _refreshed(weight, level, whole_pulses)
    return _with(
        weight,
        jnp.where(full, plus, weight.plus),
        jnp.where(full, minus, weight.minus),
    )


def synapse(
    threshold: ArrayLike | Mapping[Pattern, ArrayLike],
    scheme: Scheme = "unidirectional",
    *,
    max_pulses: int = 1,
    refresh_every: int = 10,
    refresh_level: ArrayLike = 0.98,
    whole_pulses: bool = False,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Trains synapses by pulses, from gradients; there is no learning rate.

    The parameters are a tree with `Synapse` leaves, as `pack` makes it; gradients are
    taken at ``wlab.materialise(params)``, and updates are differences of conductances,
    which `optax.apply_updates` adds. What is in front sees gradients only: a clip or a
    scale changes what passes the threshold.

    The paper's thresholds are for one example at a time. The mean over a batch is
    smaller, and has its own.

    Gradients of several batches are to be averaged before: `optax.MultiSteps` sums them
    in the parameters' own structure, which gradients of synapses have not.

    Args:
        threshold: of a gradient's size, over which there is a pulse; or one for each
            pattern of paths, the first that matches a leaf.
        scheme: which conductances get the pulse.
        max_pulses: as in `synapse_update`.
        refresh_every: steps from one `refresh` to the next, in the unidirectional
            scheme.
        refresh_level: as in `refresh`.
        whole_pulses: as in `refresh`.
        rest: the optimiser of all other leaves; None where there are none.

    Returns:
        A gradient transformation that takes any extra arguments.

    Raises:
        ValueError: at build time for values out of range; at `init` and `update` for a
            pattern that matches no leaf, a synapse without a threshold, leaves without
            an optimiser, gradients that do not fit; each names the leaf.

    Examples:
        >>> import wlab
        >>> params = pack({"kernel": jnp.array([[0.5, -0.25]])}, Device(levels=10))
        >>> tx = synapse(0.1)
        >>> state = tx.init(params)
        >>> grads = {"kernel": jnp.array([[-3.0, 0.05]])}
        >>> updates, state = tx.update(grads, state, params)
        >>> params = optax.apply_updates(params, updates)
        >>> print(wlab.materialise(params)["kernel"])
        [[ 0.6  -0.25]]
    """
    _check_scheme(scheme)
    for name, value in (("max_pulses", max_pulses), ("refresh_every", refresh_every)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    rest_tx = optax.with_extra_args_support(
        optax.set_to_zero() if rest is None else rest
    )

    def others(known: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
        # By path: the gradient of a synapse is an array like any other.
        def mask(tree: Any) -> Any:
            return map_with_path(lambda path, _: path not in known, tree)

        return optax.masked(rest_tx, mask, mask_compatible_extra_args=True)

    def thresholds(params: Any) -> dict[str, Any]:
        named = leaves_with_paths(params)
        paths = [path for path, leaf in named if _is_synapse(leaf)]
        if rest is None and len(paths) < len(named):
            path, leaf = next(n for n in named if not _is_synapse(n[1]))
            raise ValueError(
                f"leaf {path!r} of shape {jnp.shape(leaf)} is no Synapse: pass rest=, "
                "an optimiser of such leaves (optax.set_to_zero() keeps them), or pack "
                "it as well, by which="
            )
        if not isinstance(threshold, Mapping):
            return dict.fromkeys(paths, threshold)
        out: dict[str, Any] = {}
        for pattern, value in threshold.items() if paths else ():
            for path in matching(pattern, paths):
                out.setdefault(path, value)
        if missing := [path for path in paths if path not in out]:
            raise ValueError(
                f"synapse {missing[0]!r} has no threshold ({len(missing)} such leaves):"
                " add a pattern that matches it, such as '*'"
            )
        return out

    def init(params: Any) -> SynapseState:
        zero = jnp.zeros([], jnp.float32)
        return SynapseState(
            count=jnp.zeros([], jnp.int32),
            pulses=zero,
            refreshed=jnp.zeros_like(zero),
            rest=others(thresholds(params)).init(params),
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        if params is None:
            raise ValueError("pulses depend on conductances: call update(..., params)")
        known = thresholds(params)
        grads = dict(leaves_with_paths(updates))
        out, rest_state = others(known).update(updates, state.rest, params, **extra)
        out = dict(leaves_with_paths(out))
        due = state.count % refresh_every == refresh_every - 1
        pulses, refreshed = state.pulses, state.refreshed
        for path, weight in leaves_with_paths(params):
            if path not in known:
                continue
            g = _checked(path, grads.get(path), weight)
            new = synapse_update(weight, -g, known[path], scheme, max_pulses=max_pulses)
            sent = _pulses(g.astype(jnp.float32), known[path], max_pulses)
            sent = jnp.sum(sent, dtype=jnp.float32)
            pulses = pulses + sent * (2 if scheme == "pair" else 1)
            if scheme == "unidirectional":
                plus, minus, full = _refreshed(new, refresh_level, whole_pulses)
                full = full & due
                refreshed = refreshed + jnp.sum(full, dtype=jnp.float32)
                plus = jnp.where(full, plus, new.plus)
                minus = jnp.where(full, minus, new.minus)
                new = _with(new, plus, minus)
            zeros = jax.tree.map(jnp.zeros_like, weight)
            out[path] = _with(zeros, new.plus - weight.plus, new.minus - weight.minus)
        new_state = SynapseState(
            jnp.asarray(optax.safe_increment(state.count)),
            pulses,
            refreshed,
            rest_state,
        )
        return map_with_path(lambda path, _: out[path], params), new_state

    return optax.GradientTransformationExtraArgs(init, update)


# --- The network of the hardware --------------------------------------------------


@jax.custom_vjp
def hard_sigmoid(z: jax.Array) -> jax.Array:
    """``clip(z / 2 + 1 / 2, 0, 1)``, whose derivative is one bit: whether |z| < 1.

    Args:
        z: any shape.

    Returns:
        Of the same shape, in [0, 1].
    """
    return jnp.clip(z / 2 + 0.5, 0, 1)


hard_sigmoid.defvjp(
    lambda z: (hard_sigmoid(z), jnp.abs(z) < 1),
    lambda gate, d: (jnp.where(gate, d, 0),),
)


@jax.custom_vjp
def hardware_loss(z: jax.Array, target: jax.Array) -> jax.Array:
    """Half the squared error of the outputs, with the hardware's error signal.

    Its gradient with respect to `z` is that of `hard_sigmoid`, but that an output which
    is off by more than one half passes also where it is saturated, lest it never learn.

    Args:
        z: the outputs before `hard_sigmoid`.
        target: of the same shape, in [0, 1].

    Returns:
        A scalar, the sum over all.
    """
    return jnp.sum(jnp.square(target - hard_sigmoid(z))) / 2


def _loss_forward(z: jax.Array, target: jax.Array) -> Any:
    error = hard_sigmoid(z) - target
    passes = (jnp.abs(z) < 1) | (jnp.abs(error) > 0.5)
    return jnp.sum(jnp.square(error)) / 2, jnp.where(passes, error, 0)


hardware_loss.defvjp(_loss_forward, lambda error, d: (d * error, None))


def hardware_mlp(
    weights: Sequence[Any], x: jax.Array, *, pwm_levels: int | None = None
) -> jax.Array:
    """The outputs of a network before their `hard_sigmoid`.

    Args:
        weights: for each layer an array or a `Synapse` of shape (inputs + 1, outputs),
            whose last row reads a constant 1.
        x: inputs in [0, 1], of shape (..., inputs).
        pwm_levels: if given, inputs and hidden values are pulse widths on a grid of so
            many steps, rounded on the way forward only.

    Returns:
        An array of shape (..., outputs).
    """

    def width(a: jax.Array) -> jax.Array:
        if pwm_levels is not None:
            a = a + jax.lax.stop_gradient(jnp.round(a * pwm_levels) / pwm_levels - a)
        return jnp.concatenate([a, jnp.ones_like(a[..., :1])], -1)

    *hidden, last = (w.materialise() if isinstance(w, Weight) else w for w in weights)
    for w in hidden:
        x = hard_sigmoid(width(x) @ w)
    return width(x) @ last


def train_online(
    weights: Sequence[Synapse],
    x: jax.Array,
    targets: jax.Array,
    thresholds: Sequence[ArrayLike],
    scheme: Scheme = "unidirectional",
    *,
    max_pulses: int = 1,
    refresh_every: int = 10,
    refresh_level: float = 0.98,
    whole_pulses: bool = False,
    pwm_levels: int | None = None,
) -> tuple[Synapse, ...]:
    """Learns one example after the other, as the hardware does, in one scan.

    Args:
        weights: of `hardware_mlp`.
        x: the examples, in order, of shape (steps, inputs).
        targets: in [0, 1], of shape (steps, outputs).
        thresholds: one for each layer.
        scheme: as in `synapse_update`.
        max_pulses: as in `synapse_update`.
        refresh_every: as in `synapse`.
        refresh_level: as in `synapse`.
        whole_pulses: as in `synapse`.
        pwm_levels: as in `hardware_mlp`.

    Returns:
        The weights after it.

    Raises:
        ValueError: if there are not as many thresholds as layers; for what `synapse`
            raises.
    """
    if len(thresholds) != len(weights):
        raise ValueError(f"{len(thresholds)} thresholds for {len(weights)} layers")
    tx = synapse(
        {str(i): threshold for i, threshold in enumerate(thresholds)},
        scheme,
        max_pulses=max_pulses,
        refresh_every=refresh_every,
        refresh_level=refresh_level,
        whole_pulses=whole_pulses,
    )

    def loss(dense: Any, x: jax.Array, target: jax.Array) -> jax.Array:
        return hardware_loss(hardware_mlp(dense, x, pwm_levels=pwm_levels), target)

    def step(carry: Any, example: Any) -> Any:
        params, state = carry
        dense = tuple(w.materialise() for w in params)
        updates, state = tx.update(jax.grad(loss)(dense, *example), state, params)
        return (optax.apply_updates(params, updates), state), None

    params: Any = tuple(weights)
    (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), (x, targets))
    return params


# --- Inside -----------------------------------------------------------------------

# One over a curvature that is as good as straight, and over which expm1 is safe.
_FLAT = 1e-20


def _check_scheme(scheme: str) -> None:
    if scheme not in _SCHEMES:
        raise ValueError(f"scheme {scheme!r} is none of {_SCHEMES}")


def _is_synapse(leaf: Any) -> bool:
    return isinstance(leaf, Synapse)


def _dtype(x: Any) -> Any:
    return jnp.promote_types(jnp.result_type(x), jnp.float32)


def _with(weight: Synapse, plus: jax.Array, minus: jax.Array) -> Synapse:
    return Synapse(plus, minus, weight.device, weight.dense_dtype, weight.matrix_view)


def _pair(device: Any, shape: tuple[int, ...], path: str) -> tuple[Device, Device]:
    """A device for each of a pair, its arrays with all of the weight's axes."""

    def fit(name: str, x: Any) -> jax.Array:
        x = jnp.asarray(x, _dtype(x))
        try:
            fits = np.broadcast_shapes(x.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"leaf {path!r} of shape {shape}: the device's {name} of shape "
                f"{x.shape} does not broadcast to it"
            )
        return x.reshape((1,) * (len(shape) - x.ndim) + x.shape)

    pair = (device, device) if isinstance(device, Device) else tuple(device)
    return tuple(  # type: ignore[return-value]
        Device(*(fit(name, x) for name, x in zip(Device._fields, d, strict=True)))
        for d in pair
    )


def _write(w: jax.Array, devices: Any, scheme: Scheme) -> tuple[jax.Array, jax.Array]:
    """Conductances that stand for given weights, as far as they can."""
    up, down = (d.w_max for d in devices)
    if scheme == "unidirectional":
        return jnp.clip(w / up, 0, 1), jnp.clip(-w / down, 0, 1)
    if scheme == "single":
        minus = jnp.full_like(w, 0.5)
        return jnp.clip(w / up + minus * (down / up), 0, 1), minus
    # Plus and minus end as far from the middle as each other.
    middle = (up - down) / 2
    return (
        jnp.clip(0.5 + (w - middle) / (up + down), 0, 1),
        jnp.clip(0.5 - (w - middle) / (up + down), 0, 1),
    )


def _pulses(error: jax.Array, threshold: Any, max_pulses: int) -> jax.Array:
    """How many pulses; a mask where one is the most."""
    size = jnp.abs(error)
    over = size > jnp.asarray(threshold, size.dtype)
    if max_pulses == 1:
        return over
    n = jnp.clip(jnp.round(size / threshold), 1, max_pulses)
    return jnp.where(over, n, 0)


def _refreshed(weight: Synapse, level: Any, whole_pulses: bool) -> Any:
    """The conductances of all pairs written anew, and which pairs are full."""
    of_plus, of_minus = weight.device
    full = (weight.plus >= level) | (weight.minus >= level)
    ratio = of_minus.w_max / of_plus.w_max
    plus = jnp.maximum(weight.plus - weight.minus * ratio, 0)
    minus = jnp.maximum(weight.minus - weight.plus / ratio, 0)
    if whole_pulses:
        plus, minus = (
            response(jnp.round(_pulses_to(g, d)), d)
            for g, d in ((plus, of_plus), (minus, of_minus))
        )
    return plus, minus, full


def _pulses_to(conductance: jax.Array, device: Device) -> jax.Array:
    """The inverse of `response`: pulses from empty, not a whole number."""
    inverse = 1 / device.curvature
    bent = jnp.where(inverse > _FLAT, inverse, 1.0)
    part = -jnp.log1p(conductance * jnp.expm1(-bent)) / bent
    return device.levels * jnp.where(inverse > _FLAT, part, conductance)


def _checked(path: str, g: Any, weight: Synapse) -> jax.Array:
    if isinstance(g, Weight):
        raise ValueError(
            f"leaf {path!r} of shape {weight.shape} is a Synapse: take the gradient at "
            "wlab.materialise(params), as an array of that shape"
        )
    if g is None or jnp.shape(g) != weight.shape:
        got = "missing" if g is None else f"of shape {jnp.shape(g)}"
        raise ValueError(
            f"the gradient of leaf {path!r} is {got}; the leaf has shape {weight.shape}"
        )
    return g
