"""The versions that `pip install .` takes: `python docs/lock.py > constraints.txt`.

Run it with the Python of a new environment that has nothing but `pip install .`: in any other one,
what its other packages want shows through.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HEADER = """\
# The versions of a clean `pip install .` (Linux, Python 3.11, PyTorch for CPU). To get the same:
#   pip install -c constraints.txt .
# Made in that new environment with `python docs/lock.py > constraints.txt`.
"""


def needed(name: str, extras: frozenset[str] = frozenset()) -> dict[str, str]:
    """Package -> version, of everything that a package needs here, itself included."""
    found: dict[str, str] = {}
    todo = [(canonicalize_name(name), extras)]
    seen = set()
    while todo:
        package, wanted = todo.pop()
        if (package, wanted) in seen:
            continue
        seen.add((package, wanted))
        try:
            here = distribution(package)
        except PackageNotFoundError:  # of another platform's wheels
            continue
        found[package] = here.version.partition("+")[0]
        for line in here.requires or ():
            each = Requirement(line)
            asked = [{"extra": extra} for extra in ("", *wanted)]
            if each.marker is None or any(map(each.marker.evaluate, asked)):
                todo.append((canonicalize_name(each.name), frozenset(each.extras)))
    return found


if __name__ == "__main__":
    pins = needed("igrpo-nemo")
    del pins["igrpo-nemo"]
    print(HEADER + "\n".join(f"{name}=={version}" for name, version in sorted(pins.items())))
