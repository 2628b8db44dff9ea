# Copyright 2026 The wlab Authors.
# SPDX-License-Identifier: Apache-2.0
"""What a compiled program moves between devices, read from its text.

Loops count as often as they run. A device that takes part in a collective over `n`
devices sends, with rings, `(n - 1) / n` of the gathered or scattered array, and twice
that of an array that is summed on all.
"""

import math
import re
from collections import defaultdict
from typing import Any, NamedTuple

_BITS = {"pred": 8, "token": 0}
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_CALLED_LISTS = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_TRIPS = re.compile(r'"?known_trip_count"?:\s*\{\s*"?n"?:\s*"?(\d+)"?')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_METADATA = re.compile(r"metadata=(\{[^}]*\})")
_KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("ragged-all-to-all", "collective-permute", "collective-broadcast"),
)


class Collective(NamedTuple):
    """One collective of a program."""

    kind: str  # all-gather, all-reduce, ...
    size: int  # bytes of its result on one device (reduce-scatter: of its operand)
    group: int  # devices that take part together
    times: int  # how often it runs

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all its runs."""
        share = (self.group - 1) / max(self.group, 1)
        factor = {"all-reduce": 2.0, "collective-permute": 1 / max(share, 1e-9)}
        return factor.get(self.kind, 1.0) * share * self.size * self.times


def collectives(
    text: str, devices: int, *, loops: int | None = None
) -> list[Collective]:
    """The collectives of a program.

    Args:
        text: `compiled.as_text()`.
        devices: how many devices it runs on: the size of a group that is not named.
        loops: how often a loop runs whose bound is known at run time only, at most;
            None: such a loop is an error.

    Returns:
        One entry for each collective instruction that is reached from the entry.

    Raises:
        ValueError: for a loop that does not say how often it runs.
    """
    bodies = _computations(text)
    times = _times(bodies, loops)
    shared = _shared_channels(text)
    out: dict[Any, Collective] = {}
    for name, lines in bodies.items():
        fused = _is_fused_scatter(lines)
        for line in lines:
            found = _INSTRUCTION.match(line)
            if not found or not times[name]:
                continue
            shapes, op = found.groups()
            kind = op.removesuffix("-start")
            if op.endswith("-done") or kind not in _KINDS:
                continue
            sizes = [_size(*array) for array in _ARRAY.findall(shapes)]
            if op.endswith("-start") and shapes.startswith("(") and len(sizes) > 1:
                # (operands, results, ...): the results are as many as the operands.
                half = len([s for s in sizes if s > 8]) // 2 or 1
                sizes = sizes[half : 2 * half]
            group = _group(line, devices)
            size = sum(sizes)
            if kind == "reduce-scatter":
                size *= group
            if kind == "all-reduce" and fused:
                kind = "reduce-scatter"
            if group == 1 and kind != "collective-permute":
                continue
            # One that runs beside other work stands in several fusions, some of them in
            # loops, which start it, go on with it and end it; it has one channel.
            channel = _CHANNEL.search(line)
            one: Any = (name, line)
            if channel and channel[1] not in shared:
                one = (kind, channel[1])
            new = Collective(kind, size, group, times[name])
            out[one] = min(out.get(one, new), new, key=lambda c: c.times)
    return list(out.values())


def _shared_channels(text: str) -> set[str]:
    """The channels of more than one collective, as all those of a shard_map are."""
    uses: dict[str, set[Any]] = defaultdict(set)
    for line in text.splitlines():
        channel = _CHANNEL.search(line)
        found = channel and _INSTRUCTION.match(line)
        if not channel or not found:
            continue
        shapes, op = found.groups()
        kind = op.removesuffix("-start")
        if kind in _KINDS:
            place = _METADATA.search(line)
            arrays = tuple(_ARRAY.findall(shapes)) if kind == op else ()
            uses[channel[1]].add((kind, arrays, place and place[1]))
    return {channel for channel, kinds in uses.items() if len(kinds) > 1}


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation; the entry is called "ENTRY"."""
    bodies: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if name is None:
            start = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$", line)
            if start:
                name = "ENTRY" if start[1] else start[2]
                bodies[name] = []
        elif line.startswith("}"):
            name = None
        else:
            bodies[name].append(line)
    return bodies


def _times(bodies: dict[str, list[str]], loops: int | None) -> dict[str, int]:
    """How often each computation runs."""
    calls: dict[str, dict[str, int]] = {}
    for name, lines in bodies.items():
        calls[name] = defaultdict(int)
        for line in lines:
            n = _trips(line, bodies, loops) if " while(" in line else 1
            called = _CALLED.findall(line)
            for names in _CALLED_LISTS.findall(line):
                called += [part.strip().lstrip("%") for part in names.split(",")]
            for other in called:
                if other in bodies:
                    calls[name][other] += n
    times: dict[str, int] = defaultdict(int)

    def visit(name: str, n: int) -> None:
        times[name] += n
        for other, m in calls.get(name, {}).items():
            visit(other, n * m)

    visit("ENTRY", 1)
    return times


def _trips(line: str, bodies: dict[str, list[str]], loops: int | None) -> int:
    """How often a loop runs: as the compiler says, or as its condition counts."""
    if known := _TRIPS.search(line):
        return int(known[1])
    condition, body = (
        re.search(rf"{name}=%?([\w.\-]+)", line) for name in ("condition", "body")
    )
    text = "\n".join(bodies.get(condition[1], ())) if condition else ""
    bounds = re.findall(r" constant\((\d+)\)", text)
    counters = re.findall(r"get-tuple-element\([^)]*\), index=(\d+)", text)
    if len(bounds) == 1 and "direction=LT" in text:
        step = 1
        if body and len(counters) == 1:
            step = _step("\n".join(bodies.get(body[1], ())), int(counters[0]))
        return -(-int(bounds[0]) // step)
    if loops is not None:
        return loops
    raise ValueError(f"the loop {line.split('=')[0].strip()} does not say how often")


def _step(body: str, index: int) -> int:
    """What a loop's body adds to an element of its tuple; 1 where it does not say."""
    root = re.search(r"ROOT .* tuple\((.*?)\)", body)
    operands = re.findall(r"%([\w.\-]+)", root[1]) if root else []
    if index >= len(operands):
        return 1
    made = re.search(rf"%{re.escape(operands[index])} = .* add\(([^)]*)\)", body)
    for name in re.findall(r"%([\w.\-]+)", made[1]) if made else ():
        constant = re.search(rf"%{re.escape(name)} = .* constant\((\d+)\)", body)
        if constant:
            return int(constant[1])
    return 1


def _is_fused_scatter(lines: list[str]) -> bool:
    """Whether a fusion sums on all devices and keeps a part: a reduce-scatter."""
    text = "\n".join(lines)
    return len(lines) < 40 and " all-reduce(" in text and " dynamic-slice(" in text


def _size(dtype: str, dims: str) -> int:
    if dtype in _BITS:
        bits = _BITS[dtype]
    else:
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 0
    return math.prod(int(d) for d in dims.split(",") if d) * bits // 8


def _group(line: str, devices: int) -> int:
    """How many devices take part together."""
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if named:
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(
            int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2])
        )
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=", line)
    if iota:
        return int(iota[1].split(",")[-1])
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if listed:
        return len(listed[1].split(","))
    return devices
