# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""A recipe's run in a folder, which may be killed at any moment and resumed.

The folder holds ``config.json`` (what runs), ``arms`` (what is finished, as JSON),
``checkpoints`` (of what is not) and ``metrics``, beside the report.
"""

import dataclasses
import json
import os
import pathlib
import re
import shutil
import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

import numpy as np

from wlab._files import replacing
from wlab.recipes import _versions

_FORMAT = 1


class Run:
    """Keeps what a run has done, so that another process can go on with it.

    Args:
      recipe: Its name on the command line.
      config: Its configuration, a dataclass.
      out: The folder; None keeps nothing, and everything works as it does with one.
      resume: Whether to go on with the run that the folder holds. Otherwise a new one
        begins there.

    Raises:
      ValueError: If there is no such run to resume, or a new one would write over one
        that was stopped.

    Examples:
      >>> import tempfile
      >>> @dataclasses.dataclass
      ... class Config:
      ...     steps: int = 3
      >>> with Run("demo", Config(), tempfile.mkdtemp()) as run:
      ...     run.once("the arm", lambda: {"loss": [0.5]})
      {'loss': [0.5]}
    """

    def __init__(
        self,
        recipe: str,
        config: Any,
        out: str | os.PathLike[str] | None,
        *,
        resume: bool = False,
    ):
        self._out = None if out is None else pathlib.Path(out)
        self._names: dict[str, str] = {}
        self._before = 0.0
        watch = _versions.Stopwatch.start()
        self._head: dict[str, Any] = {
            "format": _FORMAT,
            "recipe": recipe,
            "config": _as_json(dataclasses.asdict(config)),
            "started": watch.started,
            "versions": _versions.versions(),
            "finished": False,
        }
        if resume and self._out is None:
            raise ValueError("resume=True needs the folder of the run: out=")
        if self._out is not None:
            self._open(self._out, resume)
        # The time of the processes before counts as well.
        self.watch = _versions.Stopwatch(
            self._head["started"], watch.tick - self._before
        )

    def _open(self, out: pathlib.Path, resume: bool) -> None:
        head = self._head
        if resume:
            held = read_run(out, head["recipe"])
            if differs := different(held["config"], head["config"]):
                raise ValueError(f"the run in {out} has another config: {differs}")
            changed = different(held["versions"], head["versions"])
            if changed and not held["finished"]:
                warnings.warn(
                    f"the run in {out} began with other versions ({changed}): its last "
                    "bits may differ from those of one run",
                    RuntimeWarning,
                    stacklevel=4,
                )
            self._head = held
            for path in (out / "arms").glob("*.json"):
                seconds = json.loads(path.read_text(encoding="utf-8"))["seconds"]
                self._before = max(self._before, seconds)
            return
        if (recipe := stopped_run(out)) is not None:
            raise ValueError(
                f"{out} holds a run of {recipe} that did not end: go on with it (wlab "
                f"run {recipe} --resume {out}), choose another folder, or delete it"
            )
        ours = _is_run(out / "config.json")
        foreign = ("arms", "checkpoints", "config.json")
        if not ours and (found := [x for x in foreign if (out / x).exists()]):
            raise ValueError(
                f"{out} holds {' and '.join(found)} that no run of wlab wrote: choose "
                "another folder"
            )
        if _writes():
            for name in ("arms", "checkpoints", "metrics", "models") if ours else ():
                shutil.rmtree(out / name, ignore_errors=True)
            out.mkdir(parents=True, exist_ok=True)
            _write(out / "config.json", head)

    def once(self, name: str, make: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """Makes a result, or returns the one that was made before the run stopped.

        Args:
          name: What is made, such as the arm and the seed. Its checkpoints by
            :meth:`fit` under the same name are removed when it is done.
          make: Returns numbers, strings, arrays and lists of them by name.

        Returns:
          The result as JSON has it, with lists for arrays: the same, to the bit,
          whether it was made now or before.
        """
        if self._out is None:
            return json.loads(_dumps(make()))
        path = self._out / "arms" / f"{self._file_name(name)}.json"
        if not path.exists():
            made = {"name": name, "result": make(), "seconds": self.watch.seconds}
            if not _writes():
                return json.loads(_dumps(made["result"]))
            path.parent.mkdir(exist_ok=True)
            _write(path, made)
        if _writes():
            shutil.rmtree(self._checkpoints(name), ignore_errors=True)
        return json.loads(path.read_text(encoding="utf-8"))["result"]

    def fit(
        self,
        name: str,
        step: Any,
        state: Any,
        batches: Any,
        *,
        steps: int,
        saves: int = 10,
        **options: Any,
    ) -> tuple[Any, dict[str, np.ndarray]]:
        """Trains as `wlab.train.fit` does, from where the run was stopped.

        The records go to ``metrics/NAME.jsonl``.

        Args:
          name: What is trained; another one at every call.
          step: As in `wlab.train.fit`.
          state: As there, at the start.
          batches: As there, at the start.
          steps: As there.
          saves: How many checkpoints are written on the way, ten steps apart at least.
          **options: Of `wlab.train.fit`.

        Returns:
          What `wlab.train.fit` returns, of the whole training.
        """
        from wlab import train  # here, so that reports can be read without jax

        if self._out is None:
            return train.fit(step, state, batches, steps=steps, **options)
        folder, every = self._checkpoints(name), max(10, steps // saves)
        with train.Checkpoints(folder, keep=2, every=every) as checkpoints:
            state, history = train.resume(checkpoints, state, batches)
            options |= {"checkpoints": checkpoints, "history": history}
            if not _writes():
                return train.fit(step, state, batches, steps=steps, **options)
            path = self._out / "metrics" / f"{self._file_name(name)}.jsonl"
            train.rewind_metrics(path, int(np.max(state.step)))
            with train.MetricsWriter(path, append=True) as writer:
                options |= {"metrics": writer}
                return train.fit(step, state, batches, steps=steps, **options)

    def save_model(self, name: str, model: Any, params: Any) -> None:
        """Writes a decoder into ``models/NAME``, where it outlives the run.

        `wlab.models.from_hf`, ``wlab quantize`` and transformers read it.

        Args:
          name: What it is called.
          model: The decoder.
          params: Its parameters.
        """
        from wlab.models import to_hf  # here, so that reports can be read without jax

        if self._out is None or not _writes():
            return
        folder = self._out / "models" / self._file_name(name)
        if not folder.exists():
            to_hf(folder, model, params)

    def _checkpoints(self, name: str) -> pathlib.Path:
        assert self._out is not None
        return self._out / "checkpoints" / self._file_name(name)

    def _file_name(self, name: str) -> str:
        """A name without what a path cannot hold, of one thing only."""
        file = re.sub(r"[^\w.+-]+", "-", name)
        if (other := self._names.setdefault(file, name)) != name:
            raise ValueError(f"{name!r} and {other!r} would share files: rename one")
        return file

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None and self._out is not None and _writes():
            shutil.rmtree(self._out / "checkpoints", ignore_errors=True)
            _write(self._out / "config.json", self._head | {"finished": True})


def read_run(folder: pathlib.Path, recipe: str) -> dict[str, Any]:
    """Returns what ``config.json`` in the folder of a run says.

    Args:
      folder: Of the run.
      recipe: Whose run it must be.

    Raises:
      ValueError: If there is none, or of another recipe or format.
    """
    path = folder / "config.json"
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
        found, number = held["recipe"], held["format"]
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no run to resume: it has no config.json; give the folder "
            "that the run was started with"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not of a run of wlab: {error!r}") from error
    if number != _FORMAT:
        raise ValueError(
            f"{path} has format {number}, and this wlab reads format {_FORMAT}: go on "
            f"with wlab {held.get('versions', {}).get('wlab', 'of then')}"
        )
    if found != recipe:
        raise ValueError(
            f"{folder} holds a run of {found}, not of {recipe}: wlab run {found} "
            f"--resume {folder}"
        )
    return held


def stored_config(folder: pathlib.Path, recipe: str, kind: type) -> Any:
    """Returns the configuration of the run in a folder.

    Args:
      folder: Of the run.
      recipe: Whose run it must be.
      kind: The recipe's ``Config``.

    Raises:
      ValueError: As `read_run`; or if the recipe's ``Config`` has changed since.
    """
    held = read_run(folder, recipe)["config"]
    names = {field.name for field in dataclasses.fields(kind)}
    if changed := sorted(names ^ held.keys()):
        raise ValueError(
            f"the config of {recipe} has changed since the run in {folder} was "
            f"started, in {', '.join(changed)}: go on with the wlab that started it"
        )
    hints = typing.get_type_hints(kind)
    return kind(**{name: _typed(value, hints[name]) for name, value in held.items()})


def stopped_run(folder: pathlib.Path) -> str | None:
    """Returns the recipe whose run in a folder was stopped and has done something."""
    if not _is_run(folder / "config.json"):
        return None
    held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    done = [*folder.glob("arms/*.json"), *folder.glob("checkpoints/*/*/meta")]
    return held["recipe"] if done and not held.get("finished") else None


def _is_run(path: pathlib.Path) -> bool:
    """Whether a ``config.json`` is there and of a run of wlab."""
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(held, dict) and {"recipe", "format"} <= held.keys()


def different(held: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """Says in which fields two mappings differ; "" if in none."""
    return ", ".join(
        f"{name}={held.get(name)!r} there and {given.get(name)!r} here"
        for name in sorted(held.keys() | given.keys())
        if _dumps(held.get(name)) != _dumps(given.get(name))
    )


def _typed(value: Any, hint: Any) -> Any:
    """The value of a field from what JSON made of it."""
    if typing.get_origin(hint) is tuple and isinstance(value, list):
        return tuple(value)
    return value


def _writes() -> bool:
    """Whether this process writes the files: the first of several does."""
    if "jax" not in sys.modules:
        return True
    import jax

    return jax.process_index() == 0


def _dumps(value: Any) -> str:
    """JSON that brings every float back to the bit; NaN and infinity as Python has."""
    return json.dumps(value, indent=1, default=lambda x: np.asarray(x).tolist())


def _as_json(value: Any) -> Any:
    return json.loads(_dumps(value))


def _write(path: pathlib.Path, value: Any) -> None:
    with replacing(path) as part:
        part.write_text(_dumps(value) + "\n", encoding="utf-8")
