"""Answers that break verifiers, each different from every other; text that commands a terminal."""

from __future__ import annotations

import random
from collections.abc import Callable

Family = Callable[[int, random.Random], str]


def _tower(i: int, rng: random.Random) -> str:
    base = rng.choice(["9", "x", "e", "10"])
    return "^{".join([base] * (3 + i % 40)) + "}" * (2 + i % 40) + f" + {i}"


def _nested(i: int, rng: random.Random) -> str:
    depth = 20 + 40 * i
    pairs = [
        *(("\\frac{1}{1+", "}"), ("\\sqrt{2+", "}"), ("(1+", ")")),
        *(("{", "}"), ("\\left(", "\\right)")),
    ]
    opened, closed = rng.choice(pairs)
    return opened * depth + "1" + closed * depth


def _regex_bait(i: int, rng: random.Random) -> str:
    unit = rng.choice(
        ["1 000 ", "$", "\\(", "1,", "-(", "\\frac12", "answer: ", "$1$, and ", " [ "]
    )
    return unit * (50 + 13 * i) + rng.choice(["", "!", "x"])


def _bytes(i: int, rng: random.Random) -> str:
    pieces = ["\x00", "\ud800", "\udfff", "\u202e", "\x1b[2J", "\u0660", "−", "½", "\n", "\r", "\t"]
    return "".join(rng.choice([*pieces, str(i)]) for _ in range(1 + i % 60))


def _code(i: int, rng: random.Random) -> str:
    return rng.choice(
        [
            f"__import__('os')._exit({i % 200})",
            f"exec('while True: pass #{i}')",
            f"[0]*10**{9 + i % 9}",
            f"''.join(['a'*{i}]*10**9)",
            f"lambda: (yield {i})",
            f"open('/dev/zero').read({i})",
        ]
    )


def _latex_bomb(i: int, rng: random.Random) -> str:
    return rng.choice(
        [
            f"\\def\\a{{\\a\\a{i}}}\\a",
            "\\begin{matrix}" + f"{i} & " * (20 + i) + "\\end{matrix}",
            "\\boxed{" * (i + 1) + "1",
            f"\\input{{/etc/passwd{i}}}",
            "\\frac" * (10 + i),
            "|" * (3 + i) + "x" + "|" * (3 + i),
            f"\\log_{{{i}}}" * 200 + "2",
            f"1{'0' * (5 + 20 * i)}\\%",
        ]
    )


def _long(i: int, rng: random.Random) -> str:
    return rng.choice(["9", "x+", "\\sqrt{", "{", "("]) * (1_500 + 700 * i)


def _slow(i: int, rng: random.Random) -> str:
    return [
        f"9^{{9^{{9^{{9+{i}}}}}}}",
        f"({10**6 + i})!!!",
        f"\\sum_{{k=1}}^{{10^{{9}}}} \\frac{{k!}}{{{i}+k}}",
        f"\\prod_{{k=1}}^{{10^8}} (k^k + {i})",
        f"{i}^{{10^{{10}}}}",
    ][i % 5]


# How many of each. Towers, nesting and the slow ones are what meets the time limit.
FAMILIES: tuple[tuple[int, Family], ...] = (
    (12, _tower),
    (30, _nested),
    (260, _regex_bait),
    (343, _bytes),
    (100, _code),
    (100, _latex_bomb),
    (165, _long),
    (10, _slow),
)


def hostile_answers(seed: int = 0) -> list[str]:
    """1,020 answers, in an order that mixes the families."""
    rng = random.Random(seed)
    answers = [family(i, rng) for count, family in FAMILIES for i in range(count)]
    rng.shuffle(answers)
    return answers


def hostile_completions(seed: int = 0) -> list[str]:
    """The answers where a completion has them, and texts that strain the extraction itself."""
    rng = random.Random(seed)
    wrap = ["<answer>{}</answer>", "\\boxed{{{}}}", "<think>a</think><answer>{}</answer>"]
    texts = [rng.choice(wrap).format(answer) for answer in hostile_answers(seed)]
    return texts + [
        "{" * 100_000,
        "\\boxed{" * 30_000,
        "\\boxed{1} " * 100_000,
        "<answer>" * 120_000,
        "</answer>" * 120_000,
        "<think>" * 140_000 + "</think>" * 120_000,
        "\\boxed" + " " * 1_000_000,
        "\\boxed\\" + "a" * 1_000_000,
        "x" * 1_000_000 + "\\boxed{5",
        "<answer>" + "9" * 1_000_000 + "</answer>",
    ]


NASTY = "[bold red]x[/] \x1b[31mred\x1b[0m \x1b]0;title\x07 a\rb\x08 \u202eevil \ud800 \x9b2J end"
ROW = {
    "problem_id": "p1",
    "question": f"1 + 1? {NASTY}",
    "answer": "2",
    "draft": f"{NASTY} three",
    "draft_reward": 0.0,
    "draft_correct": False,
    "refinement": f"{NASTY} two",
    "refinement_reward": 2.0,
    "refinement_correct": True,
}
