# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""The command line: list the methods, show one, run a recipe, quantise a checkpoint.

Whatever is slow to import (jax, tyro, rich) is imported by the command that needs
it, so that help and the table of methods answer at once. What is wrong with the
input is said in one line, with exit code 2; ``--debug`` shows the traceback.
"""

import argparse
import contextlib
import dataclasses
import difflib
import importlib
import inspect
import io
import json
import os
import pathlib
import re
import shlex
import sys
import tempfile
import textwrap
import typing
from collections.abc import Generator, Sequence
from types import ModuleType
from typing import Annotated, Any, NoReturn, get_args

import wlab
from wlab import methods

_COMMANDS = ("list", "show", "run", "plan", "quantize")


class UsageError(ValueError):
    """What the command line cannot act on; its message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
      argv: The arguments; those of the process by default.

    Returns:
      The exit code: 0, or 2 where the input cannot be acted on, 130 where the
      user stopped it.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    try:
        try:
            code = _dispatch(args)
        except SystemExit as stop:  # how argparse, tyro and rich end
            code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()  # a closed pipe shows here rather than at exit
        return code
    except BrokenPipeError:
        # The reader has left, as with `wlab list | head -1`. Point the stream at
        # nothing, or Python complains when it flushes on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt as stop:
        if debug:
            raise
        hint = f"; {stop}" if str(stop) else ""
        print(f"\nwlab: stopped{hint}", file=sys.stderr)
        return 130
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if debug or not (line := _one_line(error)):
            raise
        print(f"wlab: {line}", file=sys.stderr)
        return 2


def _dispatch(args: list[str]) -> int:
    """Runs one command."""
    # The recipe's own options are for tyro to parse, which argparse would spoil.
    if args[:1] == ["run"]:
        return _run(args[1:])
    options = _parser().parse_args(args)
    if options.command == "list":
        return _list(options.family, ready=options.ready, as_json=options.json)
    if options.command == "show":
        return _show(options.name, as_json=options.json)
    if options.command == "plan":
        return _plan(options)
    if options.command == "quantize":
        return _quantize(options)
    _parser().print_help()
    return 0


def _one_line(error: Exception) -> str:
    """Says in one line what is wrong; "" for what is not the user's to mend."""
    if isinstance(error, UsageError):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        if missing in ("", "wlab"):
            return ""
        return f"the package {missing!r} is missing; install it: pip install {missing}"
    if isinstance(error, OSError) and error.strerror:
        name = f"{error.filename}: " if error.filename is not None else ""
        return f"{name}{error.strerror}; check the path (--debug shows where)"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text} (--debug shows where)"


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--\S+)", message)
        if unknown:
            options = ("--family", "--ready", "--json", "--help", "--version")
            message += methods.near(unknown[1], options)
        wrong = re.match(r"argument COMMAND: invalid choice: '([^']*)'", message)
        if wrong:
            message = f"there is no command {wrong[1]!r}"
            message += methods.near(wrong[1], _COMMANDS)
        raise UsageError(f"{message} (see: {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    """Returns the parser of everything but a recipe's options."""
    parser = _Parser(
        prog="wlab",
        description="The weight lab: any weight method, any Flax model, one pytree.",
        epilog="--debug shows the traceback of an error that is told in one line.",
    )
    version = f"wlab {wlab.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    listing = commands.add_parser("list", help="list the methods")
    families = get_args(methods.Family)
    listing.add_argument("--family", choices=families, help="only this room")
    listing.add_argument("--ready", action="store_true", help="only what is there")
    listing.add_argument("--json", action="store_true", help="as JSON")
    show = commands.add_parser("show", help="show one method, or a size of the model")
    show.add_argument("name", metavar="NAME", help="a method, a recipe, or a size")
    show.add_argument("--json", action="store_true", help="as JSON")
    commands.add_parser("run", help="run a recipe (see: wlab run --help)")
    _add_plan(commands)
    _add_quantize(commands)
    return parser


def _add_plan(commands: Any) -> None:
    """The options of `wlab plan`."""
    plan = commands.add_parser(
        "plan", help="what a train step needs on a pod, from its compiler"
    )
    plan.add_argument("--model", action="append", help="a size, such as 2b; repeatable")
    plan.add_argument("--optimizer", action="append", help="such as eco; repeatable")
    plan.add_argument("--topology", default="v5e:16x16", help="a slice, or cpu:8")
    plan.add_argument("--batch", type=int, help="sequences of a step, on all devices")
    plan.add_argument("--population", type=int, help="members of a search (eggroll)")
    plan.add_argument("--chunk", type=int, help="members a device runs at a time")
    plan.add_argument("--seq", type=int, default=2048, help="tokens of a sequence")
    plan.add_argument(
        "--mesh", help="data=..,fsdp=..,tensor=..,expert=..; -1: the rest"
    )
    plan.add_argument(
        "--remat", choices=("full", "none"), help="compute activations again or not"
    )
    plan.add_argument(
        "--largest-batch", action="store_true", help="search the largest that fits"
    )
    plan.add_argument("--json", type=pathlib.Path, metavar="FILE", help="write it too")


def _add_quantize(commands: Any) -> None:
    """The options of `wlab quantize`."""
    made = commands.add_parser(
        "quantize", help="quantise a checkpoint, from folder to folder"
    )
    made.add_argument("model", metavar="MODEL", help="a folder of Hugging Face")
    made.add_argument(
        "--method",
        default="gptq",
        choices=("rtn", "gptq", "gptaq", "rescomp", "rsq", "awq"),
    )
    made.add_argument("--bits", type=int, default=4, help="2, 3, 4 or 8")
    made.add_argument(
        "--group", type=int, default=128, help="inputs of a range; -1: all of them"
    )
    made.add_argument(
        "--calibration",
        required=True,
        type=pathlib.Path,
        metavar="FILE",
        help="a text, or .npy of tokens; its last tenth is held out",
    )
    made.add_argument(
        "--out", required=True, type=pathlib.Path, metavar="DIR", help="a new folder"
    )
    made.add_argument("--sequences", type=int, default=128, help="that methods see")
    made.add_argument("--length", type=int, help="tokens of a sequence")
    made.add_argument("--batch", type=int, default=8, help="sequences at a time")
    made.add_argument("--symmetric", action="store_true", help="no zero points")
    made.add_argument("--clip", action="store_true", help="search shorter ranges")
    made.add_argument(
        "--act-order", action="store_true", help="the most active channels first"
    )
    made.add_argument("--resume", action="store_true", help="go on with a stopped run")
    made.add_argument("--no-progress", action="store_true", help="show no progress bar")
    made.add_argument("--json", action="store_true", help="print the report as JSON")


def _list(family: str | None, *, ready: bool, as_json: bool) -> int:
    """Prints the table of methods."""
    chosen = [
        method
        for method in methods.METHODS
        if family in (None, method.family) and (method.ready or not ready)
    ]
    if as_json:
        print(json.dumps([method._asdict() for method in chosen], indent=2))
        return 0
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    there = sum(method.ready for method in chosen)
    total = len(methods.METHODS)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("method", "room", "kind", "state"):
        table.add_column(name, no_wrap=True)
    table.add_column("what it does")  # the one that a narrow terminal cuts
    for method in chosen:
        state = Text("ready", "bold green") if method.ready else Text("to come", "dim")
        table.add_row(
            Text(method.slug, "bold" if method.ready else ""),
            method.family,
            method.kind,
            state,
            Text(method.summary, no_wrap=True, overflow="ellipsis"),
        )
    # To a file or a pipe go whole lines, whatever their length.
    console = Console() if sys.stdout.isatty() else Console(width=260)
    console.print(table)
    console.print(
        f"{len(chosen)} of {total} methods: {there} ready, "
        f"{len(chosen) - there} to come. More of one: wlab show NAME",
        highlight=False,
    )
    return 0


def _show(name: str, *, as_json: bool) -> int:
    """Prints all that the table says of one method."""
    owners = [method for method in methods.METHODS if name in method.recipes]
    try:
        method = owners[0] if owners else methods.find(name)
    except ValueError as error:
        from wlab.models import sizes

        if name in sizes.SIZES:
            return _show_size(name, as_json=as_json)
        raise UsageError(str(error)) from error
    if as_json:
        print(json.dumps(method._asdict(), indent=2))
        return 0
    runs = [f"wlab run {recipe}" for recipe in method.recipes]
    venue = f", {method.venue}" if method.venue else ""
    rows = {
        "method": f"{method.slug} ({'ready' if method.ready else 'to come'})",
        "paper": f"{method.year}{venue}, https://arxiv.org/abs/{method.arxiv}",
        "what": method.summary,
        "kind": f"{method.kind} ({methods.KINDS[method.kind]})",
        "room": method.family,
        "module": method.module or "to come",
        "recipes": ", ".join(runs) or "to come",
        "state": method.state,
    }
    print(textwrap.fill(method.title, 88))
    for key, value in rows.items():
        head = f"  {key:<9}"
        print(textwrap.fill(value, 88, initial_indent=head, subsequent_indent=" " * 11))
    return 0


def _show_size(name: str, *, as_json: bool) -> int:
    """Prints the shape of a size of the decoder, and its parameters."""
    from wlab.models import sizes

    config = sizes.get_size(name)
    counts = sizes.parameter_counts(config)
    shape = ("vocab", "width", "depth", "heads", "kv_heads", "head_dim", "hidden")
    known = {field: getattr(config, field) for field in shape}
    if config.experts:
        known |= {"experts": config.experts, "per_token": config.experts_per_token}
    if as_json:
        print(json.dumps({"size": name, **known, **counts._asdict()}, indent=2))
        return 0
    print(f"{name}, a size of the decoder (wlab.models.sizes)")
    print("  shape     " + ", ".join(f"{key} {value}" for key, value in known.items()))
    print(f"  total     {counts.total:,} parameters")
    print(f"  active    {counts.active:,} for a token")
    for kind, count in counts.by_kind.items():
        print(f"  {kind:<9} {count:,}")
    return 0


def _plan(options: argparse.Namespace) -> int:
    """Compiles a step for each model and optimiser, and prints what it needs."""
    sizes: dict[str, int] = {}
    for part in filter(None, (options.mesh or "").split(",")):
        name, _, size = part.partition("=")
        if not re.fullmatch(r"-?\d+", size) or not name.isidentifier():
            raise UsageError(f"--mesh {options.mesh}: write it as data=2,fsdp=-1")
        sizes[name.strip()] = int(size)
    # Before jax starts: the compiler needs no TPU, and a cpu as many devices as asked.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    kind, _, count = options.topology.partition(":")
    if kind == "cpu" and count.isdigit():
        os.environ.setdefault("JAX_NUM_CPU_DEVICES", count)
    from wlab import plan

    arguments = {
        "length": options.seq,
        "mesh": sizes or None,
        "remat": None if options.remat is None else options.remat == "full",
        "population": options.population,
        "chunk": options.chunk,
    }
    plans = []
    for model in options.model or ["2b"]:
        for optimizer in options.optimizer or ["adamw", "eco"]:
            if options.largest_batch:
                found = plan.largest_batch(
                    model, optimizer, options.topology, **arguments
                )
                if found is None:
                    print(f"{model} with {optimizer}: no batch fits", file=sys.stderr)
                    continue
            else:
                found = plan.plan(
                    model,
                    optimizer,
                    options.topology,
                    batch=options.batch,
                    **arguments,
                )
            plans.append(found)
            seconds = f"{found.compile_seconds:.0f} s to compile"
            print(f"{model} with {optimizer}: {seconds}", file=sys.stderr)
    if options.json is not None:
        plan.save(plans, options.json)
    print(plan.table(plans))
    if plans:
        last = plans[-1]
        mesh = ", ".join(f"{n}={size}" for n, size in last.mesh.items()) or "one device"
        where = f"each of {last.devices} devices on {last.chips} chips"
        print(f"bytes of {where}, mesh {mesh}")
    return 0


def _quantize(options: argparse.Namespace) -> int:
    """Quantises a checkpoint, and prints what it lost."""
    from wlab.quantize import quantize

    try:
        report = quantize(
            options.model,
            options.out,
            calibration=options.calibration,
            method=options.method,
            bits=options.bits,
            group=None if options.group == -1 else options.group,
            sequences=options.sequences,
            length=options.length,
            batch=options.batch,
            symmetric=options.symmetric,
            clip=options.clip,
            act_order=options.act_order,
            resume=options.resume,
            progress=not options.no_progress,
        )
    except KeyboardInterrupt as stop:
        if not options.out.with_name(options.out.name + ".partial").exists():
            raise
        raise KeyboardInterrupt("go on with the same command and --resume") from stop
    if options.json:
        print(report.to_json(), end="")
    else:
        report.print()
    return 0


def _run(args: list[str]) -> int:
    """Runs a recipe, which saves its report, and prints it."""
    if args[:1] in (["--help"], ["-h"]):
        print(_run_help())
        return 0
    if not args or args[0].startswith("-"):
        names = ", ".join(methods.RECIPES)
        raise UsageError(f"name a recipe first: wlab run NAME [options]; {names}")
    name, *rest = args
    if name not in methods.RECIPES:
        raise UsageError(_no_recipe(name))
    recipe = importlib.import_module(methods.RECIPES[name])
    options = _parse(name, recipe, rest)
    if options.resume is not None:
        options = _resumed(name, recipe, rest, options)
    _check_writable(options.out)
    report = _kept(name, recipe, options)
    report.print()
    print(f"written to {options.out}")
    return 0


def _kept(name: str, recipe: ModuleType, options: Any) -> Any:
    """Runs a recipe so that it can be resumed; says how if the user stops it."""
    from wlab.recipes import _run as runs

    resume = options.resume is not None
    keywords: dict[str, Any] = {"out": options.out, "progress": not options.no_progress}
    if "resume" not in inspect.signature(recipe.run).parameters:
        if resume:
            print(f"{name} is short and keeps no steps: it runs anew", file=sys.stderr)
        with runs.Run(name, options.config, options.out, resume=resume):
            return recipe.run(options.config, **keywords)
    try:
        return recipe.run(options.config, **keywords, resume=resume)
    except KeyboardInterrupt as stop:
        if not runs.stopped_run(options.out):
            raise
        folder = shlex.quote(str(options.out))
        raise KeyboardInterrupt(f"go on with: wlab run {name} --resume {folder}") from (
            stop
        )


def _resumed(name: str, recipe: ModuleType, args: list[str], options: Any) -> Any:
    """Returns the options of the run that is to be resumed.

    Raises:
      UsageError: If there is no such run, or an option contradicts it.
    """
    from wlab.recipes import _run as runs

    folder = options.resume
    try:
        config = runs.stored_config(folder, name, recipe.Config)
    except ValueError as error:
        raise UsageError(str(error)) from error
    given = _parse(name, recipe, args, None if options.quick else config, folder)
    differs = runs.different(
        dataclasses.asdict(config), dataclasses.asdict(given.config)
    )
    if differs:
        raise UsageError(
            f"the run in {folder} has another setting: {differs}; leave the options "
            "out to go on with it, or start another run in another folder"
        )
    if given.out != folder:
        raise UsageError(
            f"--out {given.out} beside --resume {folder}: a run goes on in its own "
            "folder; leave --out out"
        )
    return given


def _run_help() -> str:
    """Returns the help of ``wlab run``."""
    lines = [
        "usage: wlab run NAME [--quick] [--out DIR] [--no-progress] [options]",
        "       wlab run NAME --resume DIR",
        "",
        "recipes:",
    ]
    titles = {
        recipe: method.title for method in methods.METHODS for recipe in method.recipes
    }
    for name in methods.RECIPES:
        title = textwrap.shorten(titles.get(name, ""), 66, placeholder="...")
        lines.append(f"  {name:<16}{title}".rstrip())
    return "\n".join([*lines, "", "options of a recipe: wlab run NAME --help"])


def _no_recipe(name: str) -> str:
    """Says what to do about a recipe that does not exist."""
    recipes = ", ".join(methods.RECIPES)
    for method in methods.METHODS:
        if method.slug == name:
            if method.recipes:
                return f"{name} runs as: wlab run {method.recipes[0]}"
            return f"{name} is to come (see: wlab show {name}); there are: {recipes}"
    near = methods.near(name, methods.RECIPES)
    return f"there is no recipe {name!r}{near or f'; there are: {recipes}'}"


def _parse(
    name: str,
    recipe: ModuleType,
    args: list[str],
    config: Any = None,
    out: pathlib.Path | None = None,
) -> Any:
    """Returns a recipe's configuration and the options all recipes have.

    Args:
      name: Name of the recipe.
      recipe: Its module, with ``Config`` and ``QUICK``.
      args: The arguments after the name.
      config: What holds where they say nothing; by default the recipe's own.
      out: The folder where they name none.

    Returns:
      An object with ``config``, ``out``, ``resume``, ``quick`` and ``no_progress``.

    Raises:
      UsageError: If an argument is not known or its value is not valid.
    """
    import tyro

    # These options stand beside the fields of Config in one help text.
    arg, unpaired = tyro.conf.arg, tyro.conf.FlagCreatePairsOff
    if config is None:
        config = recipe.QUICK if "--quick" in args else recipe.Config()
    fields: dict[str, tuple[Any, Any]] = {
        "config": (Annotated[recipe.Config, arg(name="")], config),
        "out": (
            Annotated[pathlib.Path, arg(help="Folder of report.json and report.png.")],
            out or pathlib.Path("runs") / name,
        ),
        "resume": (
            Annotated[
                pathlib.Path | None,
                arg(help="Go on with the run in this folder.", metavar="DIR"),
            ],
            None,
        ),
        "quick": (
            Annotated[bool, arg(help="Start from the tiny setting."), unpaired],
            False,
        ),
        "no_progress": (
            Annotated[bool, arg(help="Show no progress bar."), unpaired],
            False,
        ),
    }
    options = dataclasses.make_dataclass(
        "Options", [(key, kind, default) for key, (kind, default) in fields.items()]
    )
    prog = f"wlab run {name}"
    args = _split_lists(recipe.Config, args, prog)
    description = (recipe.__doc__ or "").strip()
    if {"-h", "--help"} & set(args):
        return tyro.cli(options, prog=prog, description=description, args=args)
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors), _columns(100_000):
            return tyro.cli(options, prog=prog, description=description, args=args)
    except SystemExit:
        raise UsageError(f"{prog}: {_unboxed(errors.getvalue())}") from None


@contextlib.contextmanager
def _columns(count: int) -> Generator[None]:
    """Sets the width of the terminal, as the environment tells it."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(count)
    try:
        yield
    finally:
        del os.environ["COLUMNS"]
        if before is not None:
            os.environ["COLUMNS"] = before


def _split_lists(config: type, args: list[str], prog: str) -> list[str]:
    """Returns the arguments with ``--grids a,b`` written as ``--grids a b``.

    Args:
      config: A dataclass; its fields of type ``tuple[T, ...]`` take lists.
      args: The arguments.
      prog: The command, for errors.

    Raises:
      UsageError: If a list has no item.
    """
    hints = typing.get_type_hints(config)
    lists = {
        f"--{field.name.replace('_', '-')}"
        for field in dataclasses.fields(config)
        if get_args(hints[field.name])[1:] == (...,)
    }
    out: list[str] = []
    rest = list(args)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag.replace("_", "-") not in lists:
            out.append(flag + equals + value)
            continue
        given = [value] if equals else []
        while not equals and rest and not re.match(r"-(?![\d.])", rest[0]):
            given.append(rest.pop(0))
        items = [item.strip() for items in given for item in items.split(",")]
        items = [item for item in items if item]
        if not items:
            raise UsageError(f"{prog}: {flag} needs a value, as in {flag} A,B")
        out += [flag, *items]
    return out


def _unboxed(text: str) -> str:
    """Returns the message in the box that tyro draws around an error.

    Args:
      text: The box, in box-drawing characters or in ASCII: a title, then the
        message, then advice, with rules between.
    """
    text = re.sub(r"\x1b\[[\d;]*m", "", text)
    lines = [line.strip(" │") for line in text.splitlines()]
    rules = [i for i, line in enumerate(lines) if re.match("[╭─╰]|-+$", line)]
    message, advice = lines, []
    if len(rules) > 1:
        message, advice = lines[rules[0] + 1 : rules[1]], lines[rules[1] :]
    message = " ".join(" ".join(message).split())
    unknown = re.match(r"Unrecognized options?: ([^,]*)", message)
    if unknown:
        flags = re.findall(r"--[\w-]+", " ".join(advice))
        flags = [flag for flag in flags if flag != "--help"]
        close = difflib.get_close_matches(unknown[1], flags, n=1, cutoff=0.0)
        message = f"there is no option {unknown[1]}"
        if close:
            message += f"; did you mean {close[0]}?"
    return f"{message} (--help lists the options)"


def _check_writable(out: pathlib.Path) -> None:
    """Makes the folder of the report, before the work and not after it.

    Raises:
      UsageError: If it cannot be made or written to.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(
            f"cannot write to {out}: {error.strerror}; choose another folder: --out DIR"
        ) from error
