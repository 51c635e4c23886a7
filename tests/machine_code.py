"""Counts in the machine code of GPU kernels: what a warp executes for the bytes that it moves.

A kernel is issue-bound, whatever its traffic, if a warp executes more instructions than the time of its bytes allows.
Both are counted along the *main path* of the kernel's main loop: among the ways through the loop with the most of its
widest accesses to global memory, the one with the fewest instructions (other paths: tails, rare cases). The main loop
is the one with the most instructions outside inner loops, if a loop runs four times for one run of what is around it,
or with most of those of tensor cores (STREAMING: see there). Where that is all of the kernel, it counts from its entry
to its exit. Inner loops on the way count one iteration. Bytes are those that lanes access: gathered ones cost a sector
of 32 each, and what the cache holds costs nothing, so that the share of the bandwidth is one of streaming kernels.
"""

import re
import subprocess
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

# An H200: bytes copied a second; warp instructions issued a second by 132 multiprocessors with 4 schedulers.
BANDWIDTH = 4.3e12
ISSUE = 132 * 4 * 1.755e9
# By architecture: registers, shared memory (bytes), warps and blocks of a multiprocessor.
MULTIPROCESSOR = {80: (65536, 164 << 10, 64, 32), 90: (65536, 228 << 10, 64, 32), 100: (65536, 228 << 10, 64, 32)}
# Kernels that stream through memory: their main loop is the one with the most bytes of its widest accesses, outside
# inner loops, which take rare cases.
STREAMING = ("stream_kernel", "threshold_kernel", "count_all_kernel", "trim_kernel", "histogram_kernel")
RESERVED_SHARED = 1024  # bytes of each block that the driver takes


class Instruction(NamedTuple):
    address: int
    conditional: bool  # has a predicate
    opcode: str  # with its modifiers: "LDG.E.128"
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def target(self) -> int | None:
        """Of a branch that warps take. BRA.DIV leads to the slow copy of an instruction for diverged lanes."""
        if self.name not in ("BRA", "JMP") or ".DIV" in self.opcode:
            return None
        found = re.search(r"\b0x([0-9a-f]+)", self.operands)
        return int(found[1], 16) if found else None

    @property
    def ends(self) -> bool:
        """Whether nothing after it runs."""
        ending = self.name in ("EXIT", "RET") or (
            self.target is not None and not self.operands.startswith(("P", "!P", "UP"))
        )
        return ending and not self.conditional

    @property
    def bytes(self) -> int:
        """Of global memory, by one lane."""
        if self.name not in ("LDG", "STG", "LD", "ST", "LDGSTS", "ATOMG", "ATOM", "RED", "REDG"):
            return 0
        width = re.search(r"\.(128|64|[US]?16|[US]8)\b", self.opcode)
        return {"128": 16, "64": 8, "16": 2, "8": 1}[width[1].lstrip("US")] if width else 4

    @property
    def tensor_core(self) -> bool:
        return self.name in ("HMMA", "HGMMA", "DMMA", "IMMA", "UTCHMMA", "UTCQMMA")

    @property
    def shared(self) -> bool:
        return self.name in ("LDS", "STS", "LDSM", "STSM", "ATOMS")


class Count(NamedTuple):
    """Along one path, by a warp; bytes by a lane."""

    wide: int = 0  # of the bytes, those by the widest accesses of the loop
    bytes: int = 0
    instructions: int = 0
    shared: int = 0
    barriers: int = 0

    def __add__(self, other: "Count") -> "Count":  # type: ignore[override]
        return Count(*map(sum, zip(self, other)))

    @property
    def rank(self) -> tuple[int, int]:
        return self.wide, -self.instructions


class MachineCode(NamedTuple):
    """One kernel's counts."""

    threads: int  # of a block, at most
    instructions: int  # in the whole kernel
    loop: bool  # whether the main path is a loop's
    main: Count
    longest: int  # instructions of the main loop's longest path

    @property
    def bandwidth_share(self) -> float:
        """The share of the bandwidth that the instructions of the main path allow, for its widest accesses."""
        return min(1.0, 32 * self.main.wide / BANDWIDTH / (self.main.instructions / ISSUE))


def occupancy(arch: int, threads: int, registers: int, shared: int) -> int:
    """Warps of a multiprocessor at the same time."""
    all_registers, all_shared, most_warps, most_blocks = MULTIPROCESSOR[arch]
    warps = -(-threads // 32)
    by_registers = all_registers // (-(-registers * 32 // 256) * 256) // warps
    return warps * min(by_registers, all_shared // (shared + RESERVED_SHARED), most_warps // warps, most_blocks)


# ---- control flow ----
class Loop(NamedTuple):
    header: int
    blocks: frozenset[int]


class ControlFlow:
    """The basic blocks of one kernel, by their first address, and its loops."""

    def __init__(self, code: list[Instruction]) -> None:
        starts = {code[0].address} | {i.target for i in code if i.target is not None}
        starts |= {after.address for before, after in zip(code, code[1:]) if before.target is not None or before.ends}
        self.entry = code[0].address
        self.blocks: dict[int, list[Instruction]] = {}
        for instruction in code:
            if instruction.address in starts:
                block = self.blocks.setdefault(instruction.address, [])
            block.append(instruction)
        self.next: dict[int, list[int]] = {}
        order = list(self.blocks)
        for at, following in zip(order, [*order[1:], None]):
            last = self.blocks[at][-1]
            after = [] if last.ends or following is None else [following]
            self.next[at] = [x for x in dict.fromkeys((*after, last.target)) if x in self.blocks]

    @cached_property
    def back_edges(self) -> set[tuple[int, int]]:
        """The edges that close loops, by a depth-first search."""
        found, state, stack = set(), {self.entry: 1}, [(self.entry, iter(self.next[self.entry]))]
        while stack:
            at, rest = stack[-1]
            for to in rest:
                if state.get(to) == 1:
                    found.add((at, to))
                elif to not in state:
                    state[to] = 1
                    stack.append((to, iter(self.next[to])))
                    break
            else:
                state[at] = 2
                stack.pop()
        return found

    @cached_property
    def loops(self) -> list[Loop]:
        before: dict[int, list[int]] = {at: [] for at in self.blocks}
        for at, after in self.next.items():
            for to in after:
                before[to].append(at)
        bodies: dict[int, set[int]] = {}
        for latch, header in self.back_edges:
            body, rest = bodies.setdefault(header, {header}), [latch]
            while rest:
                at = rest.pop()
                if at not in body:
                    body.add(at)
                    rest += before[at]
        return [Loop(header, frozenset(body)) for header, body in bodies.items()]

    def paths(self, start: int, inside: frozenset[int], ends: set[int], widest: int) -> Iterator[tuple[Count, Count]]:
        """The best and the longest path from the start to each of the ends that it reaches."""
        best: dict[int, Count] = {}
        longest: dict[int, Count] = {}
        for at in self._ordered(start, inside):
            own = count(self.blocks[at], widest)
            came = [b for b in best if at in self.next[b] and (b, at) not in self.back_edges]
            best[at] = own + max((best[b] for b in came), key=lambda c: c.rank, default=Count())
            longest[at] = own + max((longest[b] for b in came), key=lambda c: c.instructions, default=Count())
            if at in ends:
                yield best[at], longest[at]

    def _ordered(self, start: int, inside: frozenset[int]) -> list[int]:
        """The blocks that are reached from the start, in topological order without back edges."""
        done, order, stack = {start}, [], [(start, iter(self.next[start]))]
        while stack:
            at, rest = stack[-1]
            for to in rest:
                if to in inside and to not in done and (at, to) not in self.back_edges:
                    done.add(to)
                    stack.append((to, iter(self.next[to])))
                    break
            else:
                order.append(at)
                stack.pop()
        return order[::-1]


def count(block: list[Instruction], widest: int) -> Count:
    return Count(
        sum(i.bytes for i in block if i.bytes == widest),
        sum(i.bytes for i in block),
        len(block),
        sum(i.shared for i in block),
        sum(i.name == "BAR" for i in block),
    )


def analyse(code: list[Instruction], threads: int, streaming: bool = False) -> MachineCode:
    flow = ControlFlow(code)
    whole = frozenset(flow.blocks)
    regions = [(flow.entry, whole, {at for at, block in flow.blocks.items() if block[-1].name in ("EXIT", "BRA")})]
    regions += [
        (loop.header, loop.blocks, {at for at, to in flow.back_edges if to == loop.header}) for loop in flow.loops
    ]
    found = []
    for start, blocks, ends in regions:
        inner = frozenset().union(*(loop.blocks for loop in flow.loops if loop.blocks < blocks))
        own = [i for at in blocks - inner for i in flow.blocks[at]]
        paths = list(flow.paths(start, blocks, ends, max(i.bytes for i in own)))
        if not paths:
            continue
        main = max((best for best, _ in paths), key=lambda c: c.rank)
        runs = 4 ** sum(blocks <= loop.blocks for loop in flow.loops)
        weight = runs * sum(i.tensor_core for i in own), runs * len(own)
        if streaming:
            widest = max(i.bytes for i in own)
            weight = (len(blocks) < len(whole)) * sum(i.bytes for i in own if i.bytes == widest), len(own)
        longest = max(longest.instructions for _, longest in paths)
        found.append((weight, len(blocks) < len(whole), main, longest))
    _, loop, main, longest = max(found, key=lambda f: f[0])
    return MachineCode(threads, len(code), loop, main, longest)


# ---- reading a cubin ----
_FUNCTION = re.compile(r"^\s*Function : (\S+)$", re.M)
_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*);", re.M)
_THREADS = re.compile(
    r"^\.nv\.info\.(\S+)\n(?:(?!^\.nv\.)[^\n]*\n)*?\s*Attribute:\s*EIATTR_(?:MAX_THREADS|REQNTID)\n[^\n]*\n\s*Value:\s*"
    r"0x([0-9a-f]+) 0x([0-9a-f]+) 0x([0-9a-f]+)",
    re.M,
)


def cuobjdump() -> str:
    """Triton's copy: its version is pinned, and it is there without a CUDA toolkit."""
    import triton

    return str(Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump"))


def read(cubin: Path) -> dict[str, MachineCode]:
    """The counts of each kernel, by its mangled name."""
    shown = subprocess.run([cuobjdump(), "-sass", "-elf", cubin], capture_output=True, text=True, check=True).stdout
    threads = {name: int(x, 16) * int(y, 16) * int(z, 16) for name, x, y, z in _THREADS.findall(shown)}
    parts = _FUNCTION.split(shown)[1:]
    kernels = {}
    for name, body in zip(parts[::2], parts[1::2]):
        code = [Instruction(int(a, 16), bool(p), o, x.strip()) for a, p, o, x in _LINE.findall(body)]
        code = [i for i in code if i.name != "NOP"]
        streaming = any(f"{len(kernel)}{kernel}" in name for kernel in STREAMING)
        kernels[name] = analyse(code, threads.get(name, 1024), streaming)
    return kernels
