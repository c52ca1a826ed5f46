"""The embedded engine on a GPU: against TRL, and against what the device can do.

    python benchmarks/gpu.py [--parts ceilings,step,update,decode,trl] [--json FILE] [NAME=VALUE]

    ceilings  bytes a second of a large copy, FLOP/s of a large matrix product
    step      two-stage and one-stage training steps of the embedded engine
    update    the policy update at rows of 4,096 tokens: its share of the matrix rate
    decode    a decoding step at 256 rows: its share of the copy's rate
    trl       the same steps by TRL, with vLLM in its process where that can be imported

Each side has processes of its own, which import while others measure and never measure at once.
Every result is printed when it is there, and appended to FILE as a line of JSON: a run that is cut
off has told what it found. A part has `--limit` seconds, TRL's parts three times as many, and one
that needs more is left. On a GPU the model is a Qwen2 of 0.36B parameters in bf16; on a CPU
everything is so small that it shows the benchmark's working alone. NAME=VALUE replaces a size
(`GpuSetting` in gpu_bench.py).
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

WORKER = Path(__file__).with_name("gpu_parts.py")
PARTS = ("ceilings", "step", "update", "decode", "trl")
START_S = 240
"""Most that a process may take to import, and to notice that its part has ended."""

ENVIRONMENT = {
    "TRL_EXPERIMENTAL_SILENCE": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

Result = dict[str, Any]


class WorkerEnded(Exception):
    """A worker ended, or said nothing for too long; the message is the end of what it printed."""


class Worker:
    """A process that measures one part after another."""

    def __init__(self, options: dict[str, Any], log: Path) -> None:
        self._log = log.open("w+", errors="replace")
        self._process = subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **ENVIRONMENT},
            start_new_session=True,
        )
        self._rest, self._ready = b"", False

    def run(self, part: str, limit_s: float) -> Iterator[Result]:
        """The results of a part, as they come. Raises `WorkerEnded`; `SystemExit` where the process
        could not even start."""
        if not self._ready:
            try:
                list(self._results(START_S))
            except WorkerEnded as error:
                raise SystemExit(f"error: {error}") from None
            self._ready = True
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"part": part, "limit_s": limit_s}).encode() + b"\n")
        self._process.stdin.flush()
        yield from self._results(limit_s + 30)

    def _results(self, silence_s: float) -> Iterator[Result]:
        while not (result := json.loads(self._line(silence_s))).get("done"):
            yield result

    def _line(self, silence_s: float) -> bytes:
        assert self._process.stdout is not None
        while b"\n" not in self._rest:
            if not select.select([self._process.stdout], [], [], silence_s)[0]:
                raise WorkerEnded(f"no word for {silence_s:g} s; {self._last_words()}")
            more = os.read(self._process.stdout.fileno(), 2**16)
            if not more:
                raise WorkerEnded(f"its process ended; {self._last_words()}")
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _last_words(self) -> str:
        self._log.seek(0)
        return " / ".join(self._log.read().strip().splitlines()[-3:])[-600:]

    def close(self) -> None:
        # With whatever it started: an engine of vLLM would keep the device's memory.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._log.close()


def measure(
    parts: Sequence[str],
    limit_s: float,
    options: dict[str, Any],
    tell: Callable[[Result], None],
) -> list[Result]:
    """Runs the parts one after another; each result goes to `tell` at once."""
    plan = [(part, "embedded", limit_s) for part in parts if part != "trl"]
    if "trl" in parts:
        plan += [(f"trl_{stages}", f"trl_{stages}", 3 * limit_s) for stages in ("two", "one")]
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as scratch:

        def start(side: str) -> Worker:
            name = {"side": side.partition("_")[0], "folder": scratch}
            return Worker({**options, **name}, Path(scratch, f"{side}.log"))

        workers = {side: start(side) for _, side, _ in plan}
        try:
            for number, (part, side, limit) in enumerate(plan):
                try:
                    for result in workers[side].run(part, limit):
                        results.append(result)
                        tell(result)
                except WorkerEnded as error:
                    results.append({"part": part, "failed": str(error)})
                    tell(results[-1])
                    workers.pop(side).close()
                if all(later != side for _, later, _ in plan[number + 1 :]):
                    # Its memory on the device is the next one's.
                    if side in workers:
                        workers.pop(side).close()
                elif side not in workers:
                    workers[side] = start(side)
        finally:
            for worker in workers.values():
                worker.close()
    return results


def comparison(results: Sequence[Result]) -> list[Result]:
    """The embedded engine's median step against TRL's."""
    found = []
    for stages in ("two", "one"):
        medians = {r["side"]: r for r in results if r.get("stages") == stages and "steps" in r}
        if medians.keys() >= {"embedded", "trl"}:
            ours, theirs = medians["embedded"], medians["trl"]
            found.append(
                {
                    "part": "against TRL",
                    "stages": stages,
                    "generation": theirs["generation"],
                    "speedup": theirs["step_s"] / ours["step_s"],
                    "tokens_per_s_ratio": ours["tokens_per_s"] / theirs["tokens_per_s"],
                    "peak_memory_ratio": ours["peak_gb"] / theirs["peak_gb"],
                }
            )
    return found


def line(result: Result) -> str:
    """A result for the terminal: what it is of, then its figures."""
    part = str(result["part"])
    words = [v for k, v in result.items() if isinstance(v, str) and k not in ("part", "failed")]
    figures = [
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in result.items()
        if not isinstance(value, str) and value is not None
    ]
    failed = [f"FAILED: {result['failed']}"] if "failed" in result else []
    return f"{part:9} {' '.join(words):14} {'  '.join([*figures, *failed])}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", default=",".join(PARTS), help="which, separated by commas")
    parser.add_argument("--limit", type=float, default=60, metavar="S", help="seconds a part (60)")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="counted runs (3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append a JSON line a result")
    parser.add_argument("sizes", nargs="*", metavar="NAME=VALUE", help="sizes to replace")
    flags = parser.parse_args(arguments)
    parts = flags.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"unknown part {unknown[0]}: use {', '.join(PARTS)}")
    if wrong := [text for text in flags.sizes if "=" not in text]:
        parser.error(f"{wrong[0]} is no NAME=VALUE")
    setting = dict(text.split("=", 1) for text in flags.sizes)

    def tell(result: Result) -> None:
        print(line(result), flush=True)
        if flags.json:
            with flags.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")

    results = measure(parts, flags.limit, {"repeats": flags.repeats, "setting": setting}, tell)
    for result in comparison(results):
        tell(result)
    return int(any("failed" in result for result in results))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # Its workers must end with it.
    sys.exit(main())
