# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
r"""WaRA: low-rank factors in a wavelet domain (reparameterisation).

With :math:`D_1` and :math:`D_2` the orthonormal wavelet analyses of the inputs and the
outputs, the shared form gives all bands one product of half the size,

.. math::

    \Delta = s\, D_2^\top (I_2 \otimes B A) D_1

which has rank 2 r for the numbers of a LoRA of rank r (for Haar wavelets it is
:math:`s\,(BA) \otimes I_2`). The sub-band form decomposes the change in two dimensions
and gives each band factors of its own; the tiny form trains an r x r matrix between the
leading singular vectors of the weight.

The paper's code could not be had; the shared form is its figure's, where the transform
over tokens, which is orthonormal and commutes with the factors, cancels.

References:
    Heidari, Rekik, Hacihaliloglu, Merhof and others, `WaRA: Wavelet Low Rank Adaptation
    <https://arxiv.org/abs/2506.24092>`_, 2025.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from wlab.core import LowRank, Operator, Reparam, Select, Views
from wlab.peft._lora import principal_factors
from wlab.peft._matrices import Attach, Init, Method, Target, reparam

Mode = Literal["shared", "subband", "tiny"]
Wavelet = Literal["haar", "db2", "db3", "db4"]
_BANDS = ("LL", "LH", "HL", "HH")


def wara(
    rank: int = 8,
    *,
    mode: Mode = "shared",
    bands: Mapping[str, int] | Sequence[str] = _BANDS,
    wavelet: Wavelet = "haar",
    levels: int = 1,
    alpha: float | None = None,
    select: Select | None = None,
    views: Views | None = None,
) -> Reparam:
    """Wavelet low-rank adaptation; the model is unchanged at the start.

    Sides that the transform cannot halve `levels` times are padded with zeros. A target
    becomes an `Operator` (for "tiny" a `LowRank`). Trained for each matrix, float32 and
    with the stacked axes in front:

    - "shared": ``a_all1`` (in / 2, r) and ``b_all1`` (out / 2, r); the number is that
      of the levels, with which sides shrink and the rank, 2^levels r, grows;
    - "subband": ``a_LL1``, ``b_LL1``, ... for each band and level; the first letter is
      the band along the outputs. LL is halved further, so that it stands at the last
      level alone;
    - "tiny": ``r`` (r, r), from zero.

    Args:
        rank: of the product.
        mode: "shared", "subband" or "tiny", as above.
        bands: of "subband": which, or the rank of each.
        wavelet: "haar", or Daubechies' with 2, 3 or 4 vanishing moments, periodic.
        levels: how often sides are halved.
        alpha: the scale s is alpha / rank; None: 1.
        select: which leaves; None: the kernels of linear layers.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        A `Reparam`, whose labels are the names above.

    Raises:
        ValueError: if rank or levels are not positive, for a mode, band or wavelet that
            is none, a rank above a band's smaller side, and as all methods of
            `wlab.peft` do.

    Examples:
        >>> params = {"dense": {"kernel": jnp.ones((6, 4))}}
        >>> adapter = wara(rank=2).init(jax.random.key(0), params)
        >>> jax.tree.map(jnp.shape, adapter.train)
        {'dense/kernel': {'a_all1': (3, 2), 'b_all1': (2, 2)}}
    """
    if rank < 1 or levels < 1:
        raise ValueError(f"wara: rank={rank} and levels={levels} must be positive")
    if mode not in ("shared", "subband", "tiny"):
        raise ValueError(f"wara: mode={mode!r} is none of 'shared', 'subband', 'tiny'")
    if wavelet not in ("haar", "db2", "db3", "db4"):
        raise ValueError(
            f"wara: wavelet={wavelet!r} is none of 'haar', 'db2', 'db3', 'db4'"
        )
    ranks = dict(bands) if isinstance(bands, Mapping) else dict.fromkeys(bands, rank)
    if not set(ranks) <= set(_BANDS) or not any(ranks.values()):
        raise ValueError(f"wara: bands {list(ranks)} must be some of {list(_BANDS)}")
    s = 1.0 if alpha is None else alpha / rank

    # (name, level, rank) of every product in the wavelet domain.
    if mode == "subband":
        products = [
            (band, level, ranks[band])
            for level in range(1, levels + 1)
            for band in _BANDS
            if ranks.get(band) and (band != "LL" or level == levels)
        ]
    else:
        products = [("", levels, rank)]

    def padded(n: int) -> int:
        return -(-n // 2**levels) * 2**levels

    def check(target: Target) -> None:
        for band, level, r in products:
            cut = 1 if mode == "tiny" else 2**level
            small = min(padded(target.n_in), padded(target.n_out)) // cut
            small = min(target.n_in, target.n_out) if mode == "tiny" else small
            if r > small:
                raise ValueError(
                    f"wara: rank {r} is above the smaller side, {small}, of "
                    f"{f'band {band} of ' if band else ''}{target}"
                )

    def init(given: Init) -> tuple[dict[str, Any], dict[str, Any]]:
        t = given.target
        if mode == "tiny":
            a, b = principal_factors(given.weight(), rank)
            a = a / jnp.linalg.norm(a, axis=-2, keepdims=True)
            b = b / jnp.linalg.norm(b, axis=-2, keepdims=True)
            frozen = {
                "a": a.reshape(*t.stack, *t.inputs, rank),
                "b": b.reshape(*t.stack, *t.outputs, rank),
            }
            return {"r": jnp.zeros((*t.stack, rank, rank))}, frozen
        train: dict[str, Any] = {}
        keys = jax.random.split(given.key, len(products))
        for key, (band, level, r) in zip(keys, products, strict=True):
            n_in, n_out = (padded(n) // 2**level for n in (t.n_in, t.n_out))
            bound = 1 / math.sqrt(n_in)
            a_name, b_name = _names(band, level)
            shape = (*t.stack, n_in, r)
            train[a_name] = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
            train[b_name] = jnp.zeros((*t.stack, n_out, r))
        return train, {}

    def attach(given: Attach) -> Any:
        t, scale = given.target, s * jnp.asarray(given.scale)
        if mode == "tiny":
            n = len(t.outputs)
            between = jnp.expand_dims(
                jnp.swapaxes(given.train["r"], -1, -2), range(-n - 2, -2)
            )
            b = jnp.matmul(
                given.frozen["b"][..., None, :],
                between.reshape(*t.stack, *(1,) * n, rank, rank),
            )[..., 0, :]
            return LowRank._make(given.base, given.frozen["a"], b, scale, t.view)
        if mode == "shared" and wavelet == "haar":
            action: Any = Interleaved(levels, t.n_out)
        else:
            action = Wavelets(
                wavelet, levels, t.n_out, tuple((b, j) for b, j, _ in products)
            )
        return Operator(given.base, action, given.train, view=t.view, scale=scale)

    names = [name for band, level, _ in products for name in _names(band, level)]
    axes: dict[str, tuple[str | None, ...]] = {
        name: (("in" if name[0] == "a" else "out"), None) for name in names
    }
    axes["r"] = (None, None)
    return reparam(Method(init, attach, axes, check=check), select=select, views=views)


def _names(band: str, level: int) -> tuple[str, str]:
    return f"a_{band or 'all'}{level}", f"b_{band or 'all'}{level}"


@dataclasses.dataclass(frozen=True)
class Interleaved:
    """The shared form with Haar wavelets: channels of one residue feed each other."""

    levels: int
    n_out: int

    def __call__(self, train: Any, shared: Any, x: jax.Array) -> jax.Array:
        """`x` [..., n_in] to [..., n_out]."""
        x = _pad(x, 2**self.levels).reshape(*x.shape[:-1], -1, 2**self.levels)
        a, b = (train[name] for name in _names("", self.levels))
        hidden = jnp.einsum("...ic,ir->...cr", x, a)
        y = jnp.einsum("...cr,or->...oc", hidden, b)
        return y.reshape(*y.shape[:-2], -1)[..., : self.n_out]

    def dense(self, train: Any, shared: Any, n_in: int, n_out: int) -> jax.Array:
        """The Kronecker product with a unit matrix."""
        a, b = (train[name] for name in _names("", self.levels))
        product = jnp.matmul(a, b.T, precision="highest")
        eye = jnp.eye(2**self.levels, dtype=product.dtype)
        return jnp.kron(product, eye)[:n_in, :n_out]


@dataclasses.dataclass(frozen=True)
class Wavelets:
    """Analysis of the inputs, products between bands, synthesis of the outputs."""

    wavelet: Wavelet
    levels: int
    n_out: int
    products: tuple[tuple[str, int], ...]  # band and level; ("", levels) is shared

    def __call__(self, train: Any, shared: Any, x: jax.Array) -> jax.Array:
        """`x` [..., n_in] to [..., n_out]."""
        x = _pad(x, 2**self.levels)
        size = -(-self.n_out // 2**self.levels) * 2**self.levels
        if self.products[0][0] == "":
            parts = [x]
            for _ in range(self.levels):
                parts = [half for p in parts for half in dwt(p, self.wavelet)]
            a, b = (train[name] for name in _names("", self.levels))
            made = [(p @ a) @ b.T for p in parts]
            for _ in range(self.levels):
                pairs = zip(made[::2], made[1::2], strict=True)
                made = [idwt(low, high, self.wavelet) for low, high in pairs]
            return made[0][..., : self.n_out]
        low, bands = x, {}
        for level in range(1, self.levels + 1):
            low, high = dwt(low, self.wavelet)
            bands[level] = {"L": low, "H": high}
        lead = x.shape[:-1]
        out: Any = jnp.zeros((*lead, size // 2**self.levels), x.dtype)
        for level in range(self.levels, 0, -1):
            made = {"L": out, "H": jnp.zeros_like(out)}
            for band, at in self.products:
                if at == level:
                    a, b = (train[name] for name in _names(band, level))
                    made[band[0]] = made[band[0]] + (bands[level][band[1]] @ a) @ b.T
            out = idwt(made["L"], made["H"], self.wavelet)
        return out[..., : self.n_out]

    def dense(self, train: Any, shared: Any, n_in: int, n_out: int) -> jax.Array:
        """The map of the unit vectors."""
        with jax.default_matmul_precision("highest"):
            return self(train, shared, jnp.eye(n_in))


def dwt(x: jax.Array, wavelet: Wavelet = "haar") -> tuple[jax.Array, jax.Array]:
    """The orthonormal, periodic wavelet analysis of the last axis.

    Args:
        x: [..., n] with n even.
        wavelet: "haar", "db2", "db3" or "db4".

    Returns:
        The low and the high band, each [..., n / 2].

    Raises:
        ValueError: if n is odd.

    Examples:
        >>> low, high = dwt(jnp.array([3.0, 1.0, 2.0, 2.0]))
        >>> print((low * 2**0.5).round(3), (high * 2**0.5).round(3))
        [4. 4.] [2. 0.]
    """
    if x.shape[-1] % 2:
        raise ValueError(f"dwt: an axis of {x.shape[-1]} cannot be halved; pad it")
    low, high = _filters(wavelet)
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    out = []
    for taps in (low, high):
        terms = [
            jnp.roll(pairs, -j, -2) @ jnp.asarray(taps[2 * j : 2 * j + 2], x.dtype)
            for j in range(len(taps) // 2)
        ]
        out.append(sum(terms[1:], terms[0]))
    return out[0], out[1]


def idwt(low: jax.Array, high: jax.Array, wavelet: Wavelet = "haar") -> jax.Array:
    """The inverse of `dwt`, and its transpose.

    Args:
        low: [..., n / 2].
        high: likewise.
        wavelet: as in `dwt`.

    Returns:
        [..., n].
    """
    filters = _filters(wavelet)
    pairs: Any = 0
    for band, taps in zip((low, high), filters, strict=True):
        for j in range(len(taps) // 2):
            tap = jnp.asarray(taps[2 * j : 2 * j + 2], band.dtype)
            pairs = pairs + jnp.roll(jnp.tensordot(band, tap, 0), j, -2)
    return pairs.reshape(*pairs.shape[:-2], -1)


def _filters(wavelet: Wavelet) -> tuple[np.ndarray, np.ndarray]:
    """Low- and high-pass taps, of unit norm."""
    moments = 1 if wavelet == "haar" else int(wavelet[2:])
    low = _daubechies(moments)
    high = low[::-1] * (-1.0) ** np.arange(len(low))
    return low, high


def _daubechies(moments: int) -> np.ndarray:
    """The minimum-phase filter with so many vanishing moments, by spectral factors."""
    # With y = sin^2(w / 2): |H|^2 = 2 (1 - y)^n P(y), P the truncated binomial series.
    series = [math.comb(moments - 1 + k, k) for k in range(moments)]
    taps = np.array([1.0])
    for _ in range(moments):
        taps = np.convolve(taps, [1.0, 1.0])
    for y in np.roots(series[::-1]):
        # y = (2 - z - 1/z) / 4: of each pair z, 1/z the one within the unit circle.
        z = np.roots([1.0, 4 * y - 2, 1.0])
        taps = np.convolve(taps, [1.0, -z[np.argmin(np.abs(z))]])
    taps = np.real(taps)
    return taps / np.linalg.norm(taps)


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    short = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, short)]) if short else x
