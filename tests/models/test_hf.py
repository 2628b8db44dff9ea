# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of small random models, with the logits that transformers computed.

Each folder of `golden/hf-models` is what transformers 5.24 wrote of a random model of
two blocks, its norms and biases drawn too, so that none is without effect;
`expected.npz` holds 24 tokens of two sequences and the logits that it made of them in
float32. The folder with an adapter is what peft 0.21 wrote for the one of `llama`.
"""

import dataclasses
import functools
import json
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import wlab
from wlab import _safetensors, models, peft
from wlab.core import sharding
from wlab.models import from_hf, hf_names, to_hf
from wlab.models.decoder import Decoder, RopeScaling, tiny

HERE = pathlib.Path(__file__).parent.parent / "golden" / "hf-models"
NAMES = ("gemma", "llama", "llama-linear", "llama-tied", "mistral", "qwen2", "qwen3")
LLAMA = HERE / "llama"


@functools.cache
def read(name: str, **overrides: Any) -> tuple[Decoder, Any]:
    return from_hf(HERE / name, **overrides)


def logits(model: Decoder, params: Any, tokens: Any) -> jax.Array:
    return jax.jit(model.apply)({"params": params}, tokens)


def stored(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of all files, whatever index there is."""
    found: dict[str, np.ndarray] = {}
    for file in folder.glob("*.safetensors"):
        found |= _safetensors.read(file)
    return found


def same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return {k: (x.dtype, x.shape, x.tobytes()) for k, x in a.items()} == {
        k: (x.dtype, x.shape, x.tobytes()) for k, x in b.items()
    }


def changed(
    folder: pathlib.Path, to: pathlib.Path, tensors: Any = None, **config: Any
) -> pathlib.Path:
    """A copy of a folder with another config (None takes a key away) or tensors."""
    shutil.copytree(folder, to)
    raw = json.loads((to / "config.json").read_text()) | config
    raw = {key: value for key, value in raw.items() if value is not None}
    (to / "config.json").write_text(json.dumps(raw))
    if tensors is not None:
        _safetensors.write(to / "model.safetensors", tensors, tensors.__getitem__)
    return to


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(name: str):
    scan = name in ("gemma", "qwen2", "qwen3")
    model, params = from_hf(HERE / name, dtype=jnp.float32, scan=scan)
    kept = {x.dtype for x in stored(HERE / name).values()}
    assert {np.dtype(x.dtype) for x in jax.tree.leaves(params)} == kept
    with np.load(HERE / name / "expected.npz") as want:
        got = logits(model, params, want["tokens"])
        np.testing.assert_allclose(got, want["logits"], atol=1e-4)
        assert want["logits"].std() > 0.3  # logits of about nothing would agree too


@pytest.mark.parametrize("name", ["qwen2", "gemma"])
def test_over_a_mesh(name: str):
    """Each device holds its part of what one device would hold."""
    mesh = sharding.make_mesh(fsdp=4, tensor=2, explicit=name == "gemma")
    rules = [("*mlp/up/kernel", jax.P("fsdp", None))]
    scan = name == "gemma"
    _, whole = read(name, scan=scan)
    _, params = from_hf(HERE / name, scan=scan, mesh=mesh, rules=rules)
    jax.tree.map(np.testing.assert_array_equal, params, whole)
    where = sharding.shardings(whole, mesh, rules)
    assert jax.tree.map(lambda x: x.sharding, params) == where
    block = params["blocks"] if scan else params["blocks_1"]
    for name, parts in (("up", 4), ("down", 8)):
        kernel = block["mlp"][name]["kernel"]
        assert kernel.addressable_shards[0].data.size * parts == kernel.size
    with pytest.raises(ValueError, match="matches no leaf"):
        from_hf(LLAMA, mesh=mesh, rules=[("*mlp/upp*", jax.P())])
    with pytest.raises(ValueError, match="give mesh="):
        from_hf(LLAMA, rules=rules)


def test_the_options_are_read():
    config = {name: read(name)[0].config for name in NAMES}
    assert config["llama-tied"].rope_scaling == RopeScaling(8.0, 16, 1.0, 4.0)
    assert config["llama-linear"].rope_scaling == RopeScaling(4.0)
    assert [config[n].tied for n in NAMES] == [n in TIED for n in NAMES]
    assert config["mistral"].window == 5 and config["qwen2"].window is None
    assert config["qwen2"].qkv_bias and config["qwen3"].qk_norm
    gemma = config["gemma"]
    assert (gemma.activation, gemma.norm_offset) == ("gelu_tanh", True)
    assert gemma.embedding_scale == 32**0.5 and gemma.kv_heads == 1
    assert config["llama"].norm_eps == 1e-5 and config["llama"].rope_base == 500
    assert config["qwen3"].dtype == config["qwen3"].param_dtype == jnp.bfloat16


TIED = ("gemma", "llama-tied", "qwen2")


@pytest.mark.parametrize("name", NAMES)
def test_written_again_it_is_the_same(name: str, tmp_path: pathlib.Path):
    for i, scan in enumerate((True, False) if name in ("gemma", "qwen2") else (False,)):
        model, params = read(name, scan=scan) if scan else read(name)
        to_hf(tmp_path / f"{i}", model, params, template=HERE / name)
        assert same(stored(tmp_path / f"{i}"), stored(HERE / name))
        raw = [
            json.loads((f / "config.json").read_text())
            for f in (tmp_path / f"{i}", HERE / name)
        ]
        assert raw[0] == raw[1]
    to_hf(tmp_path / "plain", model.config, params)
    again, parameters = from_hf(tmp_path / "plain")
    assert again == model
    assert jax.tree.all(jax.tree.map(np.array_equal, parameters, params))


def test_shards(tmp_path: pathlib.Path):
    assert len(list((HERE / "qwen2").glob("model-*.safetensors"))) > 1
    model, params = read("qwen2")
    to_hf(tmp_path / "out", model, params, shard_bytes=20_000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 24_000 for f in files)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(
        x.nbytes for x in stored(HERE / "qwen2").values()
    )
    assert same(stored(tmp_path / "out"), stored(HERE / "qwen2"))
    _, again = from_hf(tmp_path / "out")
    assert jax.tree.all(jax.tree.map(np.array_equal, again, params))
    files[0].unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks 1 of the \d+ shards.*model-0"):
        from_hf(tmp_path / "out")


def test_the_package_safetensors_reads_and_writes_the_same(tmp_path: pathlib.Path):
    package = pytest.importorskip("safetensors.numpy")
    x = {
        "b": np.arange(6, dtype=np.int8).reshape(2, 3),
        "a": np.ones((3, 1), np.float64),
        "empty": np.zeros((0, 2), np.float16),
        "scalar": np.float32(3.0)[None][0:1],
    }
    _safetensors.write(tmp_path / "ours", x, x.__getitem__)
    assert same(package.load_file(tmp_path / "ours"), x)
    assert all(y.flags.aligned for y in _safetensors.read(tmp_path / "ours").values())
    package.save_file(x, tmp_path / "theirs")
    assert same(_safetensors.read(tmp_path / "theirs"), x)


def test_keys_of_old_and_new_versions(tmp_path: pathlib.Path):
    raw = json.loads((HERE / "llama-tied/config.json").read_text())
    new = raw.get("rope_parameters") or raw["rope_scaling"] | {"rope_theta": 500.0}
    old = {key: value for key, value in new.items() if key != "rope_theta"}
    want = read("llama-tied")[0]
    forms: list[dict[str, Any]] = [
        {"rope_parameters": new, "rope_theta": None, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 500.0, "rope_scaling": old},
        {"head_dim": None, "num_key_value_heads": 2, "architectures": None},
    ]
    for i, form in enumerate(forms):
        folder = changed(HERE / "llama-tied", tmp_path / str(i), **form)
        assert from_hf(folder)[0] == want
    linear = {
        "rope_parameters": None,
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 4.0},
    }
    folder = changed(HERE / "llama-linear", tmp_path / "linear", **linear)
    assert from_hf(folder)[0] == read("llama-linear")[0]


def test_a_tied_head_may_be_stored_and_angles_too(tmp_path: pathlib.Path):
    tensors = stored(HERE / "llama-tied")
    more = tensors | {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32),
    }
    _, params = from_hf(changed(HERE / "llama-tied", tmp_path / "a", more))
    assert "head" not in params
    more["lm_head.weight"] = more["lm_head.weight"] + 1
    folder = changed(HERE / "llama-tied", tmp_path / "b", more)
    with pytest.raises(ValueError, match=r"lm_head.weight differs.*tied=False"):
        from_hf(folder)
    assert "head" in from_hf(folder, tied=False)[1]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gemma2"}, r"\['LlamaForCausalLM'\] of type 'gemma2' is"),
        ({"architectures": ["LlamaForX"]}, "Qwen3ForCausalLM, GemmaForCausalLM are"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": None},
         "rope scaling 'yarn' is not read; default, linear, llama3 are"),
        ({"rope_scaling": {"type": "linear"}, "rope_parameters": None},
         "rope scaling 'linear' has no factor"),
        ({"partial_rotary_factor": 0.5}, "rotary positions of a part"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "to layer"),
        ({"hidden_act": "relu2"}, "activation 'relu2' is not read"),
        ({"attention_bias": True}, "attention_bias=True is not read"),
        ({"quantization_config": {"bits": 4}}, "its tensors are quantised"),
        ({"hidden_size": None}, "config.json has no hidden_size"),
        ({"num_hidden_layers": 3}, r"lacks 9 of 30 tensors, first model\.layers\.2\."),
        ({"num_hidden_layers": 1}, r"has 9 tensors that its config tells nothing of"),
        ({"intermediate_size": 40},
         r"mlp.down_proj.weight has shape \(32, 48\), and \(32, 40\) by the config"),
    ],
    ids=str,
)  # fmt: skip
def test_configs_that_are_refused(
    config: dict[str, Any], message: str, tmp_path: pathlib.Path
):
    with pytest.raises(ValueError, match=message):
        from_hf(changed(LLAMA, tmp_path / "x", **config))


def test_a_window_in_some_layers_is_refused(tmp_path: pathlib.Path):
    window = {"use_sliding_window": True, "sliding_window": 4, "layer_types": None}
    for first, want in ((0, 4), (2, None)):
        folder = changed(
            HERE / "qwen2", tmp_path / f"{first}", max_window_layers=first, **window
        )
        assert from_hf(folder)[0].config.window == want
    folder = changed(HERE / "qwen2", tmp_path / "x", max_window_layers=1, **window)
    with pytest.raises(ValueError, match="in some layers alone"):
        from_hf(folder)


def test_files_that_are_refused(tmp_path: pathlib.Path):
    with pytest.raises(FileNotFoundError, match=r"holds no config\.json"):
        from_hf(tmp_path)
    folder = changed(LLAMA, tmp_path / "cut")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-3])
    with pytest.raises(ValueError, match=r"is cut off: it has \d+ bytes, and its"):
        from_hf(folder)
    file.write_bytes(content[:100])
    with pytest.raises(ValueError, match="of 100 bytes is cut off within its header"):
        from_hf(folder)
    file.write_bytes((5).to_bytes(8, "little") + b"hello")
    with pytest.raises(ValueError, match="is no file of safetensors"):
        from_hf(folder)
    file.unlink()
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no.*anew"):
        from_hf(folder)
    tensors = stored(LLAMA)
    tensors["model.norm.weight"] = np.ones(32, np.int8)
    with pytest.raises(ValueError, match=r"model\.norm\.weight is int8, no float"):
        from_hf(changed(LLAMA, tmp_path / "int", tensors))
    tensors["model.norm.weight"] = np.ones(32, np.float64)
    folder = changed(LLAMA, tmp_path / "wide", tensors)
    with pytest.raises(ValueError, match="is float64; pass param_dtype"):
        from_hf(folder)
    assert from_hf(folder, param_dtype=jnp.float32)[1]["final_norm"]["scale"].all()
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = stored(LLAMA) | {name: stored(LLAMA)[name].astype(np.float16)}
    folder = changed(LLAMA, tmp_path / "mixed", tensors)
    assert from_hf(folder)[1]["blocks_1"]["mlp"]["up"]["kernel"].dtype == jnp.float16
    with pytest.raises(
        ValueError, match=r"up_proj.weight are \['float16', 'float32'\]"
    ):
        from_hf(folder, scan=True)


def test_what_cannot_be_written(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    model, params = read("llama")
    with pytest.raises(FileExistsError, match="is there already"):
        to_hf(tmp_path, model, params)
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match=r"another model: .*, norm_eps=1e-05 \(there 1e-06"
    ):
        to_hf(out, model, params, template=HERE / "llama-linear")
    for odd in ({"output_scale": 0.5}, {"qkv_bias": True, "qk_norm": True}):
        config = dataclasses.replace(model.config, **odd)
        shapes = jax.eval_shape(
            Decoder(config).init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32)
        )
        with pytest.raises(ValueError, match="no architecture of LlamaForCausalLM"):
            to_hf(out, config, shapes["params"])
    with pytest.raises(ValueError, match="experts=4: of the architectures"):
        to_hf(out, tiny(experts=4), params)
    with pytest.raises(ValueError, match=r"missing \['head/kernel'\], too many \[\]"):
        to_hf(out, model, {k: x for k, x in params.items() if k != "head"})
    wide = params | {"final_norm": {"scale": jnp.ones(33)}}
    with pytest.raises(ValueError, match=r"'final_norm/scale' has shape \(33,\)"):
        to_hf(out, model, wide)

    def fails(*_: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(_safetensors, "write", fails)
    with pytest.raises(OSError, match="the disk is full"):
        to_hf(out, model, params)
    assert not list(tmp_path.iterdir())


def test_quantised_kernels_are_written_dense(tmp_path: pathlib.Path):
    model, params = read("qwen2", scan=True)
    packed = wlab.quant.quantize_tree(params, "int8", select="*/mlp/up/*")
    to_hf(tmp_path / "out", model, packed)
    _, again = from_hf(tmp_path / "out", scan=True)
    want = wlab.materialise(packed)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, want))
    assert not np.array_equal(
        again["blocks"]["mlp"]["up"]["kernel"], params["blocks"]["mlp"]["up"]["kernel"]
    )


def test_the_folder_takes_along_what_is_beside(tmp_path: pathlib.Path):
    folder = changed(LLAMA, tmp_path / "x", eos_token_id=7)
    for name in ("tokenizer.json", "generation_config.json", "training_args.bin"):
        (folder / name).write_text("{}")
    model, params = from_hf(folder, param_dtype=jnp.bfloat16)
    to_hf(tmp_path / "y", model, params, template=folder)
    names = {file.name for file in (tmp_path / "y").iterdir()}
    beside = {"tokenizer.json", "generation_config.json"}
    assert names == {"config.json", "model.safetensors"} | beside
    raw = json.loads((tmp_path / "y/config.json").read_text())
    assert raw["eos_token_id"] == 7
    assert raw.get("dtype", raw.get("torch_dtype")) == "bfloat16"


@pytest.mark.parametrize("scan", [False, True])
def test_an_adapter_of_peft_on_a_checkpoint(scan: bool):
    model, params = from_hf(LLAMA, scan=scan)
    folder = HERE / "llama-lora"
    method, adapter = peft.from_hf(folder, params, hf_names(model))
    merged = jax.jit(lambda a, p: peft.merge(method, a, p))(adapter, params)
    with (
        np.load(folder / "expected.npz") as want,
        np.load(LLAMA / "expected.npz") as without,
    ):
        got = logits(model, merged, want["tokens"])
        np.testing.assert_allclose(got, want["logits"], atol=1e-4)
        assert np.abs(want["logits"] - without["logits"]).max() > 0.1


def test_biases_are_counted_apart():
    config = read("qwen2")[0].config
    counts = models.sizes.parameter_counts(config)
    assert counts.by_kind["bias"] == 2 * (32 + 16 + 16)
    assert counts.total == sum(x.size for x in stored(HERE / "qwen2").values())
    plain = dataclasses.replace(config, qkv_bias=False)
    assert models.sizes.train_flops(config, 2, 8) == models.sizes.train_flops(
        plain, 2, 8
    )
