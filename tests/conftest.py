# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Test-wide settings: eight forced CPU devices, strict ranks, one compilation cache."""

import gc
import importlib.util
import os
import pathlib
import signal
import tempfile

# Before jax is imported: a mesh of eight devices on any machine.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
# One compilation cache, for child processes as well.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(pathlib.Path(tempfile.gettempdir()) / "wlab-compilation-cache"),
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jaxlib.version
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")
# Tracing makes many objects that live; looking through them is a tenth of the time.
gc.set_threshold(200_000, 20, 100)
# A shell's background ignores it, and so would all processes that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure(config: pytest.Config) -> None:
    # Tests compile more than they compute: what XLA makes need not be good.
    # It reads this when its first device is asked for; child processes inherit it.
    if config.option.markexpr != "slow":
        flags = [
            "--xla_backend_optimization_level=0",
            "--xla_cpu_parallel_codegen_split_count=1",
        ]
        # Large programs compile in a fifth of the time. XLA ends a process for a flag
        # that it does not have: newer ones do not, and a TPU's compiler.
        old = jaxlib.version.__version_info__ < (0, 11)
        if old and importlib.util.find_spec("libtpu") is None:
            flags.append("--xla_cpu_use_fusion_emitters=false")
        os.environ.setdefault("XLA_FLAGS", " ".join(flags))


@pytest.fixture
def key() -> jax.Array:
    return jax.random.key(0)


@pytest.fixture(params=["auto", "explicit"])
def mesh(request: pytest.FixtureRequest) -> jax.sharding.Mesh:
    """A 4 x 2 mesh with axes ``data`` and ``model``, of both axis types."""
    kind = {
        "auto": jax.sharding.AxisType.Auto,
        "explicit": jax.sharding.AxisType.Explicit,
    }[request.param]
    return jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
