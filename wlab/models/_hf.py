# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints in the files of Hugging Face's transformers: read and written.

A folder holds ``config.json`` and ``model.safetensors``, or shards of it that
``model.safetensors.index.json`` lists. Llama, Mistral, Qwen2, Qwen3 and the first Gemma
are the `Decoder` with options. Their kernels are stored as `[out, in]` with the heads
joined, or as codes in GPTQ's layout; the pairs that rotary positions turn are the same.
"""

import dataclasses
import functools
import math
import os
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from wlab import _safetensors
from wlab.core import (
    MatrixView,
    leaves_with_paths,
    map_with_path,
    materialise,
    sharding,
)
from wlab.core._lift import cut
from wlab.models import _hf_config, _hf_gptq
from wlab.models._hf_config import CONFIG
from wlab.models.decoder import Decoder, DecoderConfig

__all__ = ["from_hf", "hf_names", "to_hf"]

_TENSORS = "model.safetensors"
INDEX = _TENSORS + ".index.json"
_MODULES = {
    "embed": "model.embed_tokens",
    "attention_norm": "input_layernorm",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.o_proj",
    "attention/query_norm": "self_attn.q_norm",
    "attention/key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp/gate": "mlp.gate_proj",
    "mlp/up": "mlp.up_proj",
    "mlp/down": "mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}
_HEAD = "lm_head.weight"
_TABLE = "model.embed_tokens.weight"
# What says nothing of the weights, and is the same in the folder that is written.
_BESIDE = re.compile(
    r"(tokenizer|vocab|merges|special_tokens|added_tokens|chat_template|generation_config"
    r"|LICEN[CS]E|USE_POLICY|NOTICE)"
)


def from_hf(
    path: str | os.PathLike[str],
    *,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
    **overrides: Any,
) -> tuple[Decoder, Any]:
    """Reads a checkpoint of a Llama, Mistral, Qwen2, Qwen3 or the first Gemma.

    Kernels that are stored by GPTQ stay codes: they are `wlab.Quantized` weights, in
    the place and of the shape of the arrays, and the model runs under `wlab.lift`.

    Args:
        path: the folder. Nothing is downloaded.
        mesh: where the parameters shall live, as `wlab.core.sharding.specs` says: each
            device is given its part, leaf by leaf, and none ever holds all of them.
            None: on the default device.
        rules: of `specs`, for leaves that shall live elsewhere.
        **overrides: fields of `DecoderConfig` to set otherwise: ``scan=True`` stacks
            the blocks. ``param_dtype`` is by default that of the files, and ``dtype``,
            of the activations, too.

    Returns:
        The decoder and its parameters.

    Raises:
        FileNotFoundError: if there is no config, no tensors or not all shards.
        ValueError: for another architecture, an option of it that the decoder does not
            have, a file that is cut off, tensors that are missing, that are too many or
            whose shape is not that of the config, and rules that `specs` refuses or
            that are given without a mesh.
    """
    if rules and mesh is None:
        raise ValueError(f"rules={rules} say where on a mesh leaves live: give mesh=")
    folder = pathlib.Path(path)
    raw = _hf_config.read_json(folder / CONFIG)
    config = _hf_config.read_config(raw, folder)
    stored_as = _hf_gptq.read_config(raw, folder)
    tensors = _tensors(folder)
    codes = {} if stored_as is None else _take_codes(tensors, config)
    stored = np.dtype(tensors[_TABLE].dtype if _TABLE in tensors else np.float32)
    config = dataclasses.replace(config, dtype=stored, param_dtype=stored)
    config = dataclasses.replace(config, **overrides)
    if config.tied and _HEAD in tensors and _TABLE in tensors:
        if not np.array_equal(tensors[_HEAD], tensors[_TABLE]):
            raise ValueError(
                f"{folder}: {_HEAD} differs from {_TABLE}, to which the config ties "
                "it; pass tied=False to use it"
            )
        del tensors[_HEAD]
    given = config.param_dtype if "param_dtype" in overrides else None
    abstract = _abstract(config)
    _check(abstract, tensors, set(codes), folder, given)
    specs: dict[str, Any] = {}
    if mesh is not None:
        specs = dict(leaves_with_paths(sharding.specs(abstract, mesh, rules)))

    def load(path: str, leaf: Any) -> Any:
        name, layers = tensor_name(path), _layers(path, leaf)
        shape = leaf.shape[1:] if layers else leaf.shape
        names = [name.format(i) for i in range(layers or 1)]
        if found := [codes[name] for name in names if name in codes]:
            if len(found) < len(names):
                raise ValueError(
                    f"{folder}: {name} is quantised in {len(found)} layers of "
                    f"{len(names)}; pass scan=False to have it so"
                )
            assert stored_as is not None
            try:
                kernel = load_kernel(found, stored_as, path, shape, bool(layers))
                return place(kernel, path)
            except ValueError as error:
                raise ValueError(f"{folder}: {name}: {error}") from error
        dtype = given or tensors[names[0]].dtype
        out = np.empty((len(names), *shape), dtype)
        for i, name in enumerate(names):
            out[i] = ours(tensors[name], path, shape)
        return place(out if layers else out[0], path)

    def place(leaf: Any, path: str) -> Any:
        if mesh is None:
            return jax.tree.map(jnp.asarray, leaf)
        if isinstance(leaf, np.ndarray):
            where = NamedSharding(mesh, specs[path])
            return jax.make_array_from_callback(leaf.shape, where, leaf.__getitem__)
        parts = sharding.of_parts(leaf, specs[path], mesh)
        where = jax.tree.map(lambda spec: NamedSharding(mesh, spec), parts)
        return jax.device_put(leaf, where)

    def load_kernel(found: Any, how: Any, path: str, shape: Any, stack: bool) -> Any:
        dtype = config.param_dtype
        return kernel_of_codes(found, how, path, shape, dtype=dtype, stack=stack)

    return Decoder(config), map_with_path(load, abstract)


def to_hf(
    path: str | os.PathLike[str],
    model: Decoder | DecoderConfig,
    params: Any,
    *,
    template: str | os.PathLike[str] | None = None,
    layout: Literal["dense", "gptq", "gptq_v2"] = "dense",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Writes a checkpoint that transformers reads.

    The folder appears when all of it is written.

    Args:
        path: the folder, which must not be there.
        model: the decoder, or its config.
        params: its parameters.
        template: a checkpoint of the same architecture and sizes, such as the one that
            `from_hf` read. Its config, with all that wlab has no use for (tokens with a
            meaning, the longest sequence), its tokenizer and its licence are copied.
            None: the architecture is the first that has the options of `model`, and its
            config says no more than `model` does.
        layout: "dense" writes what structured weights stand for. The others write the
            kernels of the blocks as they are in checkpoints of GPTQ: all must be
            `wlab.Quantized` matrices alike, in groups of inputs, whose scales are
            stored as float16. Most readers have "gptq"; not with zero points of 0,
            which weights that are not symmetric may have, and "gptq_v2" has.
        shard_bytes: the largest file of tensors, unless one tensor is larger.

    Raises:
        FileExistsError: if there is something at `path`.
        FileNotFoundError: if `template` has no config.
        TypeError: if `layout` wants codes of a kernel that has none.
        ValueError: if no architecture has the options of `model`, it is not the model
            of `template`, or the parameters are not those of `model`, or not what
            `layout` can store.

    Examples:
        >>> import jax, numpy as np, pathlib, tempfile
        >>> from wlab.models import from_hf, to_hf
        >>> from wlab.models.decoder import Decoder, tiny
        >>> model = Decoder(tiny(depth=1, vocab=32))
        >>> tokens = np.zeros((1, 8), np.int32)
        >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     to_hf(pathlib.Path(folder, "mine"), model, params)
        ...     again, same = from_hf(pathlib.Path(folder, "mine"), scan=True)
        >>> jax.tree.all(jax.tree.map(np.array_equal, params, same))
        True
    """
    config = model.config if isinstance(model, Decoder) else model
    folder = pathlib.Path(path)
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} is there already: name a new folder")
    if shard_bytes <= 0:
        raise ValueError(f"shard_bytes={shard_bytes} must be positive")
    leaves = _leaves(config, params)
    dtype = np.dtype(leaves["embed/embedding"].dtype)
    stored_as = None if layout == "dense" else _stored_as(leaves, layout)
    text = _hf_config.config_text(config, dtype, template, stored_as)

    shapes: dict[str, jax.ShapeDtypeStruct] = {}
    values: dict[str, Callable[[], np.ndarray]] = {}
    for path_, leaf in leaves.items():
        layers = _layers(path_, leaf)
        shape = leaf.shape[1:] if layers else leaf.shape
        for i in range(layers or 1):
            name = tensor_name(path_).format(i)
            layer = i if layers else None
            if stored_as is not None and in_blocks(path_):
                both = sides(path_, shape)
                module = name.removesuffix("weight")
                made = _codes(path_, leaf, layer, both, stored_as.form)
                for suffix, x in _hf_gptq.shapes(both, stored_as).items():
                    shapes[module + suffix] = x
                    values[module + suffix] = functools.partial(made, suffix)
                continue
            shapes[name] = jax.ShapeDtypeStruct(_their_shape(path_, shape), leaf.dtype)
            values[name] = _value(path_, leaf, layer)

    # Beside the folder, so that the last step is a renaming within one file system.
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_name(f".{folder.name}.{os.getpid()}")
    made.mkdir()
    try:
        write_beside(made, text, template, stored_as)
        _write_tensors(made, shapes, lambda name: values[name](), shard_bytes)
        made.rename(folder)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise


def hf_names(model: Decoder | DecoderConfig) -> dict[str, str]:
    """Names that the kernels' modules have in transformers, by path.

    They are what `wlab.peft.from_hf` and `wlab.peft.to_hf` take, so that an adapter
    made with peft works on a decoder of `from_hf`.

    Args:
        model: the decoder, or its config.

    Returns:
        The names; of stacked blocks with ``{}`` for the layer's number.

    Examples:
        >>> from wlab.models import hf_names
        >>> from wlab.models.decoder import tiny
        >>> hf_names(tiny())["blocks/mlp/up/kernel"]
        'model.layers.{}.mlp.up_proj'
    """
    config = model.config if isinstance(model, Decoder) else model
    return {
        path: tensor_name(path).removesuffix(".weight")
        for path, _ in leaves_with_paths(_abstract(config))
        if path.endswith("/kernel")
    }


def write_beside(
    folder: pathlib.Path,
    text: str,
    template: str | os.PathLike[str] | None,
    stored_as: _hf_gptq.Stored | None,
) -> None:
    """Writes all that is no tensor: configs, and what the template has beside them."""
    (folder / CONFIG).write_text(text, encoding="utf-8")
    if stored_as is not None:
        text = _hf_config.dump(_hf_gptq.write_config(stored_as))
        (folder / _hf_gptq.CONFIG).write_text(text, encoding="utf-8")
    if template is not None:
        for file in sorted(pathlib.Path(template).iterdir()):
            if file.is_file() and _BESIDE.match(file.name):
                shutil.copyfile(file, folder / file.name)


# --- Tensors ---------------------------------------------------------------------


def _abstract(config: DecoderConfig) -> Any:
    """The parameters of a decoder by shape and dtype."""
    if config.experts:
        raise ValueError(
            f"experts={config.experts}: of the architectures that are read and written "
            "none has experts"
        )
    # One block tells of all; tracing a hundred of them would take its time.
    one = Decoder(dataclasses.replace(config, depth=1, scan=False))
    tokens = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    params = jax.eval_shape(one.init, jax.random.key(0), tokens)["params"]
    block, depth = params.pop("blocks_0"), config.depth
    if not config.scan:
        return params | {f"blocks_{i}": block for i in range(depth)}
    stack = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((depth, *x.shape), x.dtype), block
    )
    return params | {"blocks": stack}


def _split(path: str) -> tuple[str | None, str, str]:
    """Layer ("{}" for stacked ones, None outside), module and name of a leaf."""
    module, _, name = path.rpartition("/")
    block, _, inside = module.partition("/")
    if block == "blocks":
        return "{}", inside, name
    if block.startswith("blocks_"):
        return block.removeprefix("blocks_"), inside, name
    return None, module, name


def tensor_name(path: str) -> str:
    """Their name of a leaf, with {} for the layer of stacked ones."""
    layer, module, name = _split(path)
    kind = "bias" if name == "bias" else "weight"
    where = "" if layer is None else f"model.layers.{layer}."
    return f"{where}{_MODULES[module]}.{kind}"


def _layers(path: str, leaf: Any) -> int:
    """How many layers a leaf stacks; 0 for none."""
    return leaf.shape[0] if path.startswith("blocks/") else 0


def sides(path: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """Inputs and outputs of a kernel of one layer."""
    _, module, _ = _split(path)
    n = 2 if module == "attention/out" else 1
    return math.prod(shape[:n]), math.prod(shape[n:])


def _their_shape(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    if path.endswith("/kernel"):
        return sides(path, shape)[::-1]
    return (math.prod(shape),) if path.endswith("/bias") else shape


def ours(x: np.ndarray, path: str, shape: tuple[int, ...]) -> np.ndarray:
    """The leaf at a path, of one layer's shape, from their tensor."""
    return (x.T if path.endswith("/kernel") else x).reshape(shape)


def theirs(x: np.ndarray, path: str) -> np.ndarray:
    """Their tensor of one layer's leaf."""
    if path.endswith("/kernel"):
        return x.reshape(sides(path, x.shape)).T
    return x.reshape(_their_shape(path, x.shape))


def _value(path: str, leaf: Any, layer: int | None) -> Callable[[], np.ndarray]:
    """One tensor, made when it is asked for, and of one layer alone."""

    def value() -> np.ndarray:
        if layer is None:
            x = np.asarray(materialise(leaf))
        else:
            starts = [layer, *[0] * (len(leaf.shape) - 1)]
            part = cut(leaf, starts, [1, *leaf.shape[1:]])
            x = np.asarray(materialise(part))[0]
        return theirs(x, path)

    return value


def in_blocks(path: str) -> bool:
    """Whether a leaf is a kernel of a block, which is what GPTQ stores as codes."""
    return path.endswith("/kernel") and path.startswith("blocks")


def _codes(
    path: str, leaf: Any, layer: int | None, sides: tuple[int, int], form: Any
) -> Callable[[str], np.ndarray]:
    """The arrays of a kernel of one layer by suffix, made when they are asked for."""

    @functools.lru_cache(1)
    def value(suffix: str) -> np.ndarray:
        w = leaf if layer is None else _hf_gptq.layer_of(leaf, layer)
        try:
            return _hf_gptq.store(w, sides, form)[suffix]
        except ValueError as error:
            where = "" if layer is None else f" of layer {layer}"
            raise ValueError(f"parameter {path!r}{where}: {error}") from error

    return value


def _stored_as(leaves: Mapping[str, Any], form: Any) -> _hf_gptq.Stored:
    """What the config is to say of the kernels, which must all be codes."""
    first = {}
    for path, leaf in leaves.items():
        if not in_blocks(path):
            continue
        layers = _layers(path, leaf)
        shape = tuple(leaf.shape[1:] if layers else leaf.shape)
        try:
            w = _hf_gptq.layer_of(leaf, 0) if layers else leaf
            first[path] = _hf_gptq.matrix_of(w, sides(path, shape))
            _hf_gptq.check_sizes(*sides(path, shape), _hf_gptq.bits_of(first[path]))
        except (TypeError, ValueError) as error:
            raise type(error)(f"parameter {path!r}: {error}") from error
    return _hf_gptq.settings(first, form)


def kernel_of_codes(
    layers: Any,
    stored_as: _hf_gptq.Stored,
    path: str,
    shape: tuple[int, ...],
    *,
    dtype: Any,
    stack: bool,
    ordered: bool | None = None,
) -> Any:
    """The kernel at a path, of one layer's shape, from the arrays of its layers."""
    n = 2 if _split(path)[1] == "attention/out" else 1
    return _hf_gptq.load(
        layers,
        stored_as,
        sides(path, shape),
        MatrixView.of(n, len(shape) - n),
        shape,
        dtype=dtype,
        stack=stack,
        ordered=ordered,
    )


def _take_codes(
    tensors: dict[str, np.ndarray], config: DecoderConfig
) -> dict[str, dict[str, np.ndarray]]:
    """Takes what is stored as codes out of the tensors, by the name of the weight."""
    codes: dict[str, dict[str, np.ndarray]] = {}
    for name in list(tensors):
        module, _, suffix = name.rpartition(".")
        if suffix in _hf_gptq.SUFFIXES:
            codes.setdefault(f"{module}.weight", {})[suffix] = tensors.pop(name)
    for name, arrays in codes.items():
        if lacking := [x for x in _hf_gptq.SUFFIXES[:3] if x not in arrays]:
            raise ValueError(f"{name} is quantised, but there is no {lacking[0]} of it")
        # Some writers give every quantised layer a bias, of zeros.
        bias = name.removesuffix("weight") + "bias"
        has = config.qkv_bias and name.split(".")[-2] in ("q_proj", "k_proj", "v_proj")
        if not has and bias in tensors and not np.any(tensors[bias]):
            del tensors[bias]
    return codes


def _check(
    abstract: Any,
    tensors: Mapping[str, np.ndarray],
    codes: set[str],
    folder: pathlib.Path,
    given: Any,
) -> None:
    """The tensors are those of the config, in dtypes that parameters have."""
    wanted = {}
    for path, leaf in leaves_with_paths(abstract):
        layers = _layers(path, leaf)
        shape = _their_shape(path, leaf.shape[1:] if layers else leaf.shape)
        names = [tensor_name(path).format(i) for i in range(layers or 1)]
        if in_blocks(path):
            names = [name for name in names if name not in codes]
        wanted |= dict.fromkeys(names, shape)
        dtypes = {str(tensors[n].dtype) for n in names if n in tensors}
        if len(dtypes) > 1 and given is None:
            raise ValueError(
                f"{folder}: the layers of {tensor_name(path)} are {sorted(dtypes)}; "
                "pass param_dtype to have them in one"
            )
    if missing := [name for name in wanted if name not in tensors]:
        raise ValueError(
            f"{folder} lacks {len(missing)} of {len(wanted)} tensors, first "
            f"{missing[0]} of shape {wanted[missing[0]]}"
        )
    if odd := codes - {tensor_name(p).format(i) for p, i in _kernels(abstract)}:
        raise ValueError(
            f"{folder}: {min(odd)} is quantised, which kernels of blocks alone can be"
        )
    if extra := [name for name in tensors if name not in wanted]:
        raise ValueError(
            f"{folder} has {len(extra)} tensors that its config tells nothing of, "
            f"first {extra[0]} of shape {tensors[extra[0]].shape}"
        )
    for name, shape in wanted.items():
        x = tensors[name]
        if x.shape != shape:
            raise ValueError(
                f"{folder}: {name} has shape {x.shape}, and {shape} by the config"
            )
        floating = jnp.issubdtype(x.dtype, jnp.floating)
        if not floating or (
            given is None and jax.dtypes.canonicalize_dtype(x.dtype) != x.dtype
        ):
            raise ValueError(
                f"{folder}: {name} is {x.dtype}"
                + (
                    ", no float"
                    if not floating
                    else "; pass param_dtype, or enable jax's x64"
                )
            )


def _kernels(abstract: Any) -> list[tuple[str, int]]:
    """Path and layer of each kernel of the blocks."""
    return [
        (path, i)
        for path, leaf in leaves_with_paths(abstract)
        if in_blocks(path)
        for i in range(_layers(path, leaf) or 1)
    ]


def _leaves(config: DecoderConfig, params: Any) -> dict[str, Any]:
    """The parameters by path, checked."""
    wanted = dict(leaves_with_paths(_abstract(config)))
    leaves = dict(leaves_with_paths(params))
    if set(wanted) != set(leaves):
        lacking = sorted(set(wanted) - set(leaves))[:3]
        extra = sorted(set(leaves) - set(wanted))[:3]
        raise ValueError(
            f"the parameters are not those of the model: missing {lacking}, too many "
            f"{extra}"
        )
    for path, leaf in leaves.items():
        if tuple(leaf.shape) != wanted[path].shape:
            raise ValueError(
                f"parameter {path!r} has shape {tuple(leaf.shape)}, and "
                f"{wanted[path].shape} by the config"
            )
    return leaves


def _tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """All tensors of a folder but the angles of positions, which old ones store."""
    if (folder / _TENSORS).exists():
        tensors = _safetensors.read(folder / _TENSORS)
    elif (folder / INDEX).exists():
        places = _hf_config.read_json(folder / INDEX)["weight_map"]
        files = sorted(set(places.values()))
        if lacking := [file for file in files if not (folder / file).exists()]:
            raise FileNotFoundError(
                f"{folder} lacks {len(lacking)} of the {len(files)} shards that "
                f"{INDEX} lists, first {lacking[0]}"
            )
        shards = {file: _safetensors.read(folder / file) for file in files}
        for name, file in places.items():
            if name not in shards[file]:
                raise ValueError(
                    f"{folder / file} lacks tensor {name}, which {INDEX} says it has"
                )
        tensors = {name: shards[file][name] for name, file in places.items()}
    else:
        old = sorted(file.name for file in folder.glob("*.bin"))
        hint = f"; save {old[0]} anew with transformers" if old else ""
        raise FileNotFoundError(f"{folder} holds no {_TENSORS} and no {INDEX}{hint}")
    return {k: x for k, x in tensors.items() if not k.endswith(".rotary_emb.inv_freq")}


def _write_tensors(
    folder: pathlib.Path,
    shapes: Mapping[str, jax.ShapeDtypeStruct],
    value: Callable[[str], np.ndarray],
    shard_bytes: int,
) -> None:
    shards: list[dict[str, jax.ShapeDtypeStruct]] = [{}]
    filled = total = 0
    for name, x in shapes.items():
        size = math.prod(x.shape) * np.dtype(x.dtype).itemsize
        if shards[-1] and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = x
        filled, total = filled + size, total + size
    if len(shards) == 1:
        _safetensors.write(folder / _TENSORS, shards[0], value)
        return
    places = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        _safetensors.write(folder / file, shard, value)
        places |= dict.fromkeys(shard, file)
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / INDEX).write_text(_hf_config.dump(index), encoding="utf-8")
