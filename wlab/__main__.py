# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line as a module: ``python -m wlab``."""

import sys

from wlab.cli import main

if __name__ == "__main__":
    sys.exit(main())
