"""Machine code of CUDA kernels, as nvdisasm prints it: blocks, loops, and the way through a loop as a rule."""

from __future__ import annotations

import functools
import re
from functools import cached_property
from typing import NamedTuple

LINE = re.compile(r"^(?:(\.L_\w+):|\s+/\*[0-9a-f]+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;)", re.MULTILINE)
REGISTER = re.compile(r"\bR(\d+)\b")
COMPARES = ("FSETP", "ISETP", "DSETP", "HSETP2", "FSET", "FCHK")


@functools.cache
def _matches(name: str, wanted: str) -> bool:
    own, *modifiers = name.split(".")
    first, *rest = wanted.split(".")
    return first == own and set(rest) <= set(modifiers)


class Instruction(NamedTuple):
    """One instruction."""

    guard: str  # the predicate that it is under, like P0 or !P0; empty without one
    name: str  # with its modifiers, like LDG.E.128
    operands: str

    def does(self, *names: str) -> bool:
        """Whether it is one of these, whatever other modifiers it has."""
        return any(_matches(self.name, name) for name in names)

    @property
    def loaded(self) -> set[int]:
        """Registers that a load writes."""
        first = REGISTER.match(self.operands)
        count = 4 if self.does("LDG.128") else 2 if self.does("LDG.64") else 1
        return set(range(int(first.group(1)), int(first.group(1)) + count)) if first else set()

    @property
    def registers(self) -> set[int]:
        """Registers that it reads or writes; of neighbours that are read together, the first."""
        named = {int(number) for number in REGISTER.findall(self.operands)}
        return named | self.loaded if self.does("LDG") else named


class Path(list[Instruction]):
    """Instructions in the order of their execution."""

    def __repr__(self) -> str:
        return f"<{len(self)} instructions>"

    def number(self, *names: str) -> int:
        """Count the instructions of these names."""
        return sum(instruction.does(*names) for instruction in self)

    def between(self, *names: str) -> Path:
        """Return the part from the first to the last instruction of these names."""
        places = [i for i, instruction in enumerate(self) if instruction.does(*names)]
        return Path(self[places[0] : places[-1] + 1]) if places else Path()

    @property
    def branches(self) -> int:
        """Count the branches that depend on data."""
        return sum(one.does("BRX") or (one.does("BRA") and bool(one.guard)) for one in self)

    @property
    def guarded_products(self) -> int:
        """Count the products under a predicate, like those by which exp2f() avoids subnormal numbers."""
        return sum(one.does("FMUL") and bool(one.guard) for one in self)

    def batch(self, name: str) -> int:
        """Return the most loads of this name that are under way before the first one's result is used."""
        largest = 0
        waiting: dict[int, int] = {}  # from a register to the place of its load
        for place, instruction in enumerate(self):
            used = {waiting[register] for register in instruction.registers if register in waiting}
            if used:
                # Who waits for a load has waited for those before it.
                waiting = {register: load for register, load in waiting.items() if load > max(used)}
            if instruction.does(name):
                waiting |= dict.fromkeys(instruction.loaded, place)
                largest = max(largest, len(set(waiting.values())))
        return largest


class Block:
    """Instructions that are executed one after another, and the blocks that may follow."""

    def __init__(self) -> None:
        self.instructions = Path()
        self.following: list[int] = []


class Loop(NamedTuple):
    """A loop: its first block, and all from which that is reached again without leaving."""

    kernel: Kernel
    header: int
    blocks: frozenset[int]

    @property
    def instructions(self) -> Path:
        """All of them."""
        return Path(one for block in sorted(self.blocks) for one in self.kernel.blocks[block].instructions)

    def path(self, *names: str) -> Path:
        """Return the way once round the loop with the most instructions of the first name, of the second, and so on.

        Of several it is the shortest. Loops inside this one are gone through once, or not at all.
        """
        best: dict[int, tuple[tuple[int, ...], int | None]] = {}
        for block in self.kernel.order:
            if block not in self.blocks:
                continue
            own = self.kernel.blocks[block].instructions
            weight = (*map(own.number, names), -len(own))
            if block == self.header:
                best[block] = (weight, None)
                continue
            source = max((i for i in self.kernel.preceding[block] if i in best), key=lambda i: best[i][0])
            best[block] = (tuple(a + b for a, b in zip(best[source][0], weight, strict=True)), source)
        ends = (block for block in best if self.header in self.kernel.blocks[block].following)
        block: int | None = max(ends, key=lambda end: best[end][0])
        way = []
        while block is not None:
            way.append(block)
            block = best[block][1]
        return Path(one for block in reversed(way) for one in self.kernel.blocks[block].instructions)


class Kernel:
    """The code of one kernel."""

    def __init__(self, text: str) -> None:
        self.blocks: list[Block] = []
        labels: dict[str, int] = {}
        ended = True
        for label, guard, name, operands in LINE.findall(text):
            if label or ended:
                self.blocks.append(Block())
            ended = False
            if label:
                labels[label] = len(self.blocks) - 1
                continue
            self.blocks[-1].instructions.append(Instruction(guard, name, operands))
            ended = name.split(".")[0] in ("BRA", "EXIT", "RET")
        for place, block in enumerate(self.blocks):
            last = block.instructions[-1] if block.instructions else Instruction("", "NOP", "")
            goes_on = bool(last.guard) or not last.does("BRA", "EXIT", "RET")
            if last.does("BRA"):
                before, _, label = last.operands.partition("`(")
                block.following.append(labels[label.rstrip(")")])
                goes_on = goes_on or bool(before)  # like BRA.DIV, which names a register
            if goes_on and place + 1 < len(self.blocks):
                block.following.append(place + 1)

    @property
    def instructions(self) -> Path:
        """All of them."""
        return Path(one for block in self.blocks for one in block.instructions)

    @cached_property
    def order(self) -> list[int]:
        """Blocks that are reached, each before those that follow it, but for ways back."""
        seen, finished = {0}, []
        stack = [(0, iter(self.blocks[0].following))]
        while stack:
            block, following = stack[-1]
            other = next((other for other in following if other not in seen), None)
            if other is None:
                finished.append(block)
                stack.pop()
            else:
                seen.add(other)
                stack.append((other, iter(self.blocks[other].following)))
        return finished[::-1]

    @cached_property
    def preceding(self) -> dict[int, list[int]]:
        """From each block to those that it may follow."""
        found: dict[int, list[int]] = {block: [] for block in self.order}
        for block in self.order:
            for other in self.blocks[block].following:
                found[other].append(block)
        return found

    @cached_property
    def dominators(self) -> dict[int, int]:
        """From each block to the last one before it that every way to it goes through."""
        place = {block: i for i, block in enumerate(self.order)}
        nearest = {0: 0}
        changed = True
        while changed:
            changed = False
            for block in self.order[1:]:
                common, *others = (other for other in self.preceding[block] if other in nearest)
                for other in others:
                    while common != other:
                        if place[common] > place[other]:
                            common = nearest[common]
                        else:
                            other = nearest[other]
                changed |= nearest.get(block) != common
                nearest[block] = common
        return nearest

    @cached_property
    def loops(self) -> list[Loop]:
        """All loops, each before those around it."""
        found: dict[int, set[int]] = {}
        for block in self.order:
            for header in self.blocks[block].following:
                above = block
                while above not in (0, header):
                    above = self.dominators[above]
                if above != header:
                    continue
                inside = found.setdefault(header, {header})
                waiting = [block]
                while waiting:
                    member = waiting.pop()
                    if member not in inside:
                        inside.add(member)
                        waiting += self.preceding[member]
        loops = [Loop(self, header, frozenset(inside)) for header, inside in found.items()]
        return sorted(loops, key=lambda loop: len(loop.blocks))

    @cached_property
    def innermost(self) -> list[Loop]:
        """Loops without another inside."""
        return [loop for loop in self.loops if not any(other.blocks < loop.blocks for other in self.loops)]


def texts(disassembly: str) -> dict[str, str]:
    """From the name of each kernel, as the linker has it, to its part of a disassembly."""
    parts = (part.partition(":\n") for part in re.split(r"^\.text\.", disassembly, flags=re.MULTILINE)[1:])
    return {name: body for name, _, body in parts}
