"""Functions, loops and tables of function pointers in an object file, as objdump shows them."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BRANCH = re.compile(r"(?:j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\s(?:.*[\s,])?([0-9a-f]+) <")
_LEAVES = re.compile(r"(?:jmp|ret|ud2|b|br)\b(?!\.)")  # nothing follows these


@dataclass(frozen=True)
class Function:
    """A function of an object file.

    ``name`` is demangled. ``code`` holds address and text of the instructions.
    """

    section: str
    address: int
    name: str
    code: tuple[tuple[int, str], ...]

    @property
    def texts(self) -> tuple[str, ...]:
        return tuple(text for _, text in self.code)


def functions(file: Path, objdump: str) -> list[Function]:
    """Return every function of an object file, in the order of the file."""
    found, section, head, code = [], "", ("", ""), []

    def close() -> None:
        if head[1]:
            found.append(Function(section, int(head[0], 16), head[1], tuple(code)))

    for line in _run(objdump, "-d", "-C", "-w", "--no-show-raw-insn", file).splitlines():
        if match := re.match(r"Disassembly of section (\S+):", line):
            close()
            section, head = match[1], ("", "")
        elif match := re.match(r"([0-9a-f]+) <(.+)>:$", line):
            close()
            head, code = (match[1], match[2]), []
        elif match := re.match(r"\s+([0-9a-f]+):\t(.+)", line):
            code.append((int(match[1], 16), re.split(r"\s+(?:# |//)", match[2])[0].strip()))
    close()
    return found


def pointers(file: Path, objdump: str, table: str) -> tuple[int, dict[int, Function]]:
    """Return the size of a variable in bytes, and the functions that it points to by offset.

    KeyError if the object has no such variable.
    """
    symbols = {}
    for line in _run(objdump, "-t", file).splitlines():
        if match := re.match(r"([0-9a-f]+) .{7} (\S+)\t([0-9a-f]+) (?:\.hidden )?(\S+)$", line):
            symbols[match[4]] = (match[2], int(match[1], 16), int(match[3], 16))
    (mangled,) = [name for name in symbols if name == table or re.fullmatch(rf"_ZN\w*\d{table}E", name)] or [table]
    section, start, size = symbols[mangled]
    at = {(function.section, function.address): function for function in functions(file, objdump)}
    found = {}
    for line in _run(objdump, "-r", "-j", section, file).splitlines():
        if match := re.match(r"([0-9a-f]+) R_\w+64\s+(\S+?)(?:\+0x([0-9a-f]+))?$", line):
            offset, base, added = int(match[1], 16), match[2], int(match[3] or "0", 16)
            home, address, _ = symbols.get(base, (base, 0, 0))
            if start <= offset < start + size:
                found[offset - start] = at[home, address + added]
    return size, found


def weak_functions(file: Path, objdump: str) -> set[str]:
    """Return the demangled names of functions of which the linker keeps one copy."""
    lines = _run(objdump, "-t", "-C", file).splitlines()
    return {
        match[1]
        for line in lines
        if (match := re.match(r"[0-9a-f]+ (?:.w|u.).{4}F \S+\t[0-9a-f]+ (?:\.hidden )?(.+)$", line))
    }


def innermost_loops(function: Function) -> list[tuple[str, ...]]:
    """Return the instructions of every loop that holds no other loop.

    These are natural loops of the control flow. The compiler may put their parts anywhere.
    """
    blocks = list(_blocks(function))
    starts = {block[0][0]: number for number, block in enumerate(blocks)}
    after = [_successors(block, starts) for block in blocks]
    reached, waiting = {0}, [0]
    while waiting:  # Padding, which nothing reaches, seems to run into the loop behind it.
        waiting += [target for target in after[waiting.pop()] if target not in reached and not reached.add(target)]
    before: list[list[int]] = [[] for _ in blocks]
    for number in reached:
        for target in after[number]:
            before[target].append(number)
    dominators = _dominators(before)
    loops: dict[int, set[int]] = {}
    for number, targets in enumerate(after):
        for head in targets:
            if head in dominators[number]:
                body, waiting = loops.setdefault(head, {head}), [number]
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += before[block]
    inner = [body for head, body in loops.items() if not any(other in body for other in loops if other != head)]
    return [tuple(text for number in sorted(body) for _, text in blocks[number]) for body in inner]


def _blocks(function: Function) -> Iterator[list[tuple[int, str]]]:
    """Runs of instructions that are entered at the first one and left at the last one."""
    targets = {int(match[1], 16) for text in function.texts if (match := _BRANCH.match(text))}
    block: list[tuple[int, str]] = []
    for address, text in function.code:
        if block and address in targets:
            yield block
            block = []
        block.append((address, text))
        if _BRANCH.match(text) or _LEAVES.match(text):
            yield block
            block = []
    if block:
        yield block


def _successors(block: list[tuple[int, str]], starts: dict[int, int]) -> list[int]:
    last = block[-1][1]
    branch = _BRANCH.match(last)
    found = [starts[int(branch[1], 16)]] if branch and int(branch[1], 16) in starts else []
    following = starts[block[0][0]] + 1
    return found if _LEAVES.match(last) or following == len(starts) else [*found, following]


def _dominators(before: list[list[int]]) -> list[set[int]]:
    """For every block, those that every way from the entry to it passes."""
    everything = set(range(len(before)))
    dominators = [{0}, *(set(everything) for _ in before[1:])]
    changed = True
    while changed:
        changed = False
        for number in range(1, len(before)):
            common = set.intersection(*(dominators[b] for b in before[number])) if before[number] else set()
            if common | {number} != dominators[number]:
                dominators[number], changed = common | {number}, True
    return dominators


def _run(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
