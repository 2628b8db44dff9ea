# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a train step moves and holds on a mesh, against what it must.

Nothing is timed on devices: the figures are those of compiled programs, for a TPU slice
(with the package `libtpu`) or for forced cpu devices. The bounds, for `n` devices along
the axis, P parameters, and gathered weights and gradients in 2 bytes:

- data: the gradients are summed, 2 (n-1)/n 2P bytes;
- fsdp: two gathers of the parameters and one scatter of the gradients,
  3 (n-1)/n 2P bytes;
- tensor: two sums of the activations forward, two backward, and one of those forward
  again because the block is computed again: 5 depth 2 (n-1)/n 2 batch length width.

Usage: python scaling.py [--topology v5e:4x4] [--model 100m] [--json FILE]
"""

import argparse
import json
import os
import pathlib
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")

import jax
import numpy as np

import wlab
from wlab import data, plan, train
from wlab.models.decoder import Decoder, tiny
from wlab.models.sizes import activation_bytes, get_size, parameter_counts


def bound(axis: str, n: int, config: object, batch: int, length: int) -> float:
    """The bytes that each device must send in a step; see the module."""
    params = parameter_counts(config).total
    share = (n - 1) / n
    if axis == "data":
        return 2 * share * 2 * params
    if axis == "fsdp":
        return 3 * share * 2 * params
    return 5 * config.depth * 2 * share * 2 * batch * length * config.width


def collective_rows(model: str, topology: str, length: int) -> list[dict]:
    config = get_size(model)
    rows = []
    for axis, mesh in (
        ("data", {"data": -1}),
        ("fsdp", {"fsdp": -1}),
        ("tensor", {"data": -1, "tensor": 2}),
    ):
        for optimizer in ("adamw", "eco"):
            found = plan.plan(model, optimizer, topology, length=length, mesh=mesh)
            n = found.mesh[axis]
            parts = found.devices // found.mesh.get("tensor", 1)
            local = found.batch // parts
            must = bound(axis, n, config, local, length)
            if axis == "tensor":  # beside the sum of the gradients over data
                must += bound("data", parts, config, local, length) / n
            activations = activation_bytes(config, local, length)
            row = {
                "axis": axis,
                "optimizer": optimizer,
                "devices": found.devices,
                "sent": sum(found.moved.values()),
                "bound": must,
                "ratio": sum(found.moved.values()) / must,
                "by_collective": found.moved,
                "temporaries": found.temporaries,
                "activation_formula": activations,
                "gradients": found.gradients,
                "temporaries_ratio": found.temporaries
                / (activations + found.gradients),
                "compile_s": found.compile_seconds,
            }
            rows.append(row)
            print(
                f"{axis:7}{optimizer:7}{row['sent'] / 2**20:9.1f} MiB sent, "
                f"{row['ratio']:.2f} x the bound; temporaries "
                f"{row['temporaries_ratio']:.2f} x the formula; compiled in "
                f"{row['compile_s']:.0f} s",
                flush=True,
            )
    return rows


def input_row(steps: int = 30) -> dict:
    """Batches a second of the pipeline against those that the tiny step consumes."""
    import optax

    tokens = data.text("pydoc").train
    batches = data.windows(tokens, batch=8, length=128, seed=0)
    model = Decoder(tiny())
    params = model.init(jax.random.key(0), np.zeros((8, 128), np.int32))["params"]
    tx = optax.adamw(1e-3)
    step = train.make_train_step(
        lambda p, b: train.next_token_loss(model.apply({"params": p}, b[:, :-1]), b), tx
    )
    state, run = train.init_state(params, tx), train.jit_step(step)
    batch = next(batches)
    state, _ = run(state, batch)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = run(state, batch)
    jax.block_until_ready(metrics)
    step_s = (time.perf_counter() - start) / steps
    start = time.perf_counter()
    for _ in range(10 * steps):
        next(batches)
    input_s = (time.perf_counter() - start) / (10 * steps)
    row = {"step_ms": 1e3 * step_s, "input_ms": 1e3 * input_s}
    row["ratio"] = step_s / input_s
    print(f"input pipeline: {row['ratio']:.0f} x what the tiny step consumes")
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--model", default="100m")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--json", type=pathlib.Path)
    args = parser.parse_args()
    result = {
        "model": args.model,
        "topology": args.topology,
        "length": args.length,
        "versions": {"wlab": wlab.__version__, "jax": jax.__version__},
        "input": input_row(),
        "collectives": collective_rows(args.model, args.topology, args.length),
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
