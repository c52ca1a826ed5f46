"""Data sets as users write them, good and bad; the path is `own_data:NAME`."""


def sums(split):
    """Ten questions; a split is where they begin."""
    first = int(split or 0)
    return (
        {"question": f"{n}+1=", "answer": n + 1, "level": n % 3} for n in range(first, first + 10)
    )


def nothing(split):
    return []


def texts(split):
    return ["1+1="]


def broken(split):
    raise KeyError("no such\nfile")
