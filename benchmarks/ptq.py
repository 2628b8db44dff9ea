# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What calibrated quantisation costs: ``uv run python benchmarks/ptq.py``.

GPTQ and its kin on one kernel beside the factorisation that they need, beside a plain
loop in torch (where it is installed), sixteen kernels in one vmap, the sums over inputs
beside a matrix product, and products with weights of a few bits beside the dense one.
All contenders run in turn in one process.
"""

import argparse
import functools
import json
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from _measure import Contender, Row, bandwidth, matmul_rate, race, save, show

import wlab
from wlab.core import linalg
from wlab.quant import gptaq, gptq, moments, pack, rescomp, rtn


def problem(n: int, m: int | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A kernel [n, m] and sums over correlated inputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    w = jax.random.normal(keys[0], (n, m or n))
    x = jax.random.normal(keys[1], (2 * n, n))
    x = x * jnp.exp(0.5 * jax.random.normal(keys[2], (n,)))
    x = x + 0.3 * jnp.roll(x, 1, axis=1)
    sums = moments(x, x + 0.05 * jnp.roll(x, 3, axis=1))
    assert sums.cross is not None
    return w, sums.h, sums.cross


def summed(tree: Any) -> jax.Array:
    """Something of every array, so that none is left out."""
    return sum(
        (jnp.sum(x.astype(jnp.float32)) for x in jax.tree.leaves(tree)), jnp.zeros(())
    )


def contender(name: str, fn: Callable[..., Any], parts: Any, base: str) -> Contender:
    """A function of arrays, which stay; its result is summed."""

    def step(carry: Any, inputs: Any) -> Any:
        del inputs
        parts, total = carry
        return parts, total + summed(fn(*parts))

    count = parts[0].size
    carry = (jax.tree.map(jnp.copy, parts), jnp.zeros(()))
    return Contender(name, step, carry, (), count, baseline=base)


def factor(w: jax.Array, h: jax.Array, d: jax.Array) -> Any:
    """The Cholesky factor and its inverse, which every solver needs."""
    del w, d
    eye = jnp.eye(len(h))
    low = linalg.cholesky(h + 0.01 * jnp.mean(jnp.diagonal(h)) * eye)
    return jax.scipy.linalg.solve_triangular(low, eye, lower=True)


def torch_loop(w: np.ndarray, h: np.ndarray, group: int, block: int) -> Any:
    """GPTQ as it is written for torch: a loop over the columns of [out, in]."""
    import torch  # pyrefly: ignore[missing-import]

    w, h = torch.from_numpy(w.T.copy()), torch.from_numpy(h.copy())

    def run() -> None:
        work, n = w.clone(), w.shape[1]
        damped = h + 0.01 * h.diagonal().mean() * torch.eye(n)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        upper = torch.linalg.cholesky(inverse, upper=True)
        out = torch.zeros_like(work)
        scale = zero = None
        for start in range(0, n, block):
            stop = min(start + block, n)
            part, errors = (
                work[:, start:stop].clone(),
                torch.zeros(len(w), stop - start),
            )
            u = upper[start:stop, start:stop]
            for i in range(stop - start):
                if (start + i) % group == 0:
                    own = work[:, start + i : start + i + group]
                    low = own.amin(1).clamp(max=0)
                    high = own.amax(1).clamp(min=0)
                    scale = (high - low).clamp(min=1e-5) / 15
                    zero = torch.round(-low / scale)
                code = torch.clamp(torch.round(part[:, i] / scale) + zero, 0, 15)
                q = scale * (code - zero)
                out[:, start + i] = q
                e = (part[:, i] - q) / u[i, i]
                part[:, i:] -= e[:, None] * u[i, i:][None]
                errors[:, i] = e
            work[:, stop:] -= errors @ upper[start:stop, stop:]

    return run


def against_torch(n: int, group: int, repeats: int) -> dict[str, float] | None:
    """Milliseconds of both, in turn, and the ratio of their pairs."""
    try:
        import torch  # noqa: F401  # pyrefly: ignore[missing-import]
    except ImportError:
        return None
    w, h, _ = problem(n)
    theirs = torch_loop(np.asarray(w), np.asarray(h), group, 128)
    ours = jax.jit(functools.partial(gptq, bits=4, group=group)).lower(w, h).compile()
    times: dict[str, list[float]] = {"wlab": [], "torch": []}
    for i in range(repeats + 1):
        for name, fn in (("wlab", lambda: ours(w, h)), ("torch", theirs)):
            start = time.perf_counter()
            jax.block_until_ready(fn())
            if i:
                times[name].append(1e3 * (time.perf_counter() - start))
    pairs = zip(times["wlab"], times["torch"], strict=True)
    return {
        "columns": n,
        "wlab_ms": min(times["wlab"]),
        "torch_ms": min(times["torch"]),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


def compile_seconds(n: int, group: int) -> float:
    """How long GPTQ takes to compile at a size."""
    shape = jax.ShapeDtypeStruct((n, n), jnp.float32)
    start = time.perf_counter()
    jax.jit(functools.partial(gptq, bits=4, group=group)).lower(shape, shape).compile()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--columns", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    sections: dict[str, list[Row]] = {}
    roof = bandwidth()
    run = functools.partial(race, roof=roof)

    compiled = {n: compile_seconds(n, args.group) for n in (*args.columns, 4096)}
    for n, seconds in compiled.items():
        print(f"GPTQ, {n} x {n}: {seconds:.2f} s to compile")

    for n in args.columns:
        parts = problem(n)
        base = "factorisation"
        options = {"bits": 4, "group": args.group}
        rows = [
            contender(base, factor, parts, base),
            contender("rtn", lambda w, h, d, o=options: rtn(w, **o), parts, base),
            contender("gptq", lambda w, h, d, o=options: gptq(w, h, **o), parts, base),
            contender("gptaq", lambda *a, o=options: gptaq(*a, **o), parts, base),
            contender("rescomp", lambda *a, o=options: rescomp(*a, **o), parts, base),
        ]
        title = f"one kernel of {n} x {n}, 4 bits, groups of {args.group}"
        sections[title] = run(rows, None, repeats=args.repeats)
        show(title, sections[title])

    n, many = 256, 16
    w, h, _ = problem(n)
    keys = jax.random.split(jax.random.key(7), many)
    stack = jnp.stack([w + 0.1 * jax.random.normal(key, w.shape) for key in keys])
    hs = jnp.broadcast_to(h, (many, *h.shape))
    one = functools.partial(gptq, bits=4, group=args.group)
    base = "sixteen in turn"
    rows = [
        contender(
            base, lambda w, h: jax.lax.map(lambda a: one(*a), (w, h)), (stack, hs), base
        ),
        contender("sixteen in one vmap", jax.vmap(one), (stack, hs), base),
    ]
    title = f"sixteen kernels of {n} x {n}"
    sections[title] = run(rows, None, repeats=args.repeats)
    show(title, sections[title])

    n, tokens = 1024, 4096
    x = jax.random.normal(jax.random.key(0), (tokens, n))
    base = "product"
    rows = [
        contender(base, lambda x: x.T @ x, (x,), base),
        contender("sums", lambda x: moments(x).h, (x,), base),
        contender(
            "sums, weighted", lambda x: moments(x, None, x[:, 0] ** 2), (x,), base
        ),
    ]
    title = f"sums over {tokens} inputs of {n}"
    sections[title] = run(rows, None, repeats=args.repeats)
    show(title, sections[title])

    dense = jax.random.normal(jax.random.key(0), (1024, 1024))
    for tokens in (1, 256):
        x = jax.random.normal(jax.random.key(1), (tokens, 1024))
        base = "dense"
        product = wlab.lift(lambda w, x: x @ w)
        rows = [contender(base, product, (dense, x), base)]
        for b in (4, 3, 2):
            made = rtn(dense, bits=b, group=128)
            rows.append(contender(f"{b} bits", product, (made, x), base))
            rows.append(contender(f"{b} bits, packed", product, (pack(made), x), base))
        title = f"{tokens} rows times a kernel of 1024 x 1024"
        sections[title] = run(rows, None, repeats=args.repeats)
        show(title, sections[title])

    beside = []
    for n in (m for m in args.columns if m >= 1024):
        found = against_torch(n, args.group, args.repeats)
        if found is not None:
            beside.append(found)
            print(json.dumps(found))
    if args.out:
        save(
            args.out,
            sections,
            matmul_flops=matmul_rate(),
            bandwidth=roof,
            compile_seconds={str(n): s for n, s in compiled.items()},
            torch=beside,
        )


if __name__ == "__main__":
    main()
