# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A checkpoint quantised from folder to folder: what `wlab quantize` does.

The folder is made beside its place, a file for each block as the blocks are done, and
is renamed when all of it is there. A run that was stopped goes on at the block where it
was, and ends as it would have.
"""

import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from wlab import _safetensors, train
from wlab._files import replacing
from wlab.core import (
    Layered,
    find_layers,
    leaves_with_paths,
    lift,
    map_with_path,
    matrix_views,
    random_hadamard,
    random_orthogonal,
)
from wlab.models import (
    _hf,
    _hf_config,
    _hf_gptq,
    decoder_groups,
    decoder_importance,
    from_hf,
    layered,
    rotated,
)
from wlab.models._hf_gptq import Stored
from wlab.models.decoder import Decoder, DecoderConfig
from wlab.quant import (
    BlockInputs,
    LayerError,
    awq,
    calibrate,
    compressors,
    map_blocks,
    minmax,
)
from wlab.quant._gptq_layout import BITS

__all__ = ["METHODS", "Quantization", "quantize"]

Method = Literal["rtn", "gptq", "gptaq", "rescomp", "rsq", "awq"]
METHODS: tuple[str, ...] = get_args(Method)
_LONGEST = 2048
_STATE = "state.json"  # of a run that is not at its end
_LOGITS = 2**27  # of this many at a time the loss is computed


@dataclasses.dataclass(frozen=True)
class Quantization:
    """What came of it.

    Attributes:
        model: the folder that was read.
        out: the folder that was written.
        settings: how, by the names of `quantize`; None stands for all inputs as group.
        sequences: that methods saw, and that were held out.
        length: tokens of a sequence.
        errors: of every kernel, what is lost of its outputs, and what rounding to
            nearest loses.
        before: perplexity on the held-out sequences, of the model as it was.
        after: of the quantised one.
        bits_per_weight: all that is stored, for each parameter of the model.
        bits_per_kernel_weight: what the kernels of the blocks take, for each weight.
        seconds: of the whole run; one that was stopped counts what it had done.
    """

    model: str
    out: str
    settings: Mapping[str, Any]
    sequences: tuple[int, int]
    length: int
    errors: Sequence[LayerError]
    before: float
    after: float
    bits_per_weight: float
    bits_per_kernel_weight: float
    seconds: float

    def kinds(self) -> dict[str, tuple[float, float, LayerError]]:
        """By path within a block: mean error, that of nearest, and the worst layer."""
        out = {}
        for path in dict.fromkeys(e.path for e in self.errors):
            mine = [e for e in self.errors if e.path == path]
            means = (np.mean([getattr(e, k) for e in mine]) for k in _BOTH)
            error, nearest = map(float, means)
            out[path] = (error, nearest, max(mine, key=lambda e: e.error))
        return out

    def to_json(self) -> str:
        """As JSON; what is not finite becomes null."""
        fields = dataclasses.asdict(self)
        fields["errors"] = [e._asdict() for e in self.errors]
        fields["kinds"] = {
            path: {"error": error, "nearest": nearest, "worst_layer": worst.layer}
            for path, (error, nearest, worst) in self.kinds().items()
        }
        return json.dumps(_finite(fields), indent=2, allow_nan=False) + "\n"

    def print(self, console: Any = None) -> None:
        """Prints a table of the kernels and the figures of the whole.

        Args:
            console: a `rich.console.Console`; by default one on standard output.
        """
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        # To a file or a pipe go whole lines.
        console = console or (Console() if sys.stdout.isatty() else Console(width=100))
        how = self.settings
        group = "no groups" if how["group"] is None else f"groups of {how['group']}"
        table = Table(
            title=Text(f"{self.model}: {how['method']}, {how['bits']} bits, {group}"),
            box=box.SIMPLE,
        )
        table.add_column("kernel", no_wrap=True)
        heads = ("lost of outputs (%)", "nearest (%)", "ratio", "worst (%)", "block")
        for head in heads:
            table.add_column(head, justify="right")
        for path, (error, nearest, worst) in self.kinds().items():
            ratio = f"{error / nearest:.2f}" if nearest else "-"
            table.add_row(
                path.removesuffix("/kernel"),
                f"{100 * error:.3g}",
                f"{100 * nearest:.3g}",
                ratio,
                f"{100 * worst.error:.3g}",
                str(worst.layer),
            )
        console.print(table)
        seen, held = self.sequences
        lines = [
            f"perplexity {self.before:.4f} -> {self.after:.4f} on {held} held-out "
            f"sequences of {self.length} tokens ({seen} for calibration)",
            f"{self.bits_per_weight:.3f} bits per weight, all that is stored; "
            f"{self.bits_per_kernel_weight:.3f} in the kernels of the blocks",
            f"{self.seconds:.1f} s; written to {self.out}",
        ]
        for line in lines:
            console.print(line, highlight=False, soft_wrap=True)


_BOTH = ("error", "nearest")


def quantize(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    calibration: str | os.PathLike[str],
    method: Method = "gptq",
    bits: int = 4,
    group: int | None = 128,
    sequences: int = 128,
    length: int | None = None,
    batch: int = 8,
    symmetric: bool = False,
    clip: bool = False,
    act_order: bool = False,
    resume: bool = False,
    progress: bool = True,
) -> Quantization:
    """Quantises the kernels of a checkpoint's blocks, and writes one in GPTQ's layout.

    Symmetric kernels are written in the format "gptq", others in "gptq_v2", which has
    all the zero points that they may have.

    Args:
        model: a folder of floats that `wlab.models.from_hf` reads.
        out: the folder to write, which must not be there. While the run lasts its files
            are in ``out.partial``.
        calibration: a text, tokenised by the tokenizer of `model`; without one and with
            256 tokens, its bytes are the tokens. Or a file ``.npy`` of tokens. The last
            tenth is held out.
        method: rtn, gptq, gptaq or rescomp; rsq, which is gptq of a model that is
            turned by a random rotation, with tokens weighed by the attention that they
            receive; or awq, which scales and clips in full precision, so that what is
            lost is told of blocks and not of kernels. The head of a turned model is its
            own.
        bits: of a code: 2, 3, 4 or 8.
        group: inputs that share a range; None: all.
        sequences: that the method sees at most, spread over the text; and that are held
            out at most.
        length: tokens of a sequence. None: 2048, or fewer where the model was made for
            fewer or the text has no 20 such sequences.
        batch: sequences at a time.
        symmetric: no zero points; not for awq.
        clip: a shorter range for each group, where its error is less; awq always does.
        act_order: the most active channels first, in groups of their own; not for awq.
        resume: go on with the run that was stopped, or begin.
        progress: whether to draw a bar, if stderr is a terminal.

    Returns:
        What was lost, and what it takes; also in ``report.json``.

    Raises:
        FileExistsError: if there is something at `out`, or a stopped run without
            `resume`.
        FileNotFoundError: for a folder or a file that is not there.
        ValueError: for a model, text or options that do not fit together, inputs that
            are not finite, or a run that cannot be gone on with.
    """
    start = time.perf_counter()
    folder, source = pathlib.Path(out), pathlib.Path(model)
    partial = folder.with_name(folder.name + ".partial")
    _check_options(method, bits, group, sequences, length, batch)
    if method == "awq" and (symmetric or act_order):
        raise ValueError(
            "awq has zero points and leaves channels in their order: symmetric and "
            "act_order are not for it"
        )
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(f"{folder} is there already: name a new folder")
    if partial.exists() and not resume:
        raise FileExistsError(
            f"{partial} is of a run that was stopped: go on with it (resume), or "
            "delete it"
        )
    raw = _hf_config.read_json(source / _hf_config.CONFIG)
    if _hf_gptq.read_config(raw, source) is not None:
        raise ValueError(f"{source} is quantised already: give the model of floats")
    decoder, params = whole = from_hf(source, scan=True)
    if method == "rsq":
        decoder, params = _turned(decoder, params)
    stored = Stored(
        bits, group, symmetric, act_order, "gptq" if symmetric else "gptq_v2"
    )
    _check_kernels(params, stored)
    tokens = _tokens(pathlib.Path(calibration), source, decoder.config.vocab)
    length = length or _length(raw, tokens.size)
    seen, held = _divide(tokens, sequences, length, batch)
    settings = {
        "method": method,
        "bits": bits,
        "group": group,
        "sequences": sequences,
        "batch": batch,
        "symmetric": symmetric,
        "clip": clip,
        "act_order": act_order,
    }
    run = _Run(
        partial,
        {
            "model": str(source.resolve()),
            "length": length,
            "tokens": hashlib.sha256(tokens.tobytes()).hexdigest(),
            **settings,
        },
        decoder,
        params,
        stored,
    )
    begun = partial.exists()
    try:
        run.open()
        if run.before is None:
            run.before = _perplexity(*whole, held)
            run.save(start)
        del whole
        with train.Progress(show=None if progress else False) as bars:
            bar = bars.add("blocks", run.depth, show=_objective)
            make = _scaled if method == "awq" else _calibrated
            made = make(run, jnp.asarray(seen), settings, bar, start)
        after = _perplexity(decoder, made, held)
    except ValueError:
        # The same would go wrong again: nothing is kept of a run that has just begun.
        if not begun:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    held_bits = run.finish(source)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    kernels = {p: x for p, x in leaves_with_paths(params) if _hf.in_blocks(p)}
    report = Quantization(
        model=str(source),
        out=str(folder),
        settings=settings,
        sequences=(seen.shape[0] * seen.shape[1], held.shape[0]),
        length=length,
        errors=run.errors,
        before=run.before,
        after=after,
        bits_per_weight=held_bits["all"] / count,
        bits_per_kernel_weight=held_bits["kernels"]
        / sum(math.prod(x.shape) for x in kernels.values()),
        seconds=run.spent + time.perf_counter() - start,
    )
    (partial / "report.json").write_text(report.to_json(), encoding="utf-8")
    (partial / _STATE).unlink()
    partial.rename(folder)
    return report


# --- The run ---------------------------------------------------------------------


class _Run:
    """The files of a run, and what is done of it."""

    def __init__(
        self,
        folder: pathlib.Path,
        identity: dict[str, Any],
        model: Decoder,
        params: Any,
        stored: Stored,
    ):
        self.folder, self.identity = folder, identity
        self.model, self.params, self.stored = model, params, stored
        self.before: float | None = None
        self.errors: list[LayerError] = []
        self.done: list[Any] = []
        self.spent = 0.0  # seconds, before this start
        self.layers = find_layers(params, "blocks").take(params)[0]
        self.depth = model.config.depth

    def open(self) -> None:
        """Makes the folder, or reads what is in it."""
        if not (self.folder / _STATE).exists():
            if self.folder.exists() and any(self.folder.iterdir()):
                raise ValueError(
                    f"{self.folder} has no {_STATE}: no run to go on with; delete it"
                )
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        state = _hf_config.read_json(self.folder / _STATE)
        for key, value in self.identity.items():
            if state["run"].get(key) != value:
                raise ValueError(
                    f"the run in {self.folder} has {key}={state['run'].get(key)}, not "
                    f"{value}: go on with its own options, or delete it"
                )
        self.before, self.spent = state["before"], state["seconds"]
        self.errors = [LayerError(**error) for error in state["errors"]]
        self.done = [self.read(i) for i in range(state["blocks"])]

    def save(self, start: float) -> None:
        """Writes what is known of the run; the old or the new is there, whole."""
        state = {
            "run": self.identity,
            "before": self.before,
            "blocks": len(self.done),
            "errors": [error._asdict() for error in self.errors],
            "seconds": self.spent + time.perf_counter() - start,
        }
        with replacing(self.folder / _STATE) as path:
            path.write_text(_hf_config.dump(state), encoding="utf-8")

    def add(self, i: int, layer: Any, errors: list[LayerError], start: float) -> None:
        """Writes a block."""
        tensors: dict[str, np.ndarray] = {}
        for path, leaf in leaves_with_paths({f"blocks_{i}": layer}):
            name = _hf.tensor_name(path)
            if not _hf.in_blocks(path):
                tensors[name] = _hf.theirs(np.asarray(leaf), path)
                continue
            sides = _hf.sides(path, tuple(leaf.shape))
            arrays = _hf_gptq.store(leaf, sides, self.stored.form)
            module = name.removesuffix("weight")
            tensors |= {module + suffix: x for suffix, x in arrays.items()}
        self._write(i, tensors)
        self.errors += errors
        self.done.append(layer)
        self.save(start)

    def finish(self, source: pathlib.Path) -> dict[str, int]:
        """Writes all else; returns the bits of the whole and of the kernels."""
        ends = {
            _hf.tensor_name(path): _hf.theirs(np.asarray(leaf), path)
            for path, leaf in leaves_with_paths(self.params)
            if not path.startswith("blocks")
        }
        self._write(self.depth, ends)
        places, sizes = {}, {}
        for i in range(self.depth + 1):
            file = self._file(i)
            for name, x in _safetensors.read(file).items():
                places[name], sizes[name] = file.name, x.nbytes
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": places}
        (self.folder / _hf.INDEX).write_text(_hf_config.dump(index), encoding="utf-8")
        text = _hf_config.config_text(
            self.model.config,
            np.dtype(self.params["embed"]["embedding"].dtype),
            source,
            self.stored,
        )
        _hf.write_beside(self.folder, text, source, self.stored)
        kernels = [
            size
            for name, size in sizes.items()
            if name.rpartition(".")[2] in _hf_gptq.SUFFIXES
        ]
        return {"all": 8 * sum(sizes.values()), "kernels": 8 * sum(kernels)}

    def read(self, i: int) -> Any:
        """A block that was written."""
        file = self._file(i)
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing, which the run has written: delete {self.folder} "
                "and begin anew"
            )
        tensors = _safetensors.read(file)

        def load(path: str, leaf: Any) -> Any:
            name, shape = _hf.tensor_name(path), tuple(leaf.shape[1:])
            module = name.removesuffix("weight")
            if not _hf.in_blocks(path):
                return jnp.asarray(_hf.ours(tensors[name], path, shape))
            arrays = {suffix: tensors[module + suffix] for suffix in _hf_gptq.SUFFIXES}
            return _hf.kernel_of_codes(
                [arrays],
                self.stored,
                path,
                shape,
                dtype=leaf.dtype,
                stack=False,
                ordered=self.stored.ordered and self.stored.group is not None,
            )

        return map_with_path(load, {f"blocks_{i}": self.layers})[f"blocks_{i}"]

    def _write(self, i: int, tensors: Mapping[str, np.ndarray]) -> None:
        with replacing(self._file(i)) as path:
            _safetensors.write(path, tensors, tensors.__getitem__)

    def _file(self, i: int) -> pathlib.Path:
        count = self.depth + 1
        return self.folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors"


def _calibrated(
    run: _Run, seen: jax.Array, settings: Mapping[str, Any], bar: Any, start: float
) -> Any:
    """Blocks that are compressed with the inputs that the compressed ones give."""
    bar(len(run.done), {"errors": run.errors})

    def on_block(i: int, layer: Any, errors: list[LayerError]) -> None:
        run.add(i, layer, errors, start)
        bar(i + 1, {"errors": errors})

    rsq = settings["method"] == "rsq"
    return calibrate(
        _parts(run.model),
        run.params,
        seen,
        _compressor(settings),
        importance=decoder_importance(run.model) if rsq else None,
        done=list(run.done),
        on_block=on_block,
    ).params


def _scaled(
    run: _Run, seen: jax.Array, settings: Mapping[str, Any], bar: Any, start: float
) -> Any:
    """Blocks that are scaled, clipped and rounded with the original inputs."""
    parts, batch = _parts(run.model), seen.shape[1]
    groups = decoder_groups(run.model.config, seen.shape[-1])
    options = {"bits": settings["bits"], "group": settings["group"]}
    kernels = {path for one in groups for path in one.paths}
    apply: Any = parts.block
    block = lift(apply)

    @jax.jit
    def one(layer: Any, inputs: BlockInputs) -> Any:
        views = matrix_views(layer)

        def rounded(path: str, w: Any) -> Any:
            return minmax(w, view=views[path], **options) if path in kernels else w

        def added(layer: Any) -> jax.Array:
            # What a block adds to its stream, in which errors would not be seen.
            return jax.lax.map(
                lambda x: block(layer, x[None], seen[0, :1])[0] - x,
                inputs.x,
                batch_size=batch,
            )

        made = awq(layer, inputs.kernels, groups, **options)
        want = added(layer)
        whole = jnp.sum(want**2)
        return made, [
            jnp.sum((added(tree) - want) ** 2) / whole
            for tree in (made, map_with_path(rounded, layer))
        ]

    def fn(i: int, layer: Any, inputs: BlockInputs) -> Any:
        if i >= len(run.done):
            made, (error, nearest) = one(layer, inputs)
            rows = math.prod(inputs.x.shape[:-1])
            found = LayerError(i, "block", float(error), float(nearest), rows)
            run.add(i, made, [found], start)
        bar(i + 1, {"errors": run.errors[i : i + 1]})
        return run.read(i)  # as it is stored: with ranges of 16 bits

    bar(len(run.done), {"errors": run.errors})
    leads = [one.paths[0] for one in groups]
    return map_blocks(parts, run.params, seen, fn, select=leads)


def _parts(model: Decoder) -> Layered:
    def loss(logits: jax.Array, batch: Any) -> jax.Array:
        del batch
        return jnp.mean(logits)

    return layered(model, loss, inputs=lambda tokens: tokens)


def _turned(model: Decoder, params: Any) -> tuple[Decoder, Any]:
    """The same function with its stream turned, in the same architecture."""
    width = model.config.width
    try:
        q = random_hadamard(0, width)
    except ValueError:
        q = random_orthogonal(0, width)
    turned, new = rotated(model, params, q)
    if not model.config.norm_offset:
        return turned, new

    def less(path: str, x: jax.Array) -> jax.Array:
        return x - 1 if path.endswith("norm/scale") else x

    config = dataclasses.replace(turned.config, norm_offset=True)
    return Decoder(config), map_with_path(less, new)


def _objective(metrics: Mapping[str, Any]) -> str:
    """What the bar shows of a block."""
    errors = metrics["errors"]
    if not errors:
        return ""
    error, nearest = (100 * np.mean([getattr(e, k) for e in errors]) for k in _BOTH)
    return f"lost {error:.3g} %, nearest {nearest:.3g} %"


def _compressor(settings: Mapping[str, Any]) -> compressors.Compressor:
    options = {k: settings[k] for k in ("bits", "group", "symmetric", "clip")}
    options["scale_dtype"] = jnp.float16
    method, group = settings["method"], settings["group"]
    if method == "rsq":
        method = "gptq"
    if method != "rtn":
        options["act_order"] = settings["act_order"]
        if group is not None and 128 % group and group % 128:
            options["block"] = group
    return getattr(compressors, method)(**options)


def _perplexity(model: Decoder, params: Any, held: np.ndarray) -> float:
    """Of the next tokens of held-out sequences."""
    one = held.shape[1] * model.config.vocab
    size = max(1, min(len(held), _LOGITS // one))
    total = 0.0
    program = _losses(model.config)
    for i in range(0, len(held), size):
        # The last batch is filled up with sequences that do not count.
        rows = held[np.arange(i, i + size) % len(held)]
        total += float(np.sum(program(params, rows)[: len(held) - i]))
    value = math.exp(min(total / len(held), 700.0))
    if not math.isfinite(value):
        raise ValueError(
            "the model's loss on the held-out sequences is not finite: its weights or "
            "activations are not"
        )
    return value


@functools.lru_cache(4)
def _losses(config: DecoderConfig) -> Any:
    """The mean loss of each sequence."""
    model = Decoder(config)

    def read(params: Any, tokens: jax.Array) -> jax.Array:
        logits = lift(model.apply)({"params": params}, tokens[:, :-1])
        fn = jax.vmap(lambda x, t: train.next_token_loss(x[None], t[None]))
        return fn(logits, tokens)

    return jax.jit(read)


# --- What is given ---------------------------------------------------------------


def _check_options(
    method: str,
    bits: int,
    group: int | None,
    sequences: int,
    length: int | None,
    batch: int,
) -> None:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")
    if bits not in BITS:
        raise ValueError(f"bits={bits}: checkpoints of GPTQ have {BITS}")
    sizes = {"group": group, "sequences": sequences, "length": length, "batch": batch}
    for name, value in sizes.items():
        if value is not None and value < (2 if name == "length" else 1):
            raise ValueError(f"{name}={value} is too small")


def _check_kernels(params: Any, stored: Stored) -> None:
    """Every kernel can be stored, before the work and not after it."""
    for path, leaf in leaves_with_paths(params):
        if not _hf.in_blocks(path):
            continue
        n, m = _hf.sides(path, tuple(leaf.shape[1:]))
        if stored.group is not None and n % stored.group:
            raise ValueError(
                f"group={stored.group} does not divide the {n} inputs of {path}: take "
                f"one that divides all, such as {math.gcd(n, stored.group)}, or none"
            )
        try:
            _hf_gptq.check_sizes(n, m, stored.bits)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def _tokens(file: pathlib.Path, source: pathlib.Path, vocab: int) -> np.ndarray:
    """The tokens of a text or of a file of tokens, int32 [size]."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file} for calibration")
    if file.suffix == ".npy":
        tokens = np.load(file, allow_pickle=False)
        if tokens.ndim != 1 or not np.issubdtype(tokens.dtype, np.integer):
            raise ValueError(
                f"{file} holds {tokens.dtype} of shape {tokens.shape}: tokens are "
                "integers of shape [size]"
            )
    elif (source / "tokenizer.json").exists():
        from wlab.data import hf_tokenizer

        tokens = hf_tokenizer(source).encode(file.read_bytes())
    elif vocab == 256:
        tokens = np.frombuffer(file.read_bytes(), np.uint8)
    else:
        raise ValueError(
            f"{source} has no tokenizer.json, and {vocab} tokens are not bytes: put a "
            "tokenizer there, or give the tokens as a file .npy"
        )
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
        raise ValueError(
            f"{file} has tokens from {tokens.min()} to {tokens.max()}, and the model "
            f"{vocab} of them"
        )
    return tokens.astype(np.int32)


def _length(raw: Mapping[str, Any], size: int) -> int:
    """The longest sequence by default."""
    most = raw.get("max_position_embeddings") or _LONGEST
    return max(2, min(_LONGEST, most, size // 20))


def _divide(
    tokens: np.ndarray, sequences: int, length: int, batch: int
) -> tuple[np.ndarray, np.ndarray]:
    """Batches [n, batch, length] to calibrate with, and sequences [n, length]."""
    count = tokens.size // length
    if count < 2:
        raise ValueError(
            f"a text of {tokens.size} tokens has no sequence of {length} to calibrate "
            "with and another to hold out: give a longer text or a smaller length"
        )
    rows = tokens[: count * length].reshape(count, length)
    held = rows[count - max(1, count // 10) :]
    seen = rows[: count - len(held)]

    def spread(rows: np.ndarray, n: int) -> np.ndarray:
        return rows[np.arange(n) * len(rows) // n]

    n = min(sequences, len(seen))
    batch = min(batch, n)
    n = n // batch * batch
    seen = spread(seen, n).reshape(-1, batch, length)
    return seen, spread(held, min(sequences, len(held)))


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
