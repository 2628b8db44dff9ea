# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of any pytree of arrays, by orbax.

A checkpoint holds the leaves under their paths, so that it does not depend on the
classes of the tree's nodes, and a table of the leaves' types. A template gives the
tree back: NamedTuples, structured weights, typed keys and narrow integers as they were.

A checkpoint appears whole or not at all, whenever the run is killed. What is damaged
later, by a disk or by hand, is told when it is read, and the one before it is offered.
"""

import json
import os
import pathlib
import re
import shutil
import warnings
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

import wlab
from wlab.train import _stored

__all__ = ["Checkpoints"]

# Of the table beside the leaves. It rises when an older wlab could not read what is
# written, or would read it wrongly.
_FORMAT = 1
_ITEMS = ("leaves", "types", "meta")


class Checkpoints:
    """The checkpoints of a run in a directory, written in the background.

    Args:
        directory: made if need be.
        keep: so many are kept, the latest.
        keep_every: beside them, those of the multiples of this number of steps are
            kept for ever.
        every: `fit` saves at the multiples of this number of steps.

    Examples:
        >>> import tempfile
        >>> with Checkpoints(tempfile.mkdtemp()) as checkpoints:
        ...     checkpoints.save(7, {"w": jnp.ones(2)}, {"seed": 0})
        ...     checkpoints.restore({"w": jnp.zeros(2)})
        (7, {'w': Array([1., 1.], dtype=float32)}, {'seed': 0})
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        keep: int = 3,
        keep_every: int | None = None,
        every: int = 1000,
    ):
        if keep < 1 or every < 1 or (keep_every is not None and keep_every < 1):
            raise ValueError(
                f"keep={keep}, keep_every={keep_every} and every={every} must be "
                "positive"
            )
        self._directory = pathlib.Path(directory).absolute()
        self._every = every
        self._saving: int | None = None  # the step that is on its way to the disk
        self._swept = False
        kept: list[Any] = [policies.LatestN(keep)]
        if keep_every is not None:
            kept.append(policies.EveryNSteps(keep_every))
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept), create=True
            ),
            item_handlers={
                "leaves": ocp.StandardCheckpointHandler(),
                "types": ocp.JsonCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
        )

    @property
    def directory(self) -> pathlib.Path:
        """Where they are."""
        return self._directory

    def due(self, step: int) -> bool:
        """Whether a run saves after this step."""
        return step % self._every == 0

    def save(
        self, step: int, state: Any, meta: Mapping[str, Any] | None = None
    ) -> None:
        """Starts to save a state; the state may be changed when this returns.

        A disk that is full or fails does not end the run: a warning names the
        directory, at once or when the next call finds out, and the next save tries
        again. On several processes all must call this.

        Args:
            step: the number under which it is saved.
            state: any pytree of arrays.
            meta: what else to remember, in values that JSON knows.

        Raises:
            ValueError: if the directory already holds this step.
            TypeError: if `meta` holds what JSON does not know.
        """
        leaves = _stored.by_path(state)
        meta = dict(meta or {})
        json.dumps(meta)  # here, not in the background
        self.wait()
        if not self._swept:
            self._sweep()
        if step in self._manager.all_steps():
            raise ValueError(
                f"{self._directory} already holds step {step}: restore from it, or "
                "save a new run elsewhere"
            )
        table = {
            "format": _FORMAT,
            "wlab": wlab.__version__,
            "jax": jax.__version__,
            "types": {p: _stored.type_of(x) for p, x in leaves.items()},
            "keys": {
                p: str(jax.random.key_impl(x))
                for p, x in leaves.items()
                if _stored.is_key(x.dtype)
            },
        }
        arrays = {p: _stored.storable(x) for p, x in leaves.items() if x.size}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    leaves=ocp.args.StandardSave(arrays),
                    types=ocp.args.JsonSave(table),
                    meta=ocp.args.JsonSave(meta),
                ),
                force=True,
            )
            self._saving = step
        except Exception as error:
            if not _of_the_disk(error):
                raise
            self._failed(step, error)

    def wait(self) -> None:
        """Waits until what was saved is on the disk, or warns that it is not."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            self._failed(self._saving, error)
        self._saving = None

    def _failed(self, step: int | None, error: Exception) -> None:
        """Says that a save failed, and makes room for the next."""
        self._sweep()
        self._manager.reload()  # what it thought gone or there may not be
        warnings.warn(
            f"the checkpoint of step {step} could not be written to {self._directory}: "
            f"{_reason(error)}. The run goes on, and the next save tries again",
            RuntimeWarning,
            stacklevel=3,
        )

    def _sweep(self) -> None:
        """Removes what killed and failed saves left. Only who saves may do this."""
        self._swept = True
        if jax.process_index() == 0:
            for left in self._directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)

    def latest_step(self) -> int | None:
        """The number of the latest checkpoint, or None where there is none."""
        return self._manager.latest_step()

    def restore(
        self, template: Any, step: int | None = None
    ) -> tuple[int, Any, dict[str, Any]]:
        """Reads a checkpoint.

        Args:
            template: a tree of arrays, or of `jax.ShapeDtypeStruct` as made by
                `jax.eval_shape`, with the structure, shapes and dtypes of what was
                saved; its leaves' shardings, where they have one, say where to put
                the arrays. These need not be those of the run that saved them.
            step: which one; by default the latest.

        Returns:
            The step, the state in the form of the template, and the meta.

        Raises:
            FileNotFoundError: if there is no such checkpoint.
            ValueError: if what was saved does not fit the template, is damaged, or is
                of another format or program; of a damaged one the message says which
                step is whole.
        """
        held = self._held()
        number = held[-1] if step is None and held else step
        if number is None or number not in held:
            wanted = "checkpoint" if step is None else f"checkpoint of step {step}"
            raise FileNotFoundError(
                f"{self._directory} holds no {wanted}; its steps are {held}"
            )
        try:
            return self._restore(number, template)
        except _Damaged as error:
            whole = self._whole_before(number, template)
            raise ValueError(f"{error}. {whole}") from error

    def recover(self, template: Any) -> tuple[int, Any, dict[str, Any]]:
        """Reads the latest checkpoint that is whole, as a run does that goes on.

        It warns of every later one that is damaged, and renames it to `damaged-STEP`,
        out of the way of the run and for you to look at. On several processes, which
        would have to agree on it, a damaged one is an error instead.

        Args:
            template: as in `restore`.

        Returns:
            As `restore`.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            ValueError: if none is whole, or as `restore`.
        """
        held = self._held()
        damaged: list[tuple[int, _Damaged]] = []
        while held and jax.process_count() == 1:
            number = held.pop()
            try:
                found = self._restore(number, template)
            except _Damaged as error:
                damaged.append((number, error))
                continue
            for later, error in damaged:
                aside = self._set_aside(later)
                warnings.warn(
                    f"{error}: going on from step {number}. What there is of it is now "
                    f"{aside}",
                    RuntimeWarning,
                    stacklevel=2,
                )
            return found
        return self.restore(template)

    def _held(self) -> list[int]:
        self.wait()
        return sorted(self._manager.all_steps())

    def _restore(self, step: int, template: Any) -> tuple[int, Any, dict[str, Any]]:
        """Reads one checkpoint; `_Damaged` where its files are."""
        leaves = _stored.by_path(template)
        folder = self._directory / str(step)
        if not any((folder / item).exists() for item in _ITEMS):
            names = ", ".join(sorted(p.name for p in folder.iterdir())) or "nothing"
            raise ValueError(
                f"{folder} is no checkpoint of wlab: it holds {names}. Give the "
                "directory that Checkpoints saved to"
            )
        found = self._read(
            step, types=ocp.args.JsonRestore(), meta=ocp.args.JsonRestore()
        )
        table = found["types"]
        self._check_format(step, table)
        types, keys = table["types"], table["keys"]
        self._check(step, types, {p: _stored.type_of(x) for p, x in leaves.items()})
        forms = {p: _stored.stored_form(x) for p, x in leaves.items() if x.size}
        stored = self._read(step, leaves=ocp.args.StandardRestore(forms))["leaves"]
        values = [
            _stored.as_before(stored[path], leaf.dtype, keys.get(path))
            if leaf.size
            else jnp.zeros(leaf.shape, leaf.dtype)  # which orbax does not store
            for path, leaf in leaves.items()
        ]
        state = jax.tree.unflatten(jax.tree.structure(template), values)
        return step, state, found["meta"]

    def _read(self, step: int, **items: ocp.args.CheckpointArgs) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except (jax.errors.JaxRuntimeError, MemoryError):
            raise  # memory that is full damages no file
        except Exception as error:  # orbax has no class of its own for it
            raise _Damaged(
                f"checkpoint {step} in {self._directory} is damaged: its "
                f"{' and '.join(items)} cannot be read ({_reason(error)})"
            ) from error

    def _whole_before(self, step: int, template: Any) -> str:
        """Says which earlier checkpoint is whole, and how to take it."""
        for number in reversed([s for s in self._held() if s < step]):
            try:
                self._restore(number, template)
            except ValueError:
                continue
            return (
                f"The one of step {number} is whole: take it by restore(template, "
                f"step={number}), and move {self._directory / str(step)} away if the "
                "run goes on from there"
            )
        return "No earlier one is whole"

    def _set_aside(self, step: int) -> pathlib.Path:
        """Renames a damaged checkpoint, so that its step can be saved again."""
        aside = self._directory / f"damaged-{step}"
        for again in range(2, 100):
            if not aside.exists():
                break
            aside = self._directory / f"damaged-{step}-{again}"
        os.rename(self._directory / str(step), aside)
        self._manager.reload()
        return aside

    def _check_format(self, step: int, table: dict[str, Any]) -> None:
        number = table.get("format", 0)
        if number == _FORMAT:
            return
        written = f"wlab {table['wlab']}" if "wlab" in table else "an early wlab"
        remedy = (
            "install that version or a later one"
            if number > _FORMAT
            else f"go on with that version, or start anew with wlab {wlab.__version__}"
        )
        raise ValueError(
            f"checkpoint {step} in {self._directory} has format {number}, of {written}"
            f", and this is wlab {wlab.__version__}, which reads format {_FORMAT}: "
            f"{remedy}"
        )

    def _check(self, step: int, found: dict[str, str], wanted: dict[str, str]) -> None:
        """One error for all that differs."""
        differ = [
            f"{path} is {found.get(path, 'absent')} there and "
            f"{wanted.get(path, 'absent')} in the template"
            for path in sorted(found.keys() | wanted.keys())
            if found.get(path) != wanted.get(path)
        ]
        if differ:
            more = f", and {len(differ) - 3} more" if len(differ) > 3 else ""
            raise ValueError(
                f"checkpoint {step} in {self._directory} does not fit the template: "
                f"{'; '.join(differ[:3])}{more}. Build the template with the model and "
                "the optimiser that were saved"
            )

    def close(self) -> None:
        """Waits until all is saved."""
        self.wait()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class _Damaged(ValueError):
    """A checkpoint whose files cannot be read."""


def _of_the_disk(error: Exception) -> bool:
    """Whether the system failed, which tensorstore says in its message only."""
    return isinstance(error, OSError) or "os_error_code" in str(error)


def _reason(error: Exception) -> str:
    """The cause in one short line: messages of tensorstore are long."""
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:120]}"
