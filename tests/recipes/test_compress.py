# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The recipes that compress a trained model."""

import dataclasses
import importlib
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from wlab.models import to_hf
from wlab.models.decoder import Decoder, tiny
from wlab.quant import decoder_stream, fuse_norms
from wlab.recipes import Report
from wlab.recipes._compress import BRIEF, shape

RECIPES = (
    "gptq",
    "gptaq",
    "rescomp",
    "ptq",
    "awq",
    "quantlrm",
    "layerwise",
    "rsq",
    "d2quant",
)


def recipe(name: str) -> Any:
    return importlib.import_module(f"wlab.recipes.{name}")


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A decoder of the quick size, as a run leaves it, that has learned nothing."""
    model = Decoder(shape(BRIEF))
    tokens = jnp.zeros((1, BRIEF.length), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    folder = tmp_path_factory.mktemp("models")
    to_hf(folder / "base-0", model, params)
    return str(folder)


@pytest.mark.parametrize("name", RECIPES)
def test_quick_run(name: str, bases: str, tmp_path: pathlib.Path):
    module = recipe(name)
    config = module.QUICK
    if name not in ("gptq", "layerwise"):
        config = dataclasses.replace(config, bases=bases)
    report = module.run(config, out=tmp_path, progress=False)
    assert report.recipe == name and len(report.arms) >= 3 and report.findings
    for arm in report.arms:
        figures = arm.figures.items()
        assert all(np.isfinite(values).all() for _, values in figures), arm.name
        if "size" in arm.figures and "3 bits" in arm.name:
            assert arm.mean("size") < report.arms[0].mean("size") < 33
    assert Report.from_json((tmp_path / "report.json").read_text()) == report
    assert (tmp_path / "report.png").stat().st_size > 10_000
    if name == "layerwise":
        check_choices(report)
    if name == "gptq":
        # Those that it has trained give another run the same numbers.
        config = dataclasses.replace(config, bases=str(tmp_path / "models"))
        again = module.run(config, progress=False)
        for a, b in zip(report.arms, again.arms, strict=True):
            assert a.figures | {"seconds": 0} == b.figures | {"seconds": 0}


def check_choices(report: Report):
    arms = {arm.name: arm for arm in report.arms}
    by_name = {name: arm.mean("error_1") for name, arm in arms.items()}
    # Of a network of three blocks: the orders of one score are each other's reverse.
    first, last = by_name["LIM, least first"], by_name["LIM, most first"]
    middle = 3 * by_name["mean of all choices"] - first - last
    assert by_name["best choice"] == pytest.approx(min(first, middle, last))
    (sizes,) = {arm.curves["error"].steps for arm in arms.values()}
    # Codes, and for each group of 16 a float32 scale and a zero point of as many bits.
    low, high = 2 + 34 / 16, 4 + 36 / 16
    assert sizes == pytest.approx([(low + 2 * high) / 3, (2 * low + high) / 3])


def test_channels_that_stand_out_in_the_same_function():
    """To the last bit, and fused norms undo it."""
    config = tiny(width=16, depth=2, heads=2, kv_heads=1, head_dim=8, hidden=16)
    model, tokens = Decoder(config), jnp.arange(12).reshape(2, 6)
    shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), shapes
    )

    @jax.jit
    def run(params: Any) -> Any:
        far = recipe("rsq").standing_out(params, jnp.array([3, 9]), 8.0)
        fused = [fuse_norms(tree, decoder_stream()) for tree in (params, far)]
        scales = [tree["blocks"]["mlp_norm"]["scale"] for tree in (params, far)]
        return (
            [model.apply({"params": x}, tokens) for x in (params, far)],
            fused,
            scales,
        )

    logits, fused, scales = run(params)
    np.testing.assert_array_equal(*logits)
    for a, b in zip(*map(jax.tree.leaves, fused), strict=True):
        np.testing.assert_array_equal(a, b)
    ratio = np.asarray(scales[1] / scales[0])
    assert (ratio == np.where(np.isin(np.arange(16), [3, 9]), 8, 1)[None]).all()


def test_bad_settings_are_told():
    for name, changes, message in (
        ("awq", {"width": 40}, "multiple of 32"),
        ("awq", {"bases": "nowhere"}, "nowhere/base-0 holds no config"),
        ("awq", {"only": ("nothing",)}, "no arm is named 'nothing'"),
        ("quantlrm", {"only": ("nothing",)}, "no arm is named 'nothing'"),
        ("quantlrm", {"kept": 1.0}, "a share of channels"),
        ("quantlrm", {"calibration": 7}, "of 8"),
        ("layerwise", {"low": 4, "high": 4}, "in this order"),
        ("layerwise", {"width": 40}, "multiples of group=16"),
    ):
        module = recipe(name)
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            module.run(dataclasses.replace(module.QUICK, **changes), progress=False)


@pytest.mark.slow
def test_the_effect_at_full_size():
    """The order against the mean of all choices, and against its reverse."""
    module = recipe("layerwise")
    held = {f.statement: f.holds for f in module.run(module.Config()).findings}
    for k in (2, 3):
        claim = f"{k} of 6 blocks at 2 bits: 'LIM, least first' loses no more than"
        assert held[f"{claim} 0.8 times 'mean of all choices'"]
        assert held[f"{claim} 'LIM, most first'"]
