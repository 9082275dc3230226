"""The families by name."""

from train.rewards.logic.cryptarithm import Cryptarithm
from train.rewards.logic.game_of_24 import GameOf24
from train.rewards.logic.knights_and_knaves import KnightsAndKnaves
from train.rewards.logic.latin import Futoshiki, Skyscrapers, Sudoku
from train.rewards.logic.minesweeper import Minesweeper
from train.rewards.logic.number_wall import NumberWall
from train.rewards.logic.operation import Operation
from train.rewards.logic.source import Puzzle
from train.rewards.logic.word_sorting import WordSorting

FAMILIES: dict[str, type[Puzzle]] = {
    puzzle.name: puzzle
    for puzzle in (
        Cryptarithm,
        Futoshiki,
        GameOf24,
        KnightsAndKnaves,
        Minesweeper,
        NumberWall,
        Operation,
        Skyscrapers,
        Sudoku,
        WordSorting,
    )
}
