"""Reward functions as users write them, good and bad; the path is `own_rewards:NAME`."""

import os
import sys
import time

NO_FUNCTION = 3


def share(problem, completion, columns):
    return len(completion) / columns["longest"]


def parts(problem, completion, columns):
    return {"short": len(completion) < 4, "same": 0.5 * (completion == problem.answer)}


def bad(problem, completion, columns):
    """What the completion asks for."""
    if completion == "hang":
        time.sleep(60)
    if completion == "die":
        os._exit(3)
    if completion == "exit":
        sys.exit("done")
    if completion == "memory":
        return len(bytes(1 << 40))
    if completion == "raise":
        raise KeyError("no such\ncolumn")
    return {"text": "1.0", "nan": float("nan"), "none": None, "huge": 10**400}.get(completion, 1)


def secret(problem, completion, columns):
    return "A_TOKEN" in os.environ
