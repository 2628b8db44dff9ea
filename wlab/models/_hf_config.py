# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The config of a decoder in the words of transformers: ``config.json``."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from wlab.models import _hf_gptq
from wlab.models.decoder import DecoderConfig, RopeScaling

CONFIG = "config.json"
# By the name of the type, in the order in which `to_hf` tries them.
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
}
_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """The object in a file."""
    if not file.exists():
        raise FileNotFoundError(f"{file.parent} holds no {file.name}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from error


def dump(tree: Mapping[str, Any]) -> str:
    """The text of a file, the same for the same object."""
    return json.dumps(tree, indent=2, sort_keys=True) + "\n"


def read_config(raw: Mapping[str, Any], folder: pathlib.Path) -> DecoderConfig:
    """The decoder that a config of transformers describes."""
    kind = raw.get("model_type")
    names = raw.get("architectures") or [_ARCHITECTURES.get(str(kind))]
    if kind not in _ARCHITECTURES or names != [_ARCHITECTURES[kind]]:
        raise ValueError(
            f"{folder}: architecture {names} of type {kind!r} is not read; "
            f"{', '.join(_ARCHITECTURES.values())} are"
        )
    for key in ("attention_bias", "mlp_bias"):
        if raw.get(key):
            raise ValueError(
                f"{folder}: {key}={raw[key]} is not read: biases are those of qwen2"
            )

    def need(key: str) -> Any:
        if raw.get(key) is None:
            raise ValueError(f"{folder}: its {CONFIG} has no {key}")
        return raw[key]

    width, heads = need("hidden_size"), need("num_attention_heads")
    head_dim = raw.get("head_dim") or {"qwen3": 128, "gemma": 256}.get(kind)
    activation = raw.get("hidden_activation") or raw.get("hidden_act")
    if kind == "gemma" and activation in ("gelu", None):
        activation = "gelu_pytorch_tanh"  # which is what its first configs mean
    activation = activation or "silu"
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{folder}: activation {activation!r} is not read; "
            f"{', '.join(_ACTIVATIONS)} are"
        )
    base, scaling = _rope(raw, folder)
    return DecoderConfig(
        vocab=need("vocab_size"),
        width=width,
        depth=need("num_hidden_layers"),
        heads=heads,
        kv_heads=raw.get("num_key_value_heads") or heads,
        head_dim=head_dim or width // heads,
        hidden=need("intermediate_size"),
        rope_base=base,
        rope_scaling=scaling,
        window=_window(raw, folder),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
        activation=_ACTIVATIONS[activation],  # pyrefly: ignore
        norm_eps=raw.get("rms_norm_eps", 1e-6),
        norm_offset=kind == "gemma",
        embedding_scale=math.sqrt(width) if kind == "gemma" else 1.0,
        tied=raw.get("tie_word_embeddings", kind == "gemma"),
    )


def _rope(
    raw: Mapping[str, Any], folder: pathlib.Path
) -> tuple[float, RopeScaling | None]:
    """Base and scaling of rotary positions, by the keys of new and old versions."""
    given = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    base = float(given.get("rope_theta") or raw.get("rope_theta") or 10_000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    part = given.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or 1
    if part != 1 or any(isinstance(value, dict) for value in given.values()):
        raise ValueError(
            f"{folder}: rotary positions of a part of the channels, or that differ "
            f"from layer to layer, are not read: {dict(given) or part}"
        )
    keys = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            *("factor", "original_max_position_embeddings"),
            *("low_freq_factor", "high_freq_factor"),
        ),
    }
    if kind not in keys:
        raise ValueError(
            f"{folder}: rope scaling {kind!r} is not read; {', '.join(keys)} are"
        )
    if lacking := [key for key in keys[kind] if given.get(key) is None]:
        raise ValueError(f"{folder}: its rope scaling {kind!r} has no {lacking[0]}")
    values = [given[key] for key in keys[kind]]
    return base, RopeScaling(*values) if values else None


def _window(raw: Mapping[str, Any], folder: pathlib.Path) -> int | None:
    """The window of attention, which must be that of all layers."""
    kind, depth = raw["model_type"], raw["num_hidden_layers"]
    if kind == "mistral":
        return raw.get("sliding_window", 4096)
    if kind not in ("qwen2", "qwen3") or not raw.get("use_sliding_window"):
        return None
    first = raw.get("max_window_layers", 28)
    kinds = raw.get("layer_types") or [
        "sliding_attention" if i >= first else "full_attention" for i in range(depth)
    ]
    if len(set(kinds)) > 1:
        raise ValueError(
            f"{folder}: a window of attention in some layers alone (max_window_layers="
            f"{first}, layer_types) is not read"
        )
    sliding = kinds[0] == "sliding_attention"
    return raw.get("sliding_window", 4096) if sliding else None


def config_text(
    config: DecoderConfig,
    dtype: np.dtype,
    template: str | os.PathLike[str] | None,
    stored_as: _hf_gptq.Stored | None,
) -> str:
    """The text of the config, the template's or one that says what `config` does."""
    raw = _written(config, dtype, None if template is None else pathlib.Path(template))
    raw.pop(_hf_gptq.KEY, None)
    if stored_as is not None:
        raw[_hf_gptq.KEY] = _hf_gptq.write_config(stored_as)
    return dump(raw)


def _written(
    config: DecoderConfig, dtype: np.dtype, folder: pathlib.Path | None
) -> dict[str, Any]:
    """The config of floats, the template's or one that says what `config` does."""
    shape = _shape(config)
    if folder is not None:
        raw = read_json(folder / CONFIG)
        # A head may have become its own.
        raw |= {"tie_word_embeddings": config.tied}
        theirs = _shape(read_config(raw, folder))
        if theirs != shape:
            differ = [
                f"{f.name}={getattr(config, f.name)} (there {getattr(theirs, f.name)})"
                for f in dataclasses.fields(config)
                if getattr(shape, f.name) != getattr(theirs, f.name)
            ]
            raise ValueError(f"{folder} is of another model: {', '.join(differ)}")
        key = "dtype" if "dtype" in raw else "torch_dtype"
        return raw | {key: dtype.name}
    for kind in _ARCHITECTURES:
        raw = _raw(config, kind)
        if _shape(read_config(raw, pathlib.Path(CONFIG))) == shape:
            return raw | {"torch_dtype": dtype.name}
    raise ValueError(
        f"no architecture of {', '.join(_ARCHITECTURES.values())} has the options of "
        f"{config}; attention_scale, output_scale and experts are none of theirs"
    )


def _shape(config: DecoderConfig) -> DecoderConfig:
    """The config without what says how it is computed, or made anew."""
    wide = jnp.float32
    return dataclasses.replace(
        config, scan=False, remat=False, dtype=wide, param_dtype=wide, init_width=None
    )


def _raw(config: DecoderConfig, kind: str) -> dict[str, Any]:
    """What transformers calls the options of a decoder."""
    names = {ours: theirs for theirs, ours in _ACTIVATIONS.items()}
    raw: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.hidden,
        "hidden_act": names[config.activation],
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "rope_theta": config.rope_base,
    }
    if scaling := config.rope_scaling:
        raw["rope_scaling"] = {"rope_type": "linear", "factor": scaling.factor}
        if scaling.length is not None:
            raw["rope_scaling"] |= {
                "rope_type": "llama3",
                "original_max_position_embeddings": scaling.length,
                "low_freq_factor": scaling.low,
                "high_freq_factor": scaling.high,
            }
    if kind == "gemma":
        raw["hidden_activation"] = raw["hidden_act"]
    if kind == "mistral":
        raw["sliding_window"] = config.window
    if kind in ("qwen2", "qwen3") and config.window is not None:
        raw |= {
            "use_sliding_window": True,
            "sliding_window": config.window,
            "max_window_layers": 0,
        }
    return raw
