# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a run would need on a pod, from the real train step and the real compiler.

The step of a model and an optimiser is compiled ahead of time for a TPU topology, with
the compiler of the package `libtpu` and without a TPU. What the compiler says about
memory and collectives is what a pod would do.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
import pathlib
import re
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import wlab
from wlab import es, quant, train
from wlab._collectives import Collective, collectives
from wlab.core import sharding
from wlab.models import layered
from wlab.models.decoder import Decoder, DecoderConfig, apply_with_losses
from wlab.models.sizes import get_size, train_flops

__all__ = [
    "CHIPS",
    "OPTIMIZERS",
    "STRATEGIES",
    "Chip",
    "Plan",
    "largest_batch",
    "load",
    "plan",
    "save",
    "table",
]

_BALANCE = 0.01  # weight of the experts' load-balancing loss, as Switch has it


class Chip(NamedTuple):
    """A kind of TPU."""

    memory: int  # bytes of HBM that the compiler may use, for a chip
    devices: int  # that jax sees on a chip
    example: str  # a topology


_GIB = 2**30
CHIPS: Mapping[str, Chip] = {
    "v4": Chip(32 * _GIB, 2, "v4:4x4x4"),
    "v5e": Chip(16 * _GIB, 1, "v5e:16x16"),
    "v5p": Chip(95 * _GIB, 1, "v5p:4x4x4"),
    "v6e": Chip(32 * _GIB, 1, "v6e:16x16"),
    "tpu7x": Chip(192 * _GIB, 2, "tpu7x:4x4x4"),
}


class Recipe(NamedTuple):
    """An optimiser by name: how weights are stored, and the transform."""

    grid: str | None  # of the packed weights; None: float32
    make: Callable[[DecoderConfig], optax.GradientTransformation]
    layers: bool = False  # whether gradients are taken of the active layers only


def _plain(make: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """A transform that is the same for all models."""
    return lambda config: make(*args, **kwargs)


def _blocks(config: DecoderConfig) -> str:
    return "blocks" if config.scan else "blocks_*"


def _mup_adamw(config: DecoderConfig) -> optax.GradientTransformation:
    """With the decoder of half the width as its base."""
    sizes = {x: getattr(config, x) // 2 for x in ("width", "hidden", "heads")}
    base = dataclasses.replace(config, **sizes, kv_heads=max(1, config.kv_heads // 2))
    big, small = (
        jax.eval_shape(functools.partial(_make_params, c, None)) for c in (config, base)
    )
    return wlab.optim.mup_adamw(1e-3, 0.1, wlab.optim.mup.classify(big, small))


OPTIMIZERS: Mapping[str, Recipe] = {
    "sgd": Recipe(None, _plain(optax.sgd, 1e-3, momentum=0.9)),
    "adamw": Recipe(None, _plain(optax.adamw, 1e-3)),
    "lion": Recipe(None, _plain(optax.lion, 1e-4)),
    "adafactor": Recipe(None, _plain(optax.adafactor, 1e-3)),
    "muon": Recipe(
        None,
        _plain(
            optax.contrib.muon,
            1e-2,
            muon_weight_dimension_numbers=wlab.core.muon_dimension_numbers,
        ),
    ),
    "eco": Recipe("fp8_e4m3", _plain(wlab.optim.eco, 1e-3, grid="fp8_e4m3")),
    "eco-int4": Recipe("int4", _plain(wlab.optim.eco, 1e-3, grid="int4")),
    "eco-sgd": Recipe("fp8_e4m3", _plain(wlab.optim.eco_sgd, 1e-3, grid="fp8_e4m3")),
    "frugal": Recipe(None, _plain(wlab.optim.frugal, 1e-3, projection="columns")),
    "frugal-block": Recipe(None, _plain(wlab.optim.frugal, 1e-3)),
    "mup-adamw": Recipe(None, _mup_adamw),
    "classp": Recipe(None, _plain(wlab.optim.classp, 1e-2, threshold=-1.0, power=2.0)),
    "drop-muon": Recipe(
        None, lambda c: wlab.optim.drop_muon(1e-2, layers=_blocks(c)), layers=True
    ),
    "lisa": Recipe(
        None, lambda c: wlab.optim.lisa(1e-3, _blocks(c), min(2, c.depth)), layers=True
    ),
}

STRATEGIES: Mapping[str, Callable[[], wlab.core.Strategy]] = {
    "eggroll": functools.partial(
        es.eggroll, 1e-3, dense="freeze", axis_name="population"
    ),
    "eggroll-sum": functools.partial(
        es.eggroll, 1e-3, dense="freeze", axis_name="population", reduce="sum"
    ),
}
"""Searches by name: devices tell each other fitness, or add up their gradients.

Parameters are bfloat16, moved by plain gradient descent.
"""


class Plan(NamedTuple):
    """What one step needs; bytes are those of one device."""

    model: str
    optimizer: str
    topology: str
    devices: int
    chips: int
    mesh: dict[str, int]
    batch: int  # sequences; of a search, one for each member of the population
    length: int  # tokens of a sequence
    parameters: int  # bytes of the parameters as they are stored
    state: int  # bytes of the optimiser's state
    gradients: int  # bytes of the gradients, dense; they are part of the temporaries
    temporaries: int | None  # bytes; None: the compiler refuses and does not say
    total: int | None  # bytes of arguments, new outputs, temporaries; None: not told
    memory: int | None  # bytes that a device has; None: not known
    flops: float  # of the model, for a step on all devices, by formula
    moved: dict[str, float]  # bytes that a device sends in a step, by collective
    refused: bool  # whether the compiler found that it does not fit
    compile_seconds: float
    measured_state: int | None  # bytes held by a device in a real run, on cpu

    @property
    def fits(self) -> bool:
        """Whether a device has the memory."""
        if self.refused or self.total is None:
            return False
        return self.memory is None or self.total <= self.memory


def plan(
    model: str | DecoderConfig,
    optimizer: str,
    topology: str,
    *,
    batch: int | None = None,
    length: int = 2048,
    mesh: Mapping[str, int] | None = None,
    remat: bool | None = None,
    rules: sharding.Rules = (),
    population: int | None = None,
    chunk: int | None = None,
) -> Plan:
    """Compiles the train step of a decoder for a topology.

    Args:
        model: a size of `wlab.models.sizes`, or a config.
        optimizer: one of `OPTIMIZERS` or `STRATEGIES`.
        topology: a TPU slice as "v5e:16x16", or "cpu:8", for which the step also runs.
        batch: sequences of a step on all devices; by default one for each part into
            which the mesh divides a batch.
        length: tokens of a sequence.
        mesh: sizes of the axes, as in `wlab.core.sharding.make_mesh`; fsdp=-1 if none
            is given, population=-1 for a search.
        remat: whether activations are computed again; by default as the size says.
        rules: where parameters live, as in `wlab.core.sharding.specs`.
        population: members of a search, each with a sequence of its own; by default
            two for each device.
        chunk: members that a device runs at a time; by default a pair.

    Returns:
        The plan.

    Raises:
        ValueError: for an unknown size, optimiser or topology, a mesh or a batch that
            does not divide.
        ModuleNotFoundError: where the compiler, `libtpu`, is not installed.
    """
    config = get_size(model) if isinstance(model, str) else model
    if remat is not None:
        config = dataclasses.replace(config, remat=remat)
    if optimizer not in (known := [*OPTIMIZERS, *STRATEGIES]):
        raise ValueError(f"no optimizer {optimizer!r}: choose of {known}")
    searches = optimizer in STRATEGIES
    if not searches and (population or chunk):
        raise ValueError(
            f"population= and chunk= are for a search, which {optimizer!r} is not: "
            f"choose of {list(STRATEGIES)}"
        )
    devices, kind = _devices(topology)
    axes: dict[str, Any] = dict(mesh or {"population" if searches else "fsdp": -1})
    grid = sharding.make_mesh(devices=devices, **axes)
    if searches:
        if "population" not in axes:
            raise ValueError(f"mesh {axes}: a search divides its axis 'population'")
        batch = 2 * grid.shape["population"] if population is None else population
        make_params, tx, step = _search(config, optimizer, grid, batch, chunk or 2)
        spec = jax.P("population")
    else:
        spec = sharding.batch_spec(grid)
        parts = math.prod(grid.shape[n] for n in sharding.BATCH)
        batch = parts if batch is None else batch
        if batch < 1 or batch % parts:
            raise ValueError(
                f"batch={batch} does not divide into the {parts} parts of the mesh: "
                f"take a multiple of {parts}"
            )
        make_params, tx, step = _training(config, OPTIMIZERS[optimizer])
    abstract = train.abstract_state(make_params, tx, grid, rules=rules)
    tokens = jax.ShapeDtypeStruct(
        (batch, length + 1), jnp.int32, sharding=jax.NamedSharding(grid, spec)
    )
    start = time.perf_counter()
    compiled, refused = _compile(step, abstract, tokens, grid)
    seconds = time.perf_counter() - start
    chip = CHIPS.get(kind)
    dense = jax.eval_shape(wlab.materialise, abstract.params)
    placed = sharding.shardings(dense, grid, rules)
    gradients = _bytes(jax.tree.map(_typed, dense, placed))
    parameters, state = _bytes(abstract.params), _bytes(abstract.opt_state)
    moved: dict[str, float] = {}
    total, temporaries = refused
    if compiled is None and total is None and temporaries is not None:
        total = parameters + state + temporaries
    if compiled is not None:
        memory = compiled.memory_analysis()
        temporaries = memory.temp_size_in_bytes
        total = memory.argument_size_in_bytes + temporaries
        total += memory.output_size_in_bytes - memory.alias_size_in_bytes
        for item in _sent(compiled, len(devices), config.depth):
            moved[item.kind] = moved.get(item.kind, 0.0) + item.sent
    return Plan(
        model=model if isinstance(model, str) else "custom",
        optimizer=optimizer,
        topology=topology,
        devices=len(devices),
        chips=len(devices) // (chip.devices if chip else 1),
        mesh={name: size for name, size in grid.shape.items() if size > 1},
        batch=batch,
        length=length,
        parameters=parameters,
        state=state,
        gradients=gradients,
        temporaries=temporaries,
        total=total,
        memory=chip.memory // chip.devices if chip else None,
        # A search has no backward pass, which is two thirds.
        flops=train_flops(config, batch, length) / (3 if searches else 1),
        moved=moved,
        refused=compiled is None,
        compile_seconds=seconds,
        measured_state=_measure(make_params, tx, grid, rules) if not chip else None,
    )


def _training(
    config: DecoderConfig, recipe: Recipe
) -> tuple[Callable[[], Any], optax.GradientTransformation, train.StepFn]:
    """Parameters, optimiser and step of training by gradients."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), recipe.make(config))
    if recipe.layers:
        step = train.make_train_step(
            layered(config, _loss_of_logits), tx, active=wlab.optim.active_layers
        )
    else:
        step = train.make_train_step(_loss_fn(config), tx)
    return functools.partial(_make_params, config, recipe.grid), tx, step


def _search(
    config: DecoderConfig, name: str, mesh: Mesh, population: int, chunk: int
) -> tuple[Callable[[], Any], optax.GradientTransformation, train.StepFn]:
    """Parameters, optimiser and step of a search."""
    strategy = STRATEGIES[name]()
    tx = optax.chain(es.scale_by_strategy(strategy), optax.sgd(1.0))
    # No backward pass needs the activations.
    loss = _loss_fn(dataclasses.replace(config, remat=False))

    def fitness(params: Any, tokens: jax.Array) -> jax.Array:
        return -loss(params, tokens[None])

    step = es.make_evolution_step(
        fitness, strategy, tx, population, shared=False, chunk=chunk, mesh=mesh
    )

    def make_params() -> Any:
        return optax.tree.cast(_make_params(config, None), jnp.bfloat16)

    return make_params, tx, step


def largest_batch(
    model: str | DecoderConfig,
    optimizer: str,
    topology: str,
    *,
    mesh: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> Plan | None:
    """The plan with the largest batch that fits, found by bisection.

    Args:
        model: as in `plan`.
        optimizer: as in `plan`.
        topology: a TPU slice; the memory of a cpu is not known.
        mesh: as in `plan`.
        **kwargs: the other arguments of `plan`, but `batch`.

    Returns:
        The plan, or None where not even the smallest batch fits.
    """
    devices, kind = _devices(topology)
    if kind not in CHIPS:
        raise ValueError(f"the memory of {topology} is not known: name a TPU slice")
    sizes: dict[str, Any] = dict(mesh or {"fsdp": -1})
    shape = sharding.make_mesh(devices=devices, **sizes).shape
    unit = math.prod(shape[n] for n in sharding.BATCH)

    def attempt(n: int) -> Plan:
        return plan(model, optimizer, topology, batch=n * unit, mesh=mesh, **kwargs)

    best, low, high = None, 0, 1
    while (found := attempt(high)).fits:
        best, low, high = found, high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if (found := attempt(middle)).fits:
            best, low = found, middle
        else:
            high = middle
    return best


def table(plans: Sequence[Plan]) -> str:
    """Plans side by side, as Markdown; bytes are those of a device."""
    head = (
        *("model", "optimiser", "topology", "batch", "parameters", "state"),
        *("gradients", "temporaries", "total", "fits", "sent a step", "TFLOP a step"),
    )
    rows = [head, tuple("-" * 3 for _ in head)]
    for p in plans:
        fits = "yes" if p.fits else "no"
        if p.memory is not None:
            fits += f", of {_human(p.memory)}"
        rows.append(
            (
                *(p.model, p.optimizer, p.topology, f"{p.batch} x {p.length}"),
                *(_human(p.parameters), _human(p.state), _human(p.gradients)),
                "-" if p.temporaries is None else _human(p.temporaries),
                *(_human(p.total) if p.total else "-", fits),
                _human(sum(p.moved.values())) if p.moved else "-",
                f"{p.flops / 1e12:,.1f}",
            )
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def save(plans: Sequence[Plan], path: str | os.PathLike[str]) -> None:
    """Writes plans as JSON, with the versions that made them."""
    versions = {"wlab": wlab.__version__, "jax": jax.__version__}
    rows = [p._asdict() | {"fits": p.fits} for p in plans]
    text = json.dumps({"versions": versions, "plans": rows}, indent=1)
    pathlib.Path(path).write_text(text + "\n")


def load(path: str | os.PathLike[str]) -> list[Plan]:
    """The plans that `save` wrote.

    Raises:
        ValueError: if the file holds none.
    """
    try:
        rows = json.loads(pathlib.Path(path).read_text())["plans"]
        return [Plan(**{k: v for k, v in row.items() if k != "fits"}) for row in rows]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} holds no plans that wlab plan wrote") from error


def _human(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.0f} {unit}"
        n /= 1024
    return f"{n:.2f} GiB"


def _devices(topology: str) -> tuple[list[Any], str]:
    """The devices of a topology, and the kind of chip."""
    kind, _, shape = topology.partition(":")
    if kind == "cpu":
        wanted = int(shape) if shape.isdigit() else 0
        there = jax.devices("cpu")
        if not 0 < wanted <= len(there):
            raise ValueError(
                f"topology {topology!r}: this process has {len(there)} cpu devices; "
                "start it with JAX_NUM_CPU_DEVICES set to the number"
            )
        return there[:wanted], kind
    if kind not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        examples = ", ".join(chip.example for chip in CHIPS.values())
        raise ValueError(
            f"no topology {topology!r}: name a chip and a shape, such as {examples} or "
            "cpu:8"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise ModuleNotFoundError(
            "the TPU compiler is missing: pip install 'wlab[plan]' (libtpu, for Linux "
            "on x86)",
            name="libtpu",
        )
    # Without these the compiler asks the cloud which machine it is on, and serves one
    # process at a time, as a TPU would.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    from jax.experimental import topologies

    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    except Exception as error:  # jax raises several kinds
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"the TPU compiler has no topology {topology!r} ({reason}): take another "
            f"shape, such as {CHIPS[kind].example}"
        ) from error
    return list(found.devices), kind


def _compile(
    step: train.StepFn, state: train.TrainState, batch: Any, mesh: Mesh
) -> tuple[Any, tuple[int | None, int | None]]:
    """The compiled step; or None, and what a device would have needed: `_needed`."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        run: Any = train.jit_step(step, state)
        lowered = run.lower(state, batch)
    try:
        with warnings.catch_warnings():
            # What was compiled for a TPU cannot be read back from a cache without one.
            warnings.filterwarnings("ignore", "Error reading persistent compilation")
            return lowered.compile(), (None, None)
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        return None, _needed(text)


def _sent(compiled: Any, devices: int, depth: int) -> list[Collective]:
    """The collectives of a program; none where this jaxlib cannot print it (tpu7x)."""
    try:
        text = compiled.as_text()
    except jax.errors.JaxRuntimeError:
        return []
    # The loops over active layers end at run time: all layers, at most.
    return collectives(text, devices, loops=depth)


def _needed(text: str) -> tuple[int | None, int | None]:
    """Bytes of all and of the temporaries, as far as a refusal tells them."""
    scale = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

    def find(pattern: str) -> int | None:
        found = re.search(pattern + r"([\d.]+)([KMGT])", text)
        return int(float(found[1]) * scale[found[2]]) if found else None

    return find(r"[Uu]sed "), find(r"HLO temporaries \(")


def _make_params(config: DecoderConfig, grid: str | None) -> Any:
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = Decoder(config).init(jax.random.key(0), tokens)["params"]
    if grid is None:
        return params
    granularity = wlab.optim.eco_granularity(grid)
    return quant.quantize_tree(params, grid, granularity=granularity)


def _loss_of_logits(logits: Any, batch: jax.Array, routers: Any = None) -> jax.Array:
    loss = train.next_token_loss(logits, batch)
    return loss if routers is None else loss + _BALANCE * routers["balance_loss"]


def _loss_fn(config: DecoderConfig) -> Callable[[Any, jax.Array], jax.Array]:
    model = Decoder(config)

    def loss(params: Any, batch: jax.Array) -> jax.Array:
        tokens = batch[:, :-1]
        if not config.experts:
            return _loss_of_logits(model.apply({"params": params}, tokens), batch)
        logits, routers = apply_with_losses(model, params, tokens)
        return _loss_of_logits(logits, batch, routers)

    return loss


def _typed(x: Any, placed: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed)


def _bytes(tree: Any) -> int:
    """Bytes of a device's part of a tree of abstract arrays."""
    return sum(
        -(-math.prod(x.sharding.shard_shape(x.shape)) * _bits(x) // 8)
        for x in jax.tree.leaves(tree)
    )


def _bits(x: Any) -> int:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return 8 * x.dtype.itemsize
    return jax.dtypes.itemsize_bits(x.dtype)


def _measure(
    make_params: Callable[[], Any],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    rules: sharding.Rules,
) -> int:
    """Bytes of the parameters and the state that a device holds, made for real."""
    state = train.create_state(make_params, tx, mesh, rules=rules)
    held = 0
    for leaf in jax.tree.leaves((state.params, state.opt_state)):
        part = leaf.addressable_shards[0].data
        held += -(-part.size * _bits(part) // 8)
    return held
