# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The table of methods agrees with itself and with the package."""

import importlib.util
import pathlib
import re
import subprocess
import sys
from typing import get_args

import pytest

from wlab import methods
from wlab.methods import METHODS, RECIPES, Method, find


def test_holds_every_method_once_by_family_and_name():
    slugs = [method.slug for method in METHODS]
    assert len(slugs) == len(set(slugs)) == 45
    keys = [(method.family, method.slug) for method in METHODS]
    assert keys == sorted(keys)
    assert len({method.arxiv for method in METHODS}) == 45


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_every_field_is_filled_in_form(method: Method):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.slug)
    assert re.fullmatch(r"\d{4}\.\d{5}", method.arxiv)
    assert method.year == 2000 + int(method.arxiv[:2])
    assert not re.search(r"\b(19|20)\d\d\b", method.venue) or (
        int(method.venue.split()[-1]) >= method.year
    )
    assert method.family in get_args(methods.Family)
    assert method.kind in methods.KINDS
    assert method.title and not method.title.endswith(".")
    assert method.summary.endswith(".") and len(method.summary) < 150
    assert method.state and len(method.state) < 90


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_what_is_ready_can_be_found(method: Method):
    assert method.ready == bool(method.module)
    assert method.ready == bool(method.recipes)
    for name in method.recipes:
        assert name in RECIPES
    if method.ready:
        assert importlib.util.find_spec(method.module) is not None


def test_every_recipe_belongs_to_one_method_and_has_a_module():
    owned = [name for method in METHODS for name in method.recipes]
    # And some hold the methods of a family against each other.
    assert sorted([*owned, "lora", "optimizers", "peft", "ptq"]) == sorted(RECIPES)
    for module in RECIPES.values():
        assert importlib.util.find_spec(module) is not None


def test_eco_is_ready():
    eco = find("eco")
    assert eco.ready and eco.module == "wlab.optim"
    assert eco.recipes == ("eco", "eco-quadratic")
    assert (eco.family, eco.kind) == ("optim", "transform")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ecco", r"no method 'ecco'; did you mean eco\?"),
        ("LISA", r"no method 'LISA'; did you mean .*lisa"),
        ("zzzzzz", r"no method 'zzzzzz'; see: wlab list"),
    ],
)
def test_an_unknown_name_gets_the_near_ones(name, expected):
    with pytest.raises(ValueError, match=expected):
        find(name)


def test_the_table_needs_nothing_but_the_standard_library():
    code = (
        "import sys; before = set(sys.modules); import wlab.methods; "
        "new = {name.partition('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "['wlab']"


def test_the_readme_has_the_table_as_it_is():
    readme = pathlib.Path(__file__).parents[1] / "README.md"
    assert methods.markdown() in readme.read_text(encoding="utf-8")
