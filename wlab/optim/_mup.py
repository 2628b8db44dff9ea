# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""muP with weight decay that carries over: rules over width (transforms).

A model of width :math:`d` takes learning rate and weight decay from one of width
:math:`d_\text{base}`. With :math:`q = d / d_\text{base}`,

.. math::

    \eta_\text{matrix} = \eta\, q^{-1}, \qquad
    \lambda_\text{matrix} = \lambda\, q^{1/2}, \qquad
    \eta_\text{vector} = \eta, \qquad \lambda_\text{vector} = 0

where a matrix has both its sides grow with width, and a vector one (embeddings, head,
norms, biases). In the steady state of AdamW the singular values of a matrix go as
:math:`\sqrt{\eta/\lambda}`; the root keeps the largest, and so the gain of every
sublayer, constant over width. It is an empirical law, not :math:`\lambda \propto d`:
both exponents are arguments, and independent.

What surrounds the rule (initial scales, the factors of attention and output) is muP's
own, after Yang et al., since the paper's settings could not be seen. Depth is not
scaled.

References:
    Fan, Liu, Zhao, Yuan and Gu, `Robust Layerwise Scaling Rules by Proper Weight Decay
    Tuning <https://arxiv.org/abs/2510.15262>`_, 2025;
    Yang et al., `Tensor Programs V <https://arxiv.org/abs/2203.03466>`_, 2022.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from wlab.core import (
    Leaf,
    Pattern,
    Views,
    describe,
    is_weight,
    leaves_with_paths,
    map_with_path,
    select,
)

if TYPE_CHECKING:
    from wlab.models.decoder import DecoderConfig

Kind = Literal["matrix", "vector", "scalar"]
_KINDS = ("matrix", "vector", "scalar")


@dataclasses.dataclass(frozen=True)
class Width:
    """What one leaf is under a change of width; a leaf of a tree, not a node.

    Attributes:
        kind: matrix (both sides grow), vector (one does) or scalar (none).
        fan_in: size of the side that is read, over that of the base; this is q.
        fan_out: size of the side that is written, over that of the base.
        role: as `wlab.core.describe` has it.
    """

    kind: Kind
    fan_in: float = 1.0
    fan_out: float = 1.0
    role: str = "other"


class Multipliers(NamedTuple):
    """Factors of the base's hyperparameters, trees of the structure of the classes."""

    learning_rate: Any  # floats
    weight_decay: Any  # floats


def classify(
    params: Any,
    base: Any,
    delta: Any = None,
    *,
    overrides: Mapping[Pattern, Kind] | None = None,
    views: Views | None = None,
) -> Any:
    """The class of every leaf, from the shapes of models of two or three widths.

    Nothing is computed: abstract trees, as `jax.eval_shape` makes them, do.

    Args:
        params: parameters of the model that is to be trained.
        base: parameters of the model for which the hyperparameters hold.
        delta: parameters of a third width, which tells what grows; None: `params`
            tells. It is needed where `params` has the base's width.
        overrides: patterns and the class that leaves of that name have instead; the
            first that matches holds.
        views: which axes of a leaf are inputs and outputs, where names do not tell, as
            in `wlab.core.describe`.

    Returns:
        A tree of the structure of `params` with a `Width` for each leaf.

    Raises:
        ValueError: if the trees differ in leaves, axes or stacked layers (another
            depth), or in an axis that does not grow; if no axis grows; for a pattern
            that matches nothing. Each names the leaf.

    Examples:
        >>> shapes = lambda d: {
        ...     "embed": {"embedding": jnp.zeros((50, d))},
        ...     "up": {"kernel": jnp.zeros((d, 4 * d)), "bias": jnp.zeros(4 * d)},
        ... }
        >>> classes = classify(shapes(64), shapes(16))
        >>> classes["up"]["kernel"].kind, classes["up"]["kernel"].fan_in
        ('matrix', 4.0)
        >>> classes["up"]["bias"].kind, classes["embed"]["embedding"].kind
        ('vector', 'vector')
    """
    leaves = describe(params, views=views)
    if not leaves:
        return params
    third = params if delta is None else delta
    base_shapes, third_shapes = map(_shapes, (base, third))
    for name, shapes in (("base", base_shapes), ("delta", third_shapes)):
        _same_paths(name, [leaf.path for leaf in leaves], shapes)
    grown: dict[str, tuple[bool, ...]] = {}
    for leaf in leaves:
        small, other = base_shapes[leaf.path], third_shapes[leaf.path]
        where = f"leaf {leaf.path!r}: shape {leaf.shape}, base {small}"
        if not len(leaf.shape) == len(small) == len(other):
            raise ValueError(
                f"{where}, delta {other} differ in their number of axes: the models "
                "must differ in width only"
            )
        grows = tuple(a != b for a, b in zip(small, other, strict=True))
        stack = leaf.view.stack(len(small)) if leaf.view is not None else ()
        for axis, (n, m) in enumerate(zip(leaf.shape, small, strict=True)):
            if axis in stack and (n != m or grows[axis]):
                raise ValueError(
                    f"{where} differ in axis {axis}, which is stacked: the base must "
                    "have the same depth (and as many experts), since only width scales"
                )
            if n != m and not grows[axis]:
                raise ValueError(
                    f"{where} differ in axis {axis}, which is the same in base and "
                    f"delta ({other}) and so does not grow with width"
                )
        grown[leaf.path] = grows
    if not any(any(grows) for grows in grown.values()):
        raise ValueError(
            f"all {len(leaves)} leaves have the same shapes as the base's, so nothing "
            "tells which axes grow: pass delta=, the shapes of another width"
        )
    widths = {
        leaf.path: _width(leaf, base_shapes[leaf.path], grown[leaf.path])
        for leaf in leaves
    }
    decided: set[str] = set()
    for pattern, kind in (overrides or {}).items():
        if kind not in _KINDS:
            raise ValueError(f"class {kind!r} of {pattern!r} is none of {_KINDS}")
        for path, hit in leaves_with_paths(select(params, pattern)):
            if hit and path not in decided:
                widths[path] = dataclasses.replace(widths[path], kind=kind)
                decided.add(path)
    return map_with_path(lambda path, _: widths[path], params)


def multipliers(
    classes: Any,
    lr_exp: ArrayLike = -1.0,
    wd_exp: ArrayLike = 0.5,
    *,
    decay_vectors: bool = False,
) -> Multipliers:
    """What the base's learning rate and weight decay are multiplied with, by leaf.

    Args:
        classes: from `classify`.
        lr_exp: power of q in a matrix' learning rate.
        wd_exp: power of q in a matrix' weight decay, which the learning rate multiplies
            once more: 0 is muP with decay as it stands, 1 the coupled decay that is
            muP's default elsewhere.
        decay_vectors: whether what is no matrix decays, by the base's own decay.

    Returns:
        Two trees of the structure of `classes`.

    Examples:
        >>> found = multipliers({"w": Width("matrix", 4.0, 4.0)})
        >>> found.learning_rate["w"], found.weight_decay["w"]
        (0.25, 2.0)
    """

    def power(exponent: ArrayLike, rest: float) -> Any:
        return jax.tree.map(
            lambda w: w.fan_in**exponent if w.kind == "matrix" else rest, classes
        )

    return Multipliers(power(lr_exp, 1.0), power(wd_exp, float(decay_vectors)))


def scale_by_mup(
    classes: Any, lr_exp: ArrayLike = -1.0
) -> optax.GradientTransformationExtraArgs:
    """Scales each leaf's update by its multiplier of the learning rate.

    It belongs behind what normalises the gradient and behind the weight decay, in front
    of the learning rate.

    Args:
        classes: from `classify`, or a function of the parameters that returns them, as
            ``functools.partial(classify, base=...)``.
        lr_exp: as in `multipliers`.

    Returns:
        A gradient transformation without state.

    Raises:
        ValueError: at `init` and `update`, for a leaf that has no class.
        TypeError: for the update of a packed weight, which no number scales: see
            `partition`.
    """

    def scale(path: str, update: Any, factor: Any) -> Any:
        _no_weight(path, update)
        return update * jnp.asarray(factor, update.dtype)

    def init(params: Any) -> optax.EmptyState:
        _checked(classes, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        known = _checked(classes, updates if params is None else params)
        factors = multipliers(known, lr_exp).learning_rate
        return map_with_path(lambda p, u: scale(p, u, factors[p]), updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def add_decayed_weights(
    weight_decay: ArrayLike,
    classes: Any,
    wd_exp: ArrayLike = 0.5,
    *,
    decay_vectors: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Adds to each leaf's update the weight times its own decay.

    As in `optax.add_decayed_weights`, the learning rate behind it multiplies the decay.
    Where it does not, the coefficient is the product of both, and `wd_exp` that of the
    product: -0.5.

    Args:
        weight_decay: of the base.
        classes: as in `scale_by_mup`.
        wd_exp: as in `multipliers`.
        decay_vectors: as in `multipliers`.

    Returns:
        A gradient transformation without state.

    Raises:
        ValueError: at `init` and `update`, for a leaf that has no class; without
            parameters.
        TypeError: for a packed weight: see `partition`.
    """

    def init(params: Any) -> optax.EmptyState:
        _checked(classes, params)
        return optax.EmptyState()

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del extra_args
        if params is None:
            raise ValueError("weight decay needs the parameters: update(..., params)")
        known = _checked(classes, params)
        factors = multipliers(known, 0.0, wd_exp, decay_vectors=decay_vectors)
        weights = dict(leaves_with_paths(params))

        def decay(path: str, update: Any) -> Any:
            factor = factors.weight_decay[path]
            _no_weight(path, weights[path])
            if isinstance(factor, float) and factor == 0:
                return update
            rate = jnp.asarray(weight_decay * factor, update.dtype)
            return update + weights[path].astype(update.dtype) * rate

        return map_with_path(decay, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def partition(
    make: Callable[[float, float], optax.GradientTransformation],
    classes: Any,
    lr_exp: float = -1.0,
    wd_exp: float = 0.5,
    *,
    rest: optax.GradientTransformation | None = None,
    decay_vectors: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Any optimiser at all, once for each pair of multipliers.

    For optimisers that put learning rate and decay into their state or their rounding,
    so that no transform behind them can scale what they did, such as `wlab.optim.eco`
    over packed weights. What looks at the whole tree, such as clipping by its norm,
    belongs in front.

    Args:
        make: from the multipliers of learning rate and weight decay to the optimiser.
        classes: as in `scale_by_mup`.
        lr_exp: as in `multipliers`, a plain number.
        wd_exp: as in `multipliers`, a plain number.
        rest: the optimiser of all that is no matrix; None: `make`'s for their
            multipliers.
        decay_vectors: as in `multipliers`.

    Returns:
        A gradient transformation.

    Raises:
        ValueError: at `init` and `update`, for a leaf that has no class.

    Examples:
        >>> classes = {"w": Width("matrix", 4.0, 4.0), "b": Width("vector")}
        >>> tx = partition(lambda lr, wd: optax.sgd(0.1 * lr), classes)
        >>> ones = {"w": jnp.ones(()), "b": jnp.ones(())}
        >>> updates, _ = tx.update(ones, tx.init(ones), ones)
        >>> print(updates["w"], updates["b"])
        -0.025 -0.1
    """

    def for_tree(params: Any) -> optax.GradientTransformationExtraArgs:
        known = _checked(classes, params)
        lr, wd = multipliers(known, lr_exp, wd_exp, decay_vectors=decay_vectors)
        parts: dict[Any, optax.GradientTransformation] = {}
        labels = {}
        for path, width in known.items():
            if rest is not None and width.kind != "matrix":
                labels[path] = "rest"
                parts["rest"] = rest
                continue
            labels[path] = f"{lr[path]!r} {wd[path]!r}"
            if labels[path] not in parts:
                parts[labels[path]] = make(lr[path], wd[path])
        return optax.partition(
            parts, lambda tree: map_with_path(lambda p, _: labels[p], tree)
        )

    def init(params: Any) -> Any:
        return for_tree(params).init(params)

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        tx = for_tree(updates if params is None else params)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def mup_adamw(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: ArrayLike,
    classes: Any,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-12,
    lr_exp: ArrayLike = -1.0,
    wd_exp: ArrayLike = 0.5,
    *,
    decay_vectors: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """AdamW whose learning rate and weight decay carry over from the base's width.

    Args:
        learning_rate: of the base, a number or a schedule.
        weight_decay: of the base; times the learning rate, as in `optax.adamw`.
        classes: as in `scale_by_mup`.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root of the second moment; tiny, since gradients shrink as
            width grows.
        lr_exp: as in `multipliers`.
        wd_exp: as in `multipliers`.
        decay_vectors: as in `multipliers`.

    Returns:
        A gradient transformation; its moments are float32 at least.

    Raises:
        ValueError: at `init` and `update`, for a leaf that has no class.

    Examples:
        >>> shapes = lambda d: {"w": {"kernel": jnp.ones((d, d))}}
        >>> params = shapes(8)
        >>> tx = mup_adamw(0.1, 0.5, classify(params, shapes(2)))
        >>> zero = jax.tree.map(jnp.zeros_like, params)
        >>> updates, _ = tx.update(zero, tx.init(params), params)
        >>> print(updates["w"]["kernel"][0, 0])  # 0.1 / 4 times 0.5 * 2
        -0.025
    """
    return optax.chain(
        _wide(optax.scale_by_adam(b1, b2, eps)),
        add_decayed_weights(weight_decay, classes, wd_exp, decay_vectors=decay_vectors),
        scale_by_mup(classes, lr_exp),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_init(params: Any, classes: Any) -> Any:
    """The parameters with muP's initial scales, from Flax's own (a map).

    Flax begins a kernel with deviations of one over the root of its inputs, and an
    embedding with one over the root of its features. Matrices and input layers stay.
    Embeddings, heads and others of which only the inputs grow become as large as the
    base's; the logits then take the factor `output_multiplier`.

    Args:
        params: as the model's `init` made them.
        classes: from `classify`.

    Returns:
        The parameters, each leaf of its own dtype.
    """
    known = _checked(classes, params)

    def scale(path: str, x: Any) -> Any:
        width = known[path]
        if width.kind != "vector" or width.role in ("norm", "bias", "other"):
            return x
        q = width.fan_out if width.role == "embedding" else width.fan_in
        return x * jnp.asarray(math.sqrt(q), x.dtype)

    return map_with_path(scale, params)


def output_multiplier(classes: Any) -> float:
    """What the logits are multiplied with: 1/q of the head, or of the tied embedding.

    Args:
        classes: from `classify`.

    Raises:
        ValueError: if there is no head and no embedding, or several of unlike widths.
    """
    named = leaves_with_paths(classes)
    heads = {w.fan_in for _, w in named if w.role == "head"}
    heads = heads or {w.fan_out for _, w in named if w.role == "embedding"}
    if len(heads) != 1:
        raise ValueError(
            f"{len(heads)} widths of a head or an embedding among {len(named)} "
            "leaves: the logits' multiplier is one over the head's fan-in, relative to "
            "the base's"
        )
    return 1 / heads.pop()


def decoder_configs(
    base: "DecoderConfig",
    widths: Iterable[int],
    *,
    grow: Literal["heads", "head_dim"] = "heads",
) -> dict[int, "DecoderConfig"]:
    """Decoders of several widths that take their hyperparameters from one.

    The hidden layer and the heads (or their size) grow with the width. Embedding and
    head begin as the base's, the logits are divided by q, and where the size of a head
    grows, attention's scale falls as one over it, not as one over its root.

    Args:
        base: a `wlab.models.decoder.DecoderConfig`.
        widths: those to make; the base's own may be among them.
        grow: what of attention grows.

    Returns:
        A config for each width.

    Raises:
        ValueError: if a width does not divide into whole heads or channels; for a base
            with experts, for whose router the rule is open.

    Examples:
        >>> from wlab.models.decoder import tiny
        >>> configs = decoder_configs(tiny(), [128, 256])
        >>> configs[256].heads, configs[256].hidden, configs[256].output_scale
        (8, 1024, 0.5)
    """
    if grow not in ("heads", "head_dim"):
        raise ValueError(f"grow={grow!r} is neither 'heads' nor 'head_dim'")
    if base.experts:
        raise ValueError(
            f"the base has experts={base.experts}: the rule for routers is open; scale "
            "a dense decoder, or give classes of your own"
        )
    names = ("hidden", *(("heads", "kv_heads") if grow == "heads" else ("head_dim",)))
    out = {}
    for width in widths:
        sizes = {}
        for name in names:
            size, left = divmod(getattr(base, name) * width, base.width)
            if width <= 0 or left or (name == "head_dim" and size % 2):
                raise ValueError(
                    f"width {width} from a base of width {base.width} and "
                    f"{name}={getattr(base, name)} gives no whole"
                    f"{' even' * (name == 'head_dim')} {name}: choose a width whose "
                    "ratio to the base's divides"
                )
            sizes[name] = size
        scale = base.attention_scale
        if grow == "head_dim":
            at_base = scale or base.head_dim**-0.5
            scale = at_base * base.width / width
        out[width] = dataclasses.replace(
            base,
            width=width,
            **sizes,
            attention_scale=scale,
            output_scale=base.output_scale * base.width / width,
            init_width=base.init_width or base.width,
        )
    return out


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(jnp.shape(leaf)) for path, leaf in leaves_with_paths(tree)}


def _same_paths(name: str, paths: list[str], shapes: Mapping[str, Any]) -> None:
    for here, there, text in (
        (paths, shapes, f"is not in {name}"),
        (shapes, paths, f"of {name} is not in the parameters"),
    ):
        if missing := [path for path in here if path not in there]:
            raise ValueError(
                f"leaf {missing[0]!r} {text} ({len(missing)} such leaves): the models "
                "must differ in width only, not in depth or in layers"
            )


def _width(leaf: Leaf, base: tuple[int, ...], grows: tuple[bool, ...]) -> Width:
    def ratio(axes: Iterable[int]) -> float:
        return math.prod(leaf.shape[a] for a in axes) / math.prod(base[a] for a in axes)

    if leaf.view is None:
        kind: Kind = "vector" if any(grows) else "scalar"
        return Width(kind, 1.0, ratio(range(len(base))), leaf.role)
    sides = [any(grows[a] for a in side) for side in leaf.view]
    kind = ("scalar", "vector", "matrix")[sum(sides)]
    ins, outs = map(tuple, leaf.view)
    return Width(kind, ratio(ins), ratio(outs), leaf.role)


def _checked(classes: Any, params: Any) -> dict[str, Width]:
    """The class of each leaf of the parameters, by path."""
    named = leaves_with_paths(params)
    if not named:
        return {}
    tree = classes(params) if callable(classes) else classes
    known = dict(leaves_with_paths(tree))
    for path, leaf in named:
        if not isinstance(known.get(path), Width):
            raise ValueError(
                f"leaf {path!r} of shape {jnp.shape(leaf)} has no class: make the "
                "classes with wlab.optim.mup.classify on a tree that has this leaf"
            )
    return {path: known[path] for path, _ in named}


def _no_weight(path: str, leaf: Any) -> None:
    if is_weight(leaf):
        raise TypeError(
            f"leaf {path!r} of shape {leaf.shape} is a {type(leaf).__name__}, whose "
            "updates are differences in storage that no factor scales: give its "
            "optimiser the scaled learning rate and decay, by wlab.optim.mup.partition"
        )


def _wide(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """The transform with its state and its sums in float32 at least."""

    def widen(x: jax.Array) -> Any:
        return jnp.promote_types(x.dtype, jnp.float32)

    def init(params: Any) -> Any:
        # Derived from the leaf, so that it is sharded as the leaf is.
        return tx.init(
            jax.tree.map(lambda x: jnp.zeros_like(x, dtype=widen(x)), params)
        )

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        del params, extra_args
        return tx.update(jax.tree.map(lambda x: x.astype(widen(x)), updates), state)

    return optax.GradientTransformationExtraArgs(init, update)
