# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Text and images, and the pipelines over them.

The sources are what is on the machine already, a user's own files, and any dataset of
tensorflow-datasets. Every pipeline shuffles without end, shares a batch out among the
hosts, and saves its position.
"""

from wlab.data import _control as control  # noqa: F401
from wlab.data import _countdown as countdown  # noqa: F401
from wlab.data._documents import Documents as Documents
from wlab.data._documents import DocumentSplit as DocumentSplit
from wlab.data._documents import documents as documents
from wlab.data._examples import Column as Column
from wlab.data._examples import batches as batches
from wlab.data._examples import column as column
from wlab.data._images import Split as Split
from wlab.data._images import digits as digits
from wlab.data._packing import join as join
from wlab.data._packing import pack as pack
from wlab.data._packing import token_lengths as token_lengths
from wlab.data._text import Corpus as Corpus
from wlab.data._text import decode as decode
from wlab.data._text import encode as encode
from wlab.data._text import text as text
from wlab.data._text import text_files as text_files
from wlab.data._tfds import tfds_source as tfds_source
from wlab.data._tokenizer import Tokenizer as Tokenizer
from wlab.data._tokenizer import hf_tokenizer as hf_tokenizer
from wlab.data._windows import valid_windows as valid_windows
from wlab.data._windows import windows as windows
