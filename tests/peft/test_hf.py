# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Exchange with Hugging Face's peft: files that it wrote, of a small random Llama."""

import functools
import json
import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from wlab import peft

pytest.importorskip("safetensors")
from safetensors.numpy import load_file, save_file

HERE = pathlib.Path(__file__).parent.parent / "golden" / "hf"
KINDS = ("lora", "rslora", "dora", "bone", "bat", "mini", "randlora")
# Path here, name there.
MODULES = {
    "attn/q": "self_attn.q_proj",
    "attn/v": "self_attn.v_proj",
    "mlp/down": "mlp.down_proj",
}
STACKED = {
    f"ScanBlocks/{path}/kernel": f"model.layers.{{}}.{name}"
    for path, name in MODULES.items()
}
WRITTEN_OUT = {
    f"blocks_{i}/{path}/kernel": f"model.layers.{i}.{name}"
    for i in range(2)
    for path, name in MODULES.items()
}
MERGED = np.load(HERE / "merged.npz")


def kernel(kind: str, module: str) -> np.ndarray:
    """A kernel in Flax's layout; queries and values with their heads of 8."""
    x = MERGED[f"{kind}:{module}.weight"].T
    return x.reshape(32, -1, 8) if "self_attn" in module else x


def model(kind: str, names: Any) -> Any:
    tree: dict[str, Any] = {}
    for path, name in names.items():
        *parents, last = path.split("/")
        node = tree
        for part in parents:
            node = node.setdefault(part, {})
        if "{}" in name:
            node[last] = np.stack([kernel(kind, name.format(i)) for i in range(2)])
        else:
            node[last] = kernel(kind, name)
    return tree


@pytest.mark.parametrize(
    "names", [STACKED, WRITTEN_OUT], ids=["stacked", "written out"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_wrote_is_read(kind: str, names: Any):
    base = model("base", names)
    method, adapter = peft.from_hf(HERE / kind, base, names)
    got = jax.jit(functools.partial(peft.merge, method))(adapter, base)
    want = model(kind, names)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_what_peft_wrote(kind: str, tmp_path: pathlib.Path):
    base = model("base", STACKED)
    _, adapter = peft.from_hf(HERE / kind, base, STACKED)
    config = json.loads((HERE / kind / "adapter_config.json").read_text())
    peft.to_hf(
        tmp_path,
        adapter,
        STACKED,
        alpha=config.get("lora_alpha", config.get("randlora_alpha")),
        rank_stabilized=kind == "rslora",
        mini=kind == "mini",
    )
    theirs = load_file(HERE / kind / "adapter_model.safetensors")
    ours = load_file(tmp_path / "adapter_model.safetensors")
    for key, x in ours.items():
        np.testing.assert_allclose(x, theirs[key], atol=1e-7, err_msg=key)
    trained = {k for k in theirs if "randlora_A" not in k and "randlora_B" not in k}
    assert trained <= set(ours)
    back = json.loads((tmp_path / "adapter_config.json").read_text())
    for key in ("peft_type", "r", "target_modules"):
        want = config[key]
        assert back[key] == (sorted(want) if isinstance(want, list) else want)


def test_pissa_becomes_a_lora_of_twice_the_rank(tmp_path: pathlib.Path):
    base = model("base", STACKED)
    method = peft.lora(2, start="pissa")

    @jax.jit
    def start(key: jax.Array) -> Any:
        adapter = method.init(key, base)
        train = jax.tree.map(lambda x: x + 0.1, adapter.train)
        return adapter._replace(train=train)

    adapter = start(jax.random.key(0))
    peft.to_hf(tmp_path, adapter, STACKED)
    other, back = peft.from_hf(tmp_path, base, STACKED)
    assert back.train["ScanBlocks/mlp/down/kernel"]["a"].shape == (2, 48, 4)
    want = jax.jit(functools.partial(peft.merge, method))(adapter, base)
    got = jax.jit(functools.partial(peft.merge, other))(back, base)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_does_not_fit_is_told(tmp_path: pathlib.Path):
    base = model("base", STACKED)
    with pytest.raises(FileNotFoundError, match="holds no adapter_config"):
        peft.from_hf(tmp_path, base, STACKED)
    few = {k: v for k, v in STACKED.items() if "down" not in k}
    with pytest.raises(ValueError, match="no leaf of the model is named"):
        peft.from_hf(HERE / "lora", base, few)
    for changes, tensors, message in (
        ({"peft_type": "LOHA"}, {}, "'LOHA' are not read"),
        ({"alpha_pattern": {"q_proj": 4}}, {}, "alpha_pattern=.* is not read"),
        ({}, {"base_model.model.x.other": np.ones(2)}, "none that wlab reads"),
    ):
        config = json.loads((HERE / "lora" / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        held = load_file(HERE / "lora" / "adapter_model.safetensors")
        save_file(held | tensors, tmp_path / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=message):
            peft.from_hf(tmp_path, base, STACKED)
    held = {k: x for k, x in held.items() if "layers.1.mlp" not in k}
    save_file(held, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"layers.1.mlp.down_proj is missing"):
        peft.from_hf(tmp_path, base, STACKED)
    narrow = jax.tree.map(lambda x: x[..., :4], base)
    with pytest.raises(ValueError, match="does not fit leaf"):
        peft.from_hf(HERE / "dora", narrow, STACKED)
    adapter = jax.jit(peft.wara(2).init)(0, base)
    with pytest.raises(ValueError, match="no layout for"):
        peft.to_hf(tmp_path, adapter, STACKED)
    with pytest.raises(ValueError, match="not in names"):
        peft.to_hf(tmp_path, jax.jit(peft.lora(2).init)(0, base), few)
