# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Tests of what a compiled program is said to move."""

import jax
import jax.numpy as jnp
import pytest

from wlab._collectives import collectives
from wlab.core import sharding

P = jax.P


def _text(fn: object, x: jax.Array, mesh: jax.sharding.Mesh, out: P) -> str:
    places = jax.NamedSharding(mesh, out)
    return jax.jit(fn, out_shardings=places).lower(x).compile().as_text()


def _placed(shape: tuple[int, ...], mesh: jax.sharding.Mesh, spec: P) -> jax.Array:
    return jax.device_put(jnp.ones(shape), jax.NamedSharding(mesh, spec))


def test_a_gather_sends_what_the_others_lack():
    mesh = sharding.make_mesh(fsdp=8)
    x = _placed((64, 32), mesh, P("fsdp"))
    (one,) = collectives(_text(lambda x: x, x, mesh, P()), 8)
    assert (one.kind, one.size, one.group, one.times) == ("all-gather", 8192, 8, 1)
    assert one.sent == 8192 * 7 / 8


def test_a_sum_sends_twice_as_much():
    mesh = sharding.make_mesh(fsdp=8)
    x = _placed((64, 32), mesh, P("fsdp"))
    (one,) = collectives(_text(lambda x: x.sum(0), x, mesh, P()), 8)
    assert (one.kind, one.size, one.group) == ("all-reduce", 32 * 4, 8)
    assert one.sent == 2 * 32 * 4 * 7 / 8


def test_a_loop_counts_as_often_as_it_runs():
    mesh = sharding.make_mesh(fsdp=8)
    x = _placed((5, 64, 32), mesh, P(None, "fsdp"))

    def fn(x: jax.Array) -> jax.Array:
        def body(total: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            whole = jax.lax.with_sharding_constraint(w, jax.NamedSharding(mesh, P()))
            return total + jnp.sin(whole) @ total, None

        return jax.lax.scan(body, jnp.ones((32, 32)), x[:, :32])[0]

    found = [c for c in collectives(_text(fn, x, mesh, P()), 8) if c.times > 1]
    assert {c.times for c in found} == {5}


def test_those_of_a_shard_map_share_a_channel_and_count_each():
    mesh = sharding.make_mesh(fsdp=8)
    x = _placed((64, 32), mesh, P("fsdp"))

    def fn(x: jax.Array) -> jax.Array:
        first = jax.lax.psum(x.sum(0), "fsdp")
        return jax.lax.psum(jnp.sin(first) * x[0, 0], "fsdp")[:16]

    mapped = jax.shard_map(fn, mesh=mesh, in_specs=P("fsdp"), out_specs=P())
    found = collectives(_text(mapped, x, mesh, P()), 8)
    assert [c.kind for c in found] == ["all-reduce"] * 2


_TPU = """
%cond.1 (p: (s32[], bf16[8,16])) -> pred[] {
  %p = (s32[], bf16[8,16]) parameter(0)
  %c = s32[]{:T(128)} constant(7)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%body.1 (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %start = bf16[8,16]{1,0:T(8,128)} all-gather(%x), channel_id=3, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %inner = (s32[]) while(%t), condition=%cond.2, body=%body.2
  ROOT %r = (s32[], bf16[8,16]) tuple(%i, %start)
}

%cond.2 (p: (s32[])) -> pred[] {
  %c.2 = s32[] constant(4)
  ROOT %lt.2 = pred[] compare(%i, %c.2), direction=LT
}

%body.2 (p: (s32[])) -> (s32[]) {
  %step = bf16[8,16]{1,0:T(8,128)} all-gather(%x), channel_id=3, \
replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  ROOT %r.2 = (s32[]) tuple(%i)
}

ENTRY %main (x: bf16[2,16]) -> bf16[8,16] {
  %loop = (s32[], bf16[8,16]) while(%t), condition=%cond.1, body=%body.1
  ROOT %out = bf16[8,16] get-tuple-element(%loop), index=1
}
"""


def test_the_text_of_the_tpu_compiler_is_read():
    (one,) = collectives(_TPU, 8)
    # Started seven times; its further steps, in the loop within, are not starts.
    assert one == ("all-gather", 8 * 16 * 2, 4, 7)


def test_a_loop_that_counts_by_two():
    text = _TPU.replace(
        "  ROOT %r = (s32[], bf16[8,16]) tuple(%i, %start)",
        "  %two = s32[] constant(2)\n"
        "  %next = s32[] add(%i, %two), metadata={}\n"
        "  ROOT %r = (s32[], bf16[8,16]) tuple(%next, /*index=1*/%start)",
    )
    (one,) = collectives(text, 8)
    assert one.times == 4  # 0, 2, 4 and 6 are less than 7


def test_a_loop_that_does_not_say_how_often_is_an_error():
    with pytest.raises(ValueError, match="%loop does not say how often"):
        collectives(_TPU.replace("constant(7)", "parameter(1)"), 8)
    (one,) = collectives(_TPU.replace("constant(7)", "parameter(1)"), 8, loops=5)
    assert one.times == 5
