# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The command: one line for each array, exit code 1 if any does not agree."""

import argparse
import os
import sys
import zipfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_ENABLE_X64", "1")

import numpy as np

from tests import parity


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.parity", description=__doc__)
    parser.add_argument(
        "slug", type=lambda name: name.replace("_", "-"), choices=parity.slugs()
    )
    parser.add_argument("file", nargs="?", help="an .npz file of the same format")
    args = parser.parse_args()
    path = args.file or parity.golden(args.slug)
    try:
        with np.load(path) as file:
            rows = parity.compare(args.slug, dict(file))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        print(f"{path}: {error}", file=sys.stderr)
        return 2
    width = max(len(row.name) for row in rows) if rows else 0
    for row in rows:
        print(
            f"{row.name:{width}}  {row.error:9.2e}  {row.tolerance:.0e}  "
            f"{'ok' if row.ok else 'FAIL'}  {row.note}".rstrip()
        )
    failed = sum(not row.ok for row in rows)
    print(f"{args.slug}: {len(rows) - failed} of {len(rows)} arrays agree")
    return 1 if failed or not rows else 0


sys.exit(main())
