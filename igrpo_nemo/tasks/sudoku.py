"""Small Sudoku: a 4 x 4 grid in which each row, column and 2 x 2 box holds 1 to 4.

`.2.43..1...` asks for the complete grid, row after row, and there is one. It is checked at a
glance; to find it, cells must be filled in an order that the givens allow. A guess at eight blanks
has one chance in 65,536.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache
from itertools import permutations

from igrpo_nemo.tasks.task import Task, WorkedAnswer

CELLS = range(16)


def _seen_from(cell: int) -> frozenset[int]:
    """The other cells of a cell's row, column and box."""
    row, column = divmod(cell, 4)
    return frozenset(
        other
        for other in CELLS
        if other != cell
        and (
            other // 4 == row
            or other % 4 == column
            or (other // 8, other % 4 // 2) == (row // 2, column // 2)
        )
    )


SEEN = tuple(_seen_from(cell) for cell in CELLS)


@cache
def grids() -> tuple[tuple[int, ...], ...]:
    """The 288 complete grids, row after row."""
    found: list[tuple[int, ...]] = [()]
    for _ in range(4):
        found = [
            grid
            for start in found
            for row in permutations((1, 2, 3, 4))
            if fits(grid := (*start, *row))
        ]
    return tuple(found)


def fits(grid: tuple[int, ...]) -> bool:
    """Whether no value of the first rows of a grid stands twice in its row, column or box."""
    n = len(grid)
    return all(grid[cell] != grid[o] for cell in range(n) for o in SEEN[cell] if o < n)


@dataclass(frozen=True, slots=True)
class Sudoku:
    """A complete grid and the cells that are left blank, in order."""

    grid: tuple[int, ...]
    blanks: tuple[int, ...]

    @property
    def question(self) -> str:
        return "".join("." if i in self.blanks else str(self.grid[i]) for i in CELLS) + "="

    @property
    def answer(self) -> str:
        return "".join(map(str, self.grid))

    @property
    def is_unique(self) -> bool:
        """Whether no other grid has the same givens."""
        same = -1
        for cell in CELLS:
            if cell not in self.blanks:
                same &= _grids_with()[cell, self.grid[cell]]
        return same.bit_count() == 1


@cache
def _grids_with() -> dict[tuple[int, int], int]:
    """For (cell, value) the grids that hold it: bit i stands for the i-th of `grids`."""
    return {
        (cell, value): sum(1 << i for i, grid in enumerate(grids()) if grid[cell] == value)
        for cell in CELLS
        for value in (1, 2, 3, 4)
    }


@dataclass(frozen=True)
class SudokuTask(Task):
    """The demonstrator fills the blanks in reading order, each with a value that its row, column
    and box leave, or, but for a share `care` of the cells, its row alone; what came out is the
    reasoning. Then each wrong cell is put right with the rate `notice`: that is the answer. Under
    a draft, right cells are kept with `trust` and wrong ones mended with `mend`."""

    care: float = 0.5
    notice: float = 0.2
    trust: float = 0.97
    mend: float = 0.8

    def sample(self, rng: random.Random, size: int) -> Sudoku:
        """A grid with `size` blanks that can be filled in one way."""
        while True:
            sudoku = Sudoku(rng.choice(grids()), tuple(sorted(rng.sample(CELLS, size))))
            if sudoku.is_unique:
                return sudoku

    def right(self, exercise: Sudoku) -> WorkedAnswer:
        return WorkedAnswer(tuple(exercise.answer), exercise.answer)

    def attempt(self, exercise: Sudoku, rng: random.Random) -> WorkedAnswer:
        filled = self._fill(exercise, rng)
        return WorkedAnswer(tuple(filled), self._mended(exercise, filled, 1.0, self.notice, rng))

    def correct(self, exercise: Sudoku, draft: WorkedAnswer, rng: random.Random) -> WorkedAnswer:
        assert draft.answer is not None
        mended = self._mended(exercise, draft.answer, self.trust, self.mend, rng)
        return WorkedAnswer(tuple(mended), mended)

    def _mended(
        self, exercise: Sudoku, said: str, trust: float, mend: float, rng: random.Random
    ) -> str:
        """The cells that were filled, each right with the rate `trust` or `mend` of its kind."""
        cells = list(said)
        for cell in exercise.blanks:
            right = exercise.answer[cell]
            if rng.random() < (trust if said[cell] == right else mend):
                cells[cell] = right
            elif said[cell] == right:
                cells[cell] = rng.choice([value for value in "1234" if value != right])
        return "".join(cells)

    def _fill(self, exercise: Sudoku, rng: random.Random) -> str:
        """A grid whose blanks have values that the cells before them leave, where some are left."""
        cells = ["" if cell in exercise.blanks else exercise.answer[cell] for cell in CELLS]
        for cell in exercise.blanks:
            careful = rng.random() < self.care
            taken = {cells[at] for at in SEEN[cell] if careful or at // 4 == cell // 4}
            cells[cell] = rng.choice([v for v in "1234" if v not in taken] or list("1234"))
        return "".join(cells)
