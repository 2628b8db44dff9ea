# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""D2Quant: dual scales for down-projections, and norms that correct a shift (maps).

Of a gated layer ``down(act(gate x) * up x)`` the last matrix is stored as binary codes
with scales of its outputs and one scale :math:`c_j` of each input channel (see
`BinaryCoded`), which the matrix before it can take over,

.. math::

    W_{down} = \mathrm{diag}(c)\, \hat W, \qquad
    W_{up} \leftarrow W_{up}\, \mathrm{diag}(c)

It is rounded as in GPTAQ, whole groups at a time: those with the most active channels
first, and within them these channels first. Where attention has been quantised, the
mean by which the norm behind it is off is added to its bias.

`dual_uniform` is the same idea on a uniform grid, which serves above 3 bits.

References:
    `D2Quant: Accurate Low-bit Post-Training Weight Quantization for LLMs
    <https://arxiv.org/abs/2602.02546>`_, 2026.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import MatrixView, Permuted, is_weight
from wlab.quant._binary import BinaryCoded
from wlab.quant._calibrated import checked, gptaq, restored
from wlab.quant._dsq import DualRange, DualScale
from wlab.quant._gptq import gar_order, solve
from wlab.quant._grid import get_grid
from wlab.quant._quantized import EACH, Quantized

_LEAST = 1e-12  # the least scale of a uniform group
_EMPTY = 1e-20  # a channel whose codes are all zero keeps its scale


def dsq(
    w: jax.Array, *, bits: int = 2, group: int = 128, scale_dtype: Any = None
) -> BinaryCoded:
    """Dual scales without calibration.

    Args:
        w: kernel [in, out].
        bits: 2 or 3.
        group: input channels that share row scales.
        scale_dtype: of the stored row scales, such as float16, to which they are
            rounded first. Column scales stay float32: they are to be absorbed.

    Returns:
        The coded kernel, with float32 scales unless `scale_dtype` says otherwise.

    Raises:
        ValueError: for other bits or groups, or a kernel that is no matrix.
        TypeError: for a kernel that holds no floats, or scales that are none.

    Examples:
        >>> w = jnp.array([[1.0, -3.0], [-2.0, 6.0]])
        >>> bool(jnp.allclose(dsq(w, group=2).materialise(), w, rtol=1e-5))
        True
    """
    wide, grid = _checked(w, bits, group), _grid(bits, scale_dtype)
    n, m = w.shape
    count = -(-n // group)
    parts = jnp.pad(wide, [(0, count * group - n), (0, 0)]).reshape(count, group, m)
    found = jax.vmap(grid.fit)(parts)
    codes = jax.vmap(grid.nearest)(parts, found)
    c = found.c.reshape(-1)[:n]
    return _coded(w, codes.reshape(-1, m)[:n], found.r, c, grid, group)


def d2quant(
    w: jax.Array,
    h: jax.Array,
    d: jax.Array | None = None,
    *,
    bits: int = 2,
    group: int = 128,
    gar: bool = True,
    damping: float = 0.01,
    block: int | None = None,
    alpha: float = 0.25,
    scale_dtype: Any = None,
) -> BinaryCoded:
    """Dual scales with compensation, for a down-projection.

    Args:
        w: kernel [in, out].
        h: ``X^T X`` of the inputs that the quantised model sees, [in, in]. Beside
            channels that are never active its factor decides about the order.
        d: ``(X~ - X)^T X`` with the original model's inputs X~; None for GPTQ.
        bits: 2 or 3.
        group: input channels that share row scales.
        gar: whether active groups, and active channels in them, come first.
        damping: as in `wlab.quant.gptq`.
        block: as there; None for a group.
        alpha: strength of the correction by `d`.
        scale_dtype: of the stored row scales; see `dsq`.

    Returns:
        The coded kernel, with float32 scales unless `scale_dtype` says otherwise, its
        channels in the order of `w`.

    Raises:
        ValueError: for other bits, shapes that do not fit, or a group and block of
            which neither divides the other.
        TypeError: for a kernel that holds no floats, or scales that are none.
    """
    wide, grid = _checked(w, bits, group), _grid(bits, scale_dtype)
    h = h.astype(wide.dtype)
    found = solve(
        wide,
        h,
        None if d is None else d.astype(wide.dtype),
        grid=grid,
        group=group,
        block=group if block is None else block,
        damping=damping,
        order=gar_order(jnp.diagonal(h), group) if gar else None,
        alpha=alpha,
    )
    n = len(w)
    scales: DualRange = found.range
    c = scales.c.reshape(-1)[:n][jnp.argsort(found.order)]
    r = restored(scales.r, found.order, group) if gar else scales.r
    return _coded(w, found.codes, r, c, grid, group)


def _checked(w: jax.Array, bits: int, group: int) -> jax.Array:
    if bits not in (2, 3) or group < 1:
        raise ValueError(
            f"bits={bits}, group={group}: binary codes with two scales have 2 or 3 "
            "bits and groups of channels; dual_uniform has more bits"
        )
    return checked(w)


def _grid(bits: int, scale_dtype: Any) -> DualScale:
    if scale_dtype is not None and not jnp.issubdtype(scale_dtype, jnp.floating):
        raise TypeError(f"scale_dtype={scale_dtype}: scales are floats")
    return DualScale(bits, scale_dtype=scale_dtype)


def _coded(
    w: jax.Array,
    codes: jax.Array,
    r: jax.Array,
    c: jax.Array,
    grid: DualScale,
    group: int,
) -> BinaryCoded:
    dtype = r.dtype if grid.scale_dtype is None else grid.scale_dtype
    return BinaryCoded(
        codes=get_grid(f"uint{grid.bits}").encode(codes),
        r=jnp.swapaxes(r, -3, -2).astype(dtype),
        c=c,
        bits=grid.bits,
        group=group,
        dense_dtype=np.dtype(w.dtype),
    )


# --- A uniform grid --------------------------------------------------------------


class Dual(NamedTuple):
    """The kernel ``diag(scale) weight``: see `absorb`."""

    weight: Quantized | Permuted  # [in, out]
    scale: jax.Array  # [in]


class UniformFit(NamedTuple):
    """What `dual_uniform_fit` finds."""

    codes: jax.Array  # float levels [in, out], of magnitude below 2 ** (bits - 1)
    scale: jax.Array  # [groups, out]
    c: jax.Array  # [in]
    errors: jax.Array  # squared error before each round, and at the end


def dual_uniform_fit(
    w: jax.Array, bits: int, group: int, *, steps: int = 15, keep_best: bool = False
) -> UniformFit:
    """A scale of each input channel for symmetric uniform groups, fitted in turn.

    Args:
        w: kernel [in, out], float32 or float64.
        bits: of a code.
        group: input channels that share a range.
        steps: rounds: a channel's scale becomes the best for its codes, and then the
            codes are found again. The error may rise, since ranges follow the largest.
        keep_best: return the round with the least error, and not the last.

    Returns:
        Codes and scales, with ``w ~ c codes scale``.
    """
    n, m = w.shape
    count = -(-n // group)
    limit = 2 ** (bits - 1) - 1

    def coded(c: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        v = jnp.pad(w / c[:, None], [(0, count * group - n), (0, 0)])
        v = v.reshape(count, group, m)
        scale = jnp.maximum(jnp.max(jnp.abs(v), 1) / limit, _LEAST)
        codes = jnp.clip(jnp.round(v / scale[:, None]), -limit, limit)
        values = (codes * scale[:, None]).reshape(-1, m)[:n]
        return codes.reshape(-1, m)[:n], scale, values

    def error(c: jax.Array, values: jax.Array) -> jax.Array:
        return jnp.sum((w - c[:, None] * values) ** 2)

    def again(carry: Any, _: Any) -> Any:
        c, best, least = carry
        values = coded(c)[2]
        now = error(c, values)
        best = jnp.where(now < least, c, best)
        below = jnp.sum(values**2, 1)
        fitted = jnp.sum(w * values, 1) / jnp.where(below < _EMPTY, 1, below)
        return (
            jnp.where(below < _EMPTY, c, fitted),
            best,
            jnp.minimum(now, least),
        ), now

    ones = jnp.ones(n, w.dtype)
    start = ones, ones, jnp.asarray(jnp.inf, w.dtype)
    (c, best, least), errors = jax.lax.scan(again, start, None, length=steps)
    last = error(c, coded(c)[2])
    if keep_best:
        c = jnp.where(last < least, c, best)
    codes, scale, _ = coded(c)
    return UniformFit(codes, scale, c, jnp.append(errors, last))


def dual_uniform(
    w: jax.Array,
    h: jax.Array | None = None,
    d: jax.Array | None = None,
    *,
    bits: int = 4,
    group: int = 128,
    keep_best: bool = False,
    **options: Any,
) -> Dual:
    """Dual scales on a uniform symmetric grid; `absorb` brings the second one away.

    Args:
        w: kernel [in, out].
        h: ``X^T X`` of its inputs, to round with compensation; None: to nearest.
        d: ``(X~ - X)^T X``, as in `wlab.quant.gptaq`.
        bits: 2 to 8.
        group: input channels that share a range.
        keep_best: as in `dual_uniform_fit`.
        **options: for `wlab.quant.gptaq`, with `h`.

    Returns:
        The packed kernel without its column scales, and these.

    Raises:
        ValueError: for bits that are none, or shapes that do not fit.
        TypeError: for a kernel that holds no floats.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"bits={bits}: kernels are stored at 2 to 8")
    wide = checked(w)
    found = dual_uniform_fit(wide, bits, group, keep_best=keep_best)
    c = found.c
    if h is not None:
        # The inputs of the packed kernel are c times as large.
        both = c[:, None] * c[None]
        weight = gptaq(
            (wide / c[:, None]).astype(w.dtype),
            h * both,
            None if d is None else d * both,
            bits=bits,
            group=group,
            symmetric=True,
            **options,
        )
        return Dual(weight, c)
    grid = get_grid(f"int{bits}")
    weight = Quantized(
        codes=grid.encode(found.codes),
        scale=found.scale,
        zero=None,
        grid=grid,
        block=(group, EACH),
        dense_dtype=np.dtype(w.dtype),
        matrix_view=MatrixView.of(1, 1),
    )
    return Dual(weight, c)


# --- Absorption ------------------------------------------------------------------


class Absorbed(NamedTuple):
    """Two kernels of which the first has taken over the second's column scales."""

    up: Any
    down: Any
    bias: jax.Array | None  # of the first


def absorb(
    down: BinaryCoded | Dual, up: Any, bias: jax.Array | None = None
) -> Absorbed:
    """Moves column scales into the layer before: the function stays the same.

    That must be linear in between: of a gated layer ``act(gate x) * up x`` it is `up`,
    never the gate.

    Args:
        down: the kernel that has them.
        up: the kernel [in, channels] that makes its inputs (any axes stacked in front
            as in `down`): an array, a `Quantized` or a `Permuted` one.
        bias: the bias of `up`, [channels], if it has one.

    Returns:
        The kernels with ``down(up(x))`` as before.

    Raises:
        ValueError: if the channels do not fit, or the scales of `up` are shared by
            several of them.
    """
    if isinstance(down, Dual):
        c, rest = down.scale, down.weight
    else:
        c, rest = down.c, down.without_c()
    if c is None:
        raise ValueError("absorb: this kernel has no column scales (any more)")
    return Absorbed(_scaled(up, c), rest, None if bias is None else _times(bias, c))


def _times(x: jax.Array, c: jax.Array) -> jax.Array:
    wide = jnp.promote_types(x.dtype, c.dtype)
    return (x.astype(wide) * c.astype(wide)).astype(x.dtype)


def _scaled(up: Any, c: jax.Array) -> Any:
    if isinstance(up, Permuted):
        return Permuted(_scaled(up.base, c), up.order)
    if up.shape[-1] != c.shape[-1] or up.shape[:-2] != c.shape[:-1]:
        raise ValueError(
            f"absorb: scales of shape {c.shape} do not fit a kernel of shape "
            f"{up.shape}, whose outputs they scale"
        )
    if isinstance(up, Quantized):
        if up.scale.shape[-1] != c.shape[-1]:
            raise ValueError(
                f"absorb: the kernel of shape {up.shape} shares scales between its "
                "outputs; quantise it with scales for each"
            )
        return Quantized(
            codes=up.codes,
            scale=_times(up.scale, jnp.broadcast_to(c[..., None, :], up.scale.shape)),
            zero=up.zero,
            grid=up.grid,
            block=up.block,
            dense_dtype=up.dense_dtype,
            matrix_view=up.matrix_view,
        )
    if is_weight(up):
        raise ValueError(
            f"absorb: {type(up).__name__} of shape {up.shape} cannot be scaled; use "
            "its dense form"
        )
    return _times(up, jnp.broadcast_to(c[..., None, :], up.shape))


# --- The shift behind a norm -----------------------------------------------------


class Shift(NamedTuple):
    """By how much outputs are off, over tokens: mean and spread of each channel."""

    count: jax.Array  # float32 scalar
    mean: jax.Array  # [channels]
    squares: jax.Array  # [channels], sum of squared differences from the mean

    @property
    def variance(self) -> jax.Array:
        """Of the population."""
        return self.squares / jnp.maximum(self.count, 1)

    @property
    def snr(self) -> jax.Array:
        """The mean's magnitude over the standard deviation."""
        return jnp.abs(self.mean) / (jnp.sqrt(self.variance) + 1e-8)

    @property
    def explained(self) -> jax.Array:
        """The share of the squared deviation that the mean makes up."""
        square = self.mean**2
        return square / (square + self.variance + 1e-12)


def dac_init(channels: int, dtype: Any = jnp.float32) -> Shift:
    """The shift of no tokens."""
    zeros = jnp.zeros(channels, dtype)
    return Shift(jnp.zeros((), dtype), zeros, zeros)


def dac_add(
    shift: Shift, teacher: jax.Array, student: jax.Array, mask: Any = None
) -> Shift:
    """The shift of more tokens: means are merged, so that long runs lose nothing.

    Args:
        shift: of the tokens before.
        teacher: outputs of the norm before attention was quantised, [..., channels].
        student: outputs since then, from the same inputs.
        mask: of the tokens that count, [...]; None for all.

    Returns:
        The shift of all.
    """
    wide = shift.mean.dtype
    off = (teacher.astype(wide) - student.astype(wide)).reshape(-1, len(shift.mean))
    counted = (
        jnp.ones(len(off), wide) if mask is None else mask.reshape(-1).astype(wide)
    )
    n = jnp.sum(counted)
    mean = jnp.sum(off * counted[:, None], 0) / jnp.maximum(n, 1)
    squares = jnp.sum((off - mean[None]) ** 2 * counted[:, None], 0)
    return dac_merge(shift, Shift(n, mean, squares))


def dac_merge(a: Shift, b: Shift) -> Shift:
    """The shift of the tokens of both."""
    total = a.count + b.count
    share = b.count / jnp.maximum(total, 1)
    apart = b.mean - a.mean
    return Shift(
        total,
        a.mean + share * apart,
        a.squares + b.squares + apart**2 * a.count * share,
    )


def dac_bias(
    shift: Shift,
    *,
    strength: float = 1.0,
    clip: float = 10.0,
    explained: float | None = None,
    snr: float | None = None,
    keep: float | None = None,
) -> jax.Array:
    """What is added to the bias of the norm.

    Args:
        shift: from `dac_add`.
        strength: factor of the mean.
        clip: its largest magnitude.
        explained: correct only channels with at least this share explained by it.
        snr: else: with at least this ratio of mean and standard deviation.
        keep: else: this part of the channels, those with the largest such ratio.

    Returns:
        The correction, [channels]; by default of all of them.

    Raises:
        ValueError: if `keep` is not in (0, 1].
    """
    bias = jnp.clip(strength * shift.mean, -clip, clip)
    if explained is not None:
        return jnp.where(shift.explained >= explained, bias, 0)
    if snr is not None:
        return jnp.where(shift.snr >= snr, bias, 0)
    if keep is not None:
        if not 0 < keep <= 1:
            raise ValueError(f"dac_bias: keep={keep} must be above 0 and at most 1")
        k = max(1, round(keep * len(bias)))
        chosen = jax.lax.top_k(shift.snr, k)[1]
        return jnp.zeros_like(bias).at[chosen].set(bias[chosen])
    return bias


def dac_fold(bias: jax.Array, kernel: Any, shift: jax.Array) -> jax.Array:
    """The bias of a layer behind the norm, for norms that have none.

    Args:
        bias: of that layer, [...outputs].
        kernel: its kernel [channels, ...outputs], dense or structured.
        shift: what the norm's bias would be, [channels].

    Returns:
        The bias that makes up for it.
    """
    dense = kernel.materialise() if is_weight(kernel) else kernel
    wide = jnp.promote_types(shift.dtype, dense.dtype)
    more = jnp.tensordot(
        shift.astype(wide), dense.astype(wide), 1, precision=jax.lax.Precision.HIGHEST
    )
    return (bias.astype(wide) + more).astype(bias.dtype)
