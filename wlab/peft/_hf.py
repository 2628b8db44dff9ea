# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Adapters in the files of Hugging Face's peft: read and written.

A folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. LoRA with its
rank-stabilised form and DoRA, Bone (MiSS, its mini form and Bat) and RandLoRA have the
same numbers there; only their axes differ.
"""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from wlab import _safetensors
from wlab._files import replacing
from wlab.core import Adapter, Reparam, Views, leaves_with_paths
from wlab.peft._bone import bone
from wlab.peft._lora import lora
from wlab.peft._matrices import SHARED
from wlab.peft._randlora import randlora

Names = Mapping[str, str] | Callable[[str], str | None]
_PREFIX = "base_model.model."
_CONFIG, _TENSORS = "adapter_config.json", "adapter_model.safetensors"
_KEYS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector": "magnitude",
    "miss_block": "d",
    "randlora_lambda": "lam",
    "randlora_gamma": "gamma",
}


class Loaded(NamedTuple):
    """A method with its hyperparameters, and an adapter of it."""

    method: Reparam
    adapter: Adapter


def from_hf(
    folder: str | pathlib.Path,
    params: Any,
    names: Names,
    *,
    views: Views | None = None,
) -> Loaded:
    """Reads an adapter that peft wrote.

    Args:
        folder: with the two files.
        params: the base.
        names: the module's name there, by the path of the leaf here
            (``"model.layers.0.self_attn.q_proj"``); of a leaf of stacked layers with
            ``{}`` for the layer's number. Paths that it does not name have no adapter.
        views: which axes are inputs and outputs, where names do not tell.

    Returns:
        The method and the adapter, float32.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: for a type of adapter that is none of these, a module that no leaf
            is named for, a layer without its tensors, or sizes that do not fit.
    """
    folder = pathlib.Path(folder)
    for file in (_CONFIG, _TENSORS):
        if not (folder / file).exists():
            raise FileNotFoundError(f"{folder} holds no {file}")
    config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
    # Copies: what jax takes over as it is must not change with the file.
    mapped = _safetensors.read(folder / _TENSORS)
    tensors = {key: np.array(x) for key, x in mapped.items()}
    modules: dict[str, dict[str, np.ndarray]] = {}
    bases: dict[str, jax.Array] = {}
    for key, x in tensors.items():
        module, part = _split(key)
        if part.startswith(("randlora_A", "randlora_B")):
            bases["a" if part.startswith("randlora_A") else "b"] = jnp.asarray(x)
        elif part in _KEYS:
            modules.setdefault(module, {})[_KEYS[part]] = x
        else:
            raise ValueError(
                f"{folder}: tensor {key!r} of shape {x.shape} is none that wlab reads: "
                f"{sorted(_KEYS)}"
            )

    found: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in leaves_with_paths(params):
        name = _name(names, path)
        if name is None:
            continue
        if "{}" not in name:
            if name in modules:
                found[path] = modules.pop(name)
            continue
        layers = jnp.shape(leaf)[0]
        there = [name.format(i) for i in range(layers)]
        have = [n for n in there if n in modules]
        if not have:
            continue
        if len(have) < layers:
            lacking = next(n for n in there if n not in modules)
            raise ValueError(
                f"{folder} has tensors for {len(have)} of the {layers} layers that "
                f"leaf {path!r} stacks; {lacking} is missing"
            )
        parts = [modules.pop(n) for n in there]
        found[path] = {k: np.stack([p[k] for p in parts]) for k in parts[0]}
    if modules or not found:
        raise ValueError(
            f"{folder}: no leaf of the model is named for {sorted(modules)[:3]}; names "
            "them in names="
        )

    method = _method(config, folder, lambda path, _: path in found, views)
    start = method.init(0, params)
    train = {
        path: {
            name: _ours(name, x, start.train[path][name], path)
            for name, x in parts.items()
        }
        for path, parts in found.items()
    }
    frozen = start.frozen
    if bases:
        a = bases["a"]
        frozen = frozen | {SHARED: {"a": a.reshape(len(a), -1), "b": bases["b"]}}
    return Loaded(method, start._replace(train=train, frozen=frozen))


def to_hf(
    folder: str | pathlib.Path,
    adapter: Adapter,
    names: Names,
    *,
    alpha: float | None = None,
    rank_stabilized: bool = False,
    mini: bool = False,
    base_model: str = "",
) -> None:
    """Writes an adapter in the layout that peft reads.

    A PiSSA adapter becomes a LoRA of twice its rank, relative to the base as it was.
    RandLoRA must have been made with ``pairing="hf"``.

    Args:
        folder: where; made if it is not there.
        adapter: from `lora`, `bone` or `randlora`.
        names: as in `from_hf`; every target must be named.
        alpha: as the method was given it; None: its default.
        rank_stabilized: as the method was given it.
        mini: whether a Bone adapter is of its mini form.
        base_model: name of the base, for the config.

    Raises:
        ValueError: for an adapter of another method, or a target that is not named.
    """
    tensors: dict[str, np.ndarray] = {}
    config: dict[str, Any] = {"base_model_name_or_path": base_model, "bias": "none"}
    modules: set[str] = set()
    for path, part in adapter.train.items():
        name = _name(names, path)
        if name is None:
            raise ValueError(f"to_hf: target {path!r} is not in names=")
        frozen = adapter.frozen.get(path, {})
        arrays, settings = _theirs(path, part, frozen, alpha, rank_stabilized, name)
        if mini and settings["peft_type"] == "MISS":
            settings |= {"init_weights": "mini", "mini_r": part["d"].shape[-1]}
        config |= settings
        for key, x in arrays.items():
            stacked = "{}" in name
            for i in range(len(x) if stacked else 1):
                module = name.format(i) if stacked else name
                tensors[f"{_PREFIX}{module}.{key}"] = x[i] if stacked else x
                modules.add(module.rpartition(".")[2])
    if SHARED in adapter.frozen:
        shared = adapter.frozen[SHARED]
        tensors["base_model.randlora_A"] = np.asarray(shared["a"])[:, None]
        tensors["base_model.randlora_B"] = np.asarray(shared["b"])
    config["target_modules"] = sorted(modules)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with (
        replacing(folder / _CONFIG) as config_file,  # the last to be there
        replacing(folder / _TENSORS) as tensors_file,
    ):
        _safetensors.write(tensors_file, tensors, tensors.__getitem__)
        config_file.write_text(text, encoding="utf-8")


def _split(key: str) -> tuple[str, str]:
    """Module and kind of a tensor's name."""
    key = key.removeprefix(_PREFIX)
    for part in _KEYS:
        if key.endswith("." + part):
            return key.removesuffix("." + part), part
    return key.rpartition(".")[0], key.rpartition(".")[2]


def _name(names: Names, path: str) -> str | None:
    return names(path) if callable(names) else names.get(path)


def _method(
    config: Mapping[str, Any],
    folder: pathlib.Path,
    select: Any,
    views: Views | None,
) -> Reparam:
    for key in ("rank_pattern", "alpha_pattern"):
        if config.get(key):
            raise ValueError(
                f"{key}={config[key]} is not read: targets with a rank or a scale of "
                "their own would be scaled wrongly; read them as adapters of their own"
            )
    kind, options = config.get("peft_type"), {"select": select, "views": views}
    if kind == "LORA":
        return lora(
            config["r"],
            alpha=config.get("lora_alpha", 8),
            rank_stabilized=bool(config.get("use_rslora")),
            dora=bool(config.get("use_dora")),
            **options,
        )
    if kind == "MISS":
        variant = config.get("init_weights", True)
        if variant == "mini":
            return bone(
                config["r"], variant="mini", mini_rank=config["mini_r"], **options
            )
        bat = variant == "bat"
        return bone(config["r"], variant="bat" if bat else "bone", **options)
    if kind == "RANDLORA":
        alpha = config.get("randlora_alpha", 640)
        return randlora(config["r"], alpha=alpha, pairing="hf", **options)
    raise ValueError(
        f"{folder}: adapters of type {kind!r} are not read; LORA, MISS and RANDLORA are"
    )


def _ours(name: str, x: np.ndarray, like: jax.Array, path: str) -> jax.Array:
    """A tensor with the axes that it has here."""
    if name == "a":
        x = np.swapaxes(x, -1, -2)  # (r, in) to (in, r)
    if x.size != like.size:
        raise ValueError(
            f"the adapter's {name!r} of shape {x.shape} does not fit leaf {path!r}, "
            f"whose has shape {like.shape}"
        )
    return jnp.asarray(x, like.dtype).reshape(like.shape)


def _theirs(
    path: str,
    part: Mapping[str, Any],
    frozen: Mapping[str, Any],
    alpha: float | None,
    rank_stabilized: bool,
    name: str,
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors of one target with the axes that peft has, and its config."""
    lead = 1 if "{}" in name else 0

    def flat(x: Any, keep: int) -> np.ndarray:
        """The stacked axis, one flattened side, and the last `keep` axes."""
        x = np.asarray(x, np.float32)
        return x.reshape(*x.shape[:lead], -1, *x.shape[x.ndim - keep :])

    names = set(part)
    if names in ({"a", "b"}, {"a", "b", "magnitude"}):
        a, b = flat(part["a"], 1), flat(part["b"], 1)
        rank = a.shape[-1]
        scale = alpha if alpha is not None else float(rank)
        if "a" in frozen:
            a = np.concatenate([a, flat(frozen["a"], 1)], -1)
            b = np.concatenate([b, -flat(frozen["b"], 1)], -1)
            scale *= 2**0.5 if rank_stabilized else 2
            rank *= 2
        out = {"lora_A.weight": np.swapaxes(a, -1, -2), "lora_B.weight": b}
        if "magnitude" in part:
            out["lora_magnitude_vector"] = np.asarray(part["magnitude"], np.float32)
        return out, {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": scale,
            "use_rslora": rank_stabilized,
            "use_dora": "magnitude" in part,
        }
    if names == {"d"}:
        d = np.asarray(part["d"], np.float32)
        settings: dict[str, Any] = {"peft_type": "MISS", "r": d.shape[-2]}
        settings["init_weights"] = "bat" if d.ndim - lead == 3 else True
        return {"miss_block": d}, settings
    if names == {"lam", "gamma"}:
        lam = np.asarray(part["lam"], np.float32)
        rank = lam.shape[-2]
        return {
            "randlora_lambda": lam,
            "randlora_gamma": np.asarray(part["gamma"], np.float32),
        }, {
            "peft_type": "RANDLORA",
            "r": rank,
            "randlora_alpha": alpha if alpha is not None else 20.0 * rank,
            "save_projection": True,
        }
    raise ValueError(
        f"to_hf: target {path!r} trains {sorted(names)}, which peft has no layout for; "
        "lora, bone and randlora have one, any other can be merged"
    )
