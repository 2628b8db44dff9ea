# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The parity command on every method, and that it can fail."""

import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests import parity

ROOT = pathlib.Path(__file__).parents[2]


def command(*args: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "tests.parity", *map(str, args)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("slug", parity.slugs())
def test_agrees_with_the_reference(slug: str):
    with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
        rows = parity.compare(slug, dict(np.load(parity.golden(slug))))
    assert rows
    assert not [row for row in rows if not row.ok]


def test_the_command_says_what_agrees():
    result = command("mup-wd")
    assert result.returncode == 0, result.stdout + result.stderr
    assert "FAIL" not in result.stdout
    assert "6 of 6 arrays agree" in result.stdout


def test_every_reference_file_has_a_module():
    assert {p.stem for p in parity.GOLDEN.glob("*.npz")} == set(parity.slugs())


def test_a_wrong_number_and_an_unknown_array_fail(tmp_path: pathlib.Path):
    arrays = dict(np.load(parity.golden("mup-wd")))
    arrays["rule_lr"] = arrays["rule_lr"] * (1 + 1e-9)
    arrays["unheard_of"] = np.zeros(3)
    path = tmp_path / "changed.npz"
    np.savez(path, **arrays)
    result = command("mup-wd", path)
    assert result.returncode == 1
    failed = [line.split()[0] for line in result.stdout.splitlines() if "FAIL" in line]
    assert failed == ["rule_lr", "unheard_of"]


def test_an_unreadable_file_is_told_in_one_line(tmp_path: pathlib.Path):
    path = tmp_path / "not-a-file.npz"
    path.write_bytes(b"nothing of the kind")
    result = command("mup-wd", path)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert str(path) in result.stderr
