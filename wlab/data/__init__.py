# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text and images that are on the machine already, and the pipelines over them."""

from wlab.data._images import Split as Split
from wlab.data._images import digits as digits
from wlab.data._text import Corpus as Corpus
from wlab.data._text import decode as decode
from wlab.data._text import encode as encode
from wlab.data._text import text as text
from wlab.data._text import text_files as text_files
from wlab.data._windows import valid_windows as valid_windows
from wlab.data._windows import windows as windows
