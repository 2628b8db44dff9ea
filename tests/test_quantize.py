# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""`wlab quantize`: from folder to folder, gone on with, and what it refuses.

The model is the small Llama of `golden/hf-models`, with an embedding and a head of 256
tokens, so that bytes are its tokens.
"""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import pytest

import wlab
from wlab import _safetensors, cli
from wlab import quantize as module
from wlab.core import sharding
from wlab.models import from_hf, to_hf

LLAMA = pathlib.Path(__file__).parent / "golden" / "hf-models" / "llama"
OPTIONS = ["--group", "16", "--length", "16", "--sequences", "8", "--batch", "4"]
ORDERED = [*OPTIONS, "--act-order", "--no-progress"]


def changed(folder: pathlib.Path, to: pathlib.Path, **tensors: Any) -> pathlib.Path:
    shutil.copytree(folder, to)
    found = _safetensors.read(folder / "model.safetensors") | tensors
    _safetensors.write(to / "model.safetensors", found, found.__getitem__)
    return to


@pytest.fixture(scope="module")
def bytes_model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    rng = np.random.default_rng(0)
    table, head = rng.standard_normal((2, 256, 32)).astype(np.float32)
    to = tmp_path_factory.mktemp("model") / "llama"
    ends = {"model.embed_tokens.weight": table, "lm_head.weight": head / 6}
    changed(LLAMA, to, **ends)
    raw = json.loads((to / "config.json").read_text()) | {"vocab_size": 256}
    (to / "config.json").write_text(json.dumps(raw))
    (to / "tokenizer_config.json").write_text("{}")
    (to.parent / "text.txt").write_bytes(rng.bytes(700))
    return to


def run(model: pathlib.Path, out: pathlib.Path, *args: str) -> int:
    text = model.parent / "text.txt"
    given = ["--calibration", str(text)] if "--calibration" not in args else []
    return cli.main(["quantize", str(model), "--out", str(out), *given, *args])


def test_from_folder_to_folder(
    bytes_model: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    # One test: the run takes its time, and another process would make it again.
    whole = _whole(bytes_model)
    _is_what_was_made(whole)
    _reports(whole)
    _is_the_same_written_again(whole, tmp_path)
    _goes_on(whole, bytes_model, tmp_path, monkeypatch, capsys)
    assert run(bytes_model, whole[0], *OPTIONS) == 2
    assert "is there already" in capsys.readouterr().err


def _whole(bytes_model: pathlib.Path) -> tuple[pathlib.Path, Any]:
    """A run from end to end, and the parameters that it had in memory."""
    out = bytes_model.parent / "whole"
    kept = []
    real = module._calibrated
    with pytest.MonkeyPatch.context() as patch:

        def keep(*args: Any) -> Any:
            kept.append(real(*args))
            return kept[-1]

        patch.setattr(module, "_calibrated", keep)
        assert run(bytes_model, out, *ORDERED) == 0
    return out, kept[0]


def _is_what_was_made(whole: Any):
    out, params = whole
    names = {file.name for file in out.iterdir()}
    shards = {f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}
    assert names == shards | {
        *("config.json", "quantize_config.json", "tokenizer_config.json"),
        *("model.safetensors.index.json", "report.json"),
    }
    said = json.loads((out / "config.json").read_text())["quantization_config"]
    assert said == json.loads((out / "quantize_config.json").read_text())
    assert said["bits"] == 4 and said["group_size"] == 16
    assert (said["desc_act"], said["sym"]) == (True, False)
    assert said["checkpoint_format"] == "gptq_v2"
    model, again = from_hf(out, scan=True)
    assert jax.tree.structure(again) == jax.tree.structure(params)
    tokens = np.arange(24).reshape(2, 12)
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    _, there = from_hf(out, scan=True, mesh=mesh)
    jax.tree.map(np.testing.assert_array_equal, there, again)
    assert jax.tree.map(lambda x: x.sharding, there) == sharding.shardings(again, mesh)
    kernel = there["blocks"]["mlp"]["up"]["kernel"]
    codes = max(jax.tree.leaves(kernel), key=lambda x: x.nbytes)
    assert codes.addressable_shards[0].data.size < codes.size
    read = jax.jit(wlab.lift(model.apply))
    got, want = (read({"params": p}, tokens) for p in (again, params))
    np.testing.assert_array_equal(got, want)


def _reports(whole: Any):
    report = json.loads((whole[0] / "report.json").read_text())
    assert len(report["errors"]) == 14 and set(report["kinds"]) >= {"mlp/up/kernel"}
    kinds = report["kinds"].values()
    assert sum(k["error"] < k["nearest"] for k in kinds) >= 5
    assert report["sequences"] == [8, 4] and report["length"] == 16
    assert 10 < report["before"] != report["after"] < 2000
    # Codes, a scale and a zero point for 16 weights, the group of each input.
    assert 4 + 20 / 16 < report["bits_per_kernel_weight"] < 7.5
    assert report["bits_per_weight"] > report["bits_per_kernel_weight"]


def _is_the_same_written_again(whole: Any, tmp_path: pathlib.Path):
    out, _ = whole
    # Block by block, where the run had them stacked.
    model, params = from_hf(out)
    to_hf(tmp_path / "again", model, params, template=out, layout="gptq_v2")
    made = _safetensors.read(tmp_path / "again" / "model.safetensors")
    for file in out.glob("*.safetensors"):
        for name, x in _safetensors.read(file).items():
            np.testing.assert_array_equal(made.pop(name), x)
    assert not made
    for name in ("config.json", "quantize_config.json"):
        text = (out / name).read_text()
        assert json.loads((tmp_path / "again" / name).read_text()) == json.loads(text)
    to_hf(tmp_path / "dense", model, params, template=out)
    assert "quantization_config" not in (tmp_path / "dense/config.json").read_text()
    _, dense = from_hf(tmp_path / "dense")
    jax.tree.map(np.testing.assert_array_equal, dense, wlab.materialise(params))
    with pytest.raises(
        TypeError, match=r"'blocks_0/attention/key/kernel': a .* no code"
    ):
        to_hf(tmp_path / "x", model, dense, layout="gptq")
    up = params["blocks_1"]["mlp"]["up"]
    params["blocks_1"]["mlp"]["up"] = up | {
        "kernel": wlab.quant.rtn(dense["blocks_1"]["mlp"]["up"]["kernel"], bits=8)
    }
    with pytest.raises(ValueError, match="one thing of all kernels, but 'blocks_0/att"):
        to_hf(tmp_path / "x", model, params, layout="gptq_v2")


def _goes_on(
    whole: Any,
    bytes_model: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "out"
    real = module._Run.add

    def stops(self: Any, i: int, *args: Any) -> None:
        if i == 1:
            raise KeyboardInterrupt
        real(self, i, *args)

    monkeypatch.setattr(module._Run, "add", stops)
    assert run(bytes_model, out, *ORDERED) == 130
    assert "go on with the same command and --resume" in capsys.readouterr().err
    monkeypatch.setattr(module._Run, "add", real)
    assert not out.exists()
    partial = tmp_path / "out.partial"
    assert run(bytes_model, out, *ORDERED) == 2
    assert "is of a run that was stopped" in capsys.readouterr().err
    assert run(bytes_model, out, *ORDERED, "--bits", "8", "--resume") == 2
    assert "has bits=4, not 8" in capsys.readouterr().err
    shard = partial / "model-00001-of-00003.safetensors"
    kept = shard.read_bytes()
    shard.unlink()
    assert run(bytes_model, out, *ORDERED, "--resume") == 2
    assert f"{shard} is missing" in capsys.readouterr().err
    shard.write_bytes(kept[:-9])
    assert run(bytes_model, out, *ORDERED, "--resume") == 2
    assert "is cut off" in capsys.readouterr().err
    shard.write_bytes(kept)
    assert run(bytes_model, out, *ORDERED, "--resume", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    want = json.loads((whole[0] / "report.json").read_text())
    for key in set(want) - {"seconds", "out"}:
        assert printed[key] == want[key], key
    for file in whole[0].glob("*.safetensors"):
        assert file.read_bytes() == (out / file.name).read_bytes()
    assert not partial.exists()


@pytest.mark.parametrize("method", ["rsq", "awq"])
def test_methods_that_change_more_than_kernels(
    bytes_model: pathlib.Path, tmp_path: pathlib.Path, method: str
):
    out = tmp_path / "out"
    options = [*OPTIONS, "--bits", "8", "--no-progress", "--method", method]
    assert run(bytes_model, out, *options) == 0
    report = json.loads((out / "report.json").read_text())
    kinds = report["kinds"]
    assert set(kinds) == {"block"} if method == "awq" else len(kinds) == 7
    assert np.mean([k["error"] / k["nearest"] for k in kinds.values()]) < 1
    # What is read again is what was measured, and a float model but for rounding.
    model, params = from_hf(out, scan=True)
    tokens = np.frombuffer((bytes_model.parent / "text.txt").read_bytes(), np.uint8)
    tokens = tokens[-64:].reshape(4, 16).astype(np.int32)
    before, whole = from_hf(bytes_model, scan=True)
    apply = wlab.lift(lambda m, p: m.apply({"params": p}, tokens))
    got = np.asarray(jax.jit(lambda p: apply(model, p))(params))
    want = np.asarray(jax.jit(lambda p: apply(before, p))(whole))
    assert np.std(got - want) / np.std(want) < 0.02
    assert run(bytes_model, tmp_path / "x", *options[:-1], "awq", "--symmetric") == 2


def test_a_text_is_read_by_the_checkpoints_tokenizer(tmp_path: pathlib.Path):
    made = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(64)}
    tokenizer = made.Tokenizer(made.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = made.pre_tokenizers.Whitespace()
    folder = changed(LLAMA, tmp_path / "model")
    tokenizer.save(str(folder / "tokenizer.json"))
    ids = np.random.default_rng(2).integers(0, 64, 400)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    np.save(tmp_path / "ids.npy", ids)
    reports = []
    for name in ("text.txt", "ids.npy"):
        out, file = tmp_path / name[:3], str(tmp_path / name)
        method = ["--method", "rtn", "--no-progress", "--calibration", file]
        assert run(folder, out, *OPTIONS, *method) == 0
        assert (out / "tokenizer.json").exists()
        reports.append(json.loads((out / "report.json").read_text()))
    for key in ("before", "after", "sequences"):
        assert reports[0][key] == reports[1][key], key


def by_hand(folder: pathlib.Path) -> pathlib.Path:
    """Codes in the place of the kernels of the model's blocks, packed from nothing."""
    rng = np.random.default_rng(1)
    shutil.copytree(LLAMA, folder)
    found = dict(_safetensors.read(LLAMA / "model.safetensors"))
    for name, x in list(found.items()):
        if not name.endswith("_proj.weight"):
            continue
        del found[name]
        m, n = x.shape
        module = name.removesuffix("weight")
        words = rng.integers(-(2**31), 2**31, (n // 8 + n // 16, m), np.int32)
        found[module + "qweight"] = words[: n // 8]
        found[module + "qzeros"] = words[n // 8 :, : m // 8] & 0x66666666
        found[module + "scales"] = np.full((n // 16, m), 0.01, np.float16)
    _safetensors.write(folder / "model.safetensors", found, found.__getitem__)
    how = {"bits": 4, "group_size": 16, "desc_act": False, "sym": False}
    (folder / "quantize_config.json").write_text(json.dumps(how))
    return folder


def test_what_it_refuses(
    bytes_model: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
):
    out = tmp_path / "out"
    np.save(tmp_path / "high.npy", np.full(700, 256))
    np.save(tmp_path / "flat.npy", np.zeros((7, 100), np.int32))
    broken = _safetensors.read(bytes_model / "model.safetensors")
    norm = "model.layers.0.input_layernorm.weight"
    odd = changed(bytes_model, tmp_path / "odd")
    raw = json.loads((odd / "config.json").read_text()) | {"model_type": "gpt2"}
    (odd / "config.json").write_text(json.dumps(raw))
    (tmp_path / "text.txt").write_bytes(bytes(700))
    nan = changed(bytes_model, tmp_path / "nan", **{norm: broken[norm] * np.nan})
    cut = changed(bytes_model, tmp_path / "cut")
    file = cut / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    words = changed(LLAMA, tmp_path / "words")
    cases: list[tuple[pathlib.Path, list[str], str]] = [
        (bytes_model, ["--bits", "5"], "bits=5: checkpoints of GPTQ have (2, 3, 4, 8)"),
        (bytes_model, ["--bits", "3"], "at 3 bits does not fill words"),
        (bytes_model, ["--group", "24"], "group=24 does not divide the 32 inputs"),
        (bytes_model, ["--method", "gptx"], "invalid choice: 'gptx'"),
        (bytes_model, ["--length", "400"], "no sequence of 400 to calibrate"),
        (bytes_model, ["--calibration", str(tmp_path / "high.npy")], "from 256 to 256"),
        (bytes_model, ["--calibration", str(tmp_path / "flat.npy")], "shape (7, 100)"),
        (bytes_model, ["--calibration", "nowhere.txt"], "no file nowhere.txt"),
        (words, [], "no tokenizer.json, and 64 tokens are not bytes"),
        (odd, [], "of type 'gpt2' is not read"),
        (cut, [], "is cut off"),
        (nan, [], "loss on the held-out sequences is not finite"),
        (tmp_path / "nowhere", [], "holds no config.json"),
        (by_hand(tmp_path / "hand"), [], "is quantised already"),
    ]
    for model, args, message in cases:
        given = [*OPTIONS, *args]
        assert run(model, out, *given) == 2, message
        said = capsys.readouterr().err.strip()
        assert message in said and said.count("\n") == 0
        assert not out.exists() and not (tmp_path / "out.partial").exists()
    with pytest.raises(ValueError, match=r"'x' is none of rtn, gptq, gptaq, rescomp"):
        module.quantize(bytes_model, out, calibration=tmp_path / "text.txt", method="x")


def test_checkpoints_of_others(tmp_path: pathlib.Path):
    # Old writers have no word of it in config.json, and biases of zeros everywhere.
    folder = by_hand(tmp_path / "old")
    file = folder / "model.safetensors"
    bias = "model.layers.0.mlp.up_proj.bias"
    tensors = {k: np.array(x) for k, x in _safetensors.read(file).items()}
    tensors[bias] = np.zeros(48, np.float16)
    _safetensors.write(file, tensors, tensors.__getitem__)
    _, params = from_hf(folder, scan=True)
    up = params["blocks"]["mlp"]["up"]
    assert set(up) == {"kernel"} and up["kernel"].shape == (2, 32, 48)
    module = bias.removesuffix("bias")
    codes, zeros = (
        (tensors[module + name].astype(np.uint32)[..., None] >> np.arange(0, 32, 4))
        & 15
        for name in ("qweight", "qzeros")
    )
    codes = codes.transpose(0, 2, 1).reshape(32, 48).astype(int)
    zeros = np.repeat(zeros.reshape(2, 48).astype(int) + 1, 16, 0)
    want = (codes - zeros) * np.float32(np.float16(0.01))
    np.testing.assert_array_equal(
        wlab.materialise(up["kernel"])[0], want.astype(np.float32)
    )
    raw = json.loads((folder / "config.json").read_text())
    how = json.loads((folder / "quantize_config.json").read_text())
    how["quant_method"] = "gptq"

    def refused(config: Any, message: str) -> None:
        text = json.dumps(raw | {"quantization_config": how | config})
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            from_hf(folder)

    refused({"quant_method": "awq"}, r"quantised \(quantization_config\) by 'awq'")
    refused({"checkpoint_format": "marlin"}, "in format 'marlin'")
    refused({"bits": 5}, "has bits=5 and group_size=16")
    refused({"dynamic": {"-:lm_head": {}}}, "with dynamic=")
    refused({"bits": 8}, r"_proj.weight: .* are not of one matrix at 8 bits")
    del tensors[module + "scales"]
    _safetensors.write(file, tensors, tensors.__getitem__)
    refused({}, "up_proj.weight is quantised, but there is no scales of it")
