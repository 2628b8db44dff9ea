# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Honest timing: compiled apart, interleaved, beside the roof of the same process."""

import dataclasses
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

from wlab.core import bits
from wlab.recipes import device, versions


@dataclasses.dataclass
class Contender:
    """A step ``(carry, inputs) -> carry`` that gives its carry to the next call.

    Attributes:
      name: its row.
      step: the function; `carry` is donated.
      carry: what it starts from.
      state: the part of the carry that is optimiser state.
      parameters: their count.
      traffic: least bytes a parameter that a step must read and write.
      baseline: the row whose time it is divided by.
      quality: a figure of merit at an equal budget, if there is one.
    """

    name: str
    step: Callable[[Any, Any], Any]
    carry: Any
    state: Any
    parameters: int
    traffic: float = 0.0
    baseline: str = ""
    quality: float | None = None


@dataclasses.dataclass
class Row:
    """What was measured of a contender."""

    name: str
    quality: float | None  # held-out or training loss after an equal number of steps
    compile_s: float
    ms: float  # fastest of the interleaved repeats
    ms_median: float
    frac_of_roof: float | None  # least traffic at the measured bandwidth, over ms
    state_B: float  # bytes a parameter of weights and optimiser state
    temp_B: float  # bytes a parameter of temporaries
    donated: bool  # whether weights and state are written in place
    vs_baseline: float | None  # ms over the baseline's, median of paired repeats
    baseline: str


def bandwidth(megabytes: int = 64, repeats: int = 7) -> float:
    """Bytes a second of ``a + s * b``, the fastest of several."""
    n = megabytes * 2**20 // 4
    a, b = jnp.ones(n), jnp.ones(n)
    triad = jax.jit(lambda a, b: a + 0.5 * b).lower(a, b).compile()
    jax.block_until_ready(triad(a, b))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(triad(a, b))
        times.append(time.perf_counter() - start)
    return 12 * n / min(times)


def matmul_rate(n: int = 1024, repeats: int = 5) -> float:
    """Float32 operations a second of a square product."""
    a = jnp.ones((n, n))
    product = jax.jit(jnp.matmul).lower(a, a).compile()
    jax.block_until_ready(product(a, a))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def race(
    contenders: Sequence[Contender], inputs: Any, repeats: int, roof: float
) -> list[Row]:
    """Compile each, then run them in turn: A B C, A B C, ..."""
    compiled, seconds, stats = {}, {}, {}
    for c in contenders:
        start = time.perf_counter()
        lowered = jax.jit(c.step, donate_argnums=0).lower(c.carry, inputs)
        compiled[c.name] = lowered.compile()
        seconds[c.name] = time.perf_counter() - start
        stats[c.name] = compiled[c.name].memory_analysis()
    carry = {c.name: c.carry for c in contenders}
    held = {c.name: bits.nbytes(c.carry) for c in contenders}
    state = {c.name: bits.size_in_bits(c.state) / 8 for c in contenders}
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for i in range(repeats + 2):
        for c in contenders:
            jax.block_until_ready(carry[c.name])
            start = time.perf_counter()
            carry[c.name] = compiled[c.name](carry[c.name], inputs)
            jax.block_until_ready(carry[c.name])
            if i >= 2:
                times[c.name].append(time.perf_counter() - start)
    rows = []
    for c in contenders:
        best = min(times[c.name])
        ratio = None
        if c.baseline:
            pairs = zip(times[c.name], times[c.baseline], strict=True)
            ratio = statistics.median(a / b for a, b in pairs)
        rows.append(
            Row(
                name=c.name,
                quality=c.quality,
                compile_s=seconds[c.name],
                ms=1e3 * best,
                ms_median=1e3 * statistics.median(times[c.name]),
                frac_of_roof=(
                    c.traffic * c.parameters / roof / best if c.traffic else None
                ),
                state_B=state[c.name] / c.parameters,
                temp_B=stats[c.name].temp_size_in_bytes / c.parameters,
                donated=stats[c.name].alias_size_in_bytes >= 0.98 * held[c.name],
                vs_baseline=ratio,
                baseline=c.baseline,
            )
        )
    return rows


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as a table."""
    table = Table(title=title)
    for name in (field.name for field in dataclasses.fields(Row)):
        table.add_column(name, justify="left" if name == "name" else "right")
    for row in rows:
        cells = []
        for value in dataclasses.astuple(row):
            if isinstance(value, bool):
                cells.append("yes" if value else "NO")
            elif isinstance(value, float):
                cells.append(f"{value:.3g}")
            else:
                cells.append("-" if value is None else str(value))
        table.add_row(*cells)
    Console(width=170).print(table)


def save(path: pathlib.Path, sections: dict[str, Sequence[Row]], **facts: Any) -> None:
    """Write the rows and what the machine was as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "versions": versions(),
        "device": device(),
        **facts,
        "sections": {
            name: [dataclasses.asdict(row) for row in rows]
            for name, rows in sections.items()
        },
    }
    path.write_text(json.dumps(content, indent=2) + "\n")
