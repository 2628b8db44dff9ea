# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""One host of a run, started by test_hosts.py: trains a tiny decoder and writes it."""

import argparse
import json
import pathlib
import time

import jax
import numpy as np
import optax

from wlab import data, train
from wlab.core import leaves_with_paths, sharding
from wlab.models.decoder import Decoder, tiny


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--pause", type=float, default=0.0)
    parser.add_argument("--timeout", type=int, default=60)
    parser.add_argument("--fails", type=int)  # this host, at step 3
    args = parser.parse_args()

    index, count = train.start_hosts(timeout=args.timeout, heartbeat=10)
    assert (index, count) == train.start_hosts()
    assert (index, count) == (jax.process_index(), jax.process_count())

    parts = {"data": 2, "fsdp": 2} if jax.device_count() == 4 else {}
    mesh = sharding.make_mesh(**parts)
    model = Decoder(
        tiny(
            **{"width": 16, "depth": 1, "heads": 2, "kv_heads": 1, "head_dim": 8},
            **{"hidden": 32, "scan": False, "remat": False},
        )
    )

    def make():
        return model.init(jax.random.key(0), np.zeros((8, 16), int))["params"]

    def loss(params, tokens):
        logits = model.apply({"params": params}, tokens[:, :-1])
        return train.next_token_loss(logits, tokens)

    tx = optax.sgd(0.3, momentum=0.9)
    tokens = np.random.default_rng(0).integers(0, 256, 5000)
    batches = data.windows(tokens, batch=8, length=16, seed=0, shard=(index, count))
    rows = []

    def seen():
        for batch in batches:
            rows.append(len(batch))
            if args.fails == index and len(rows) == 3:
                raise OSError("the disk of this host")
            yield batch

    class Seen:  # with the position of the batches
        __iter__ = staticmethod(seen)
        get_state = staticmethod(batches.get_state)
        set_state = staticmethod(batches.set_state)

    with train.Checkpoints(args.folder / "checkpoints", every=2) as checkpoints:
        state = train.create_state(make, tx, mesh)
        state, history = train.resume(checkpoints, state, Seen())
        first = int(state.step)
        state, history = train.fit(
            train.make_train_step(loss, tx),
            state,
            Seen(),
            steps=args.steps,
            every=1,
            checkpoints=checkpoints,
            history=history,
            progress=lambda *_: time.sleep(args.pause),
        )
    assert set(rows) == {8 // count}
    copied = jax.NamedSharding(mesh, jax.P())
    whole = jax.jit(lambda params: params, out_shardings=copied)(state.params)
    np.savez(args.folder / f"end-{index}.npz", **dict(leaves_with_paths(whole)))
    told = {"first": first, "loss": history["loss"].tolist(), "count": count}
    (args.folder / f"end-{index}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
