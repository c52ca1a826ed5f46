"""Your model and your problems: a few steps of iGRPO through the Python API, and what they changed.

    python examples/own_data.py MODEL problems.jsonl --steps 20 --out runs/own_data

MODEL is a Hugging Face folder. A line of the file is a problem and its answer, such as
{"problem": "What is 6 * 7?", "answer": "42"}; docs/data.md has the names that columns may have.
The last lines of the file are held out. Run again, it goes on where it was stopped.
"""

import argparse
from pathlib import Path

import igrpo_nemo


def split(data: Path, held_out: int, out: Path) -> tuple[Path, Path]:
    """Two files: the problems to train on, and the last `held_out` ones to measure on."""
    rows = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not 0 < held_out < len(rows):
        raise SystemExit(f"{data} has {len(rows)} problems: --held-out must be below that")
    out.mkdir(parents=True, exist_ok=True)
    parts = {"train": rows[:-held_out], "held_out": rows[-held_out:]}
    for name, lines in parts.items():
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return out / "train.jsonl", out / "held_out.jsonl"


def accuracy(model: Path, held_out: Path, out: Path, overrides: list[str]) -> float:
    """Percent of the held-out problems answered right, one greedy answer each."""
    result = igrpo_nemo.evaluate(model, overrides, data=held_out, temperature=0.0, out=out)
    return result.metrics["pass@1"]["symbolic_correct"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--held-out", type=int, default=100, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("runs/own_data"))
    flags, more = parser.parse_known_args()  # more: overrides, such as policy.precision=float32
    train, held_out = split(flags.data, flags.held_out, flags.out)

    # What a laptop can do in minutes: small batches and short answers. `igrpo keys` lists the rest.
    overrides = [
        "experiment=laptop",
        f"policy.model_name='{flags.model}'",
        f"data.train.data_path='{train}'",
        f"data.validation.data_path='{held_out}'",
        f"grpo.max_num_steps={flags.steps}",
        f"logger.log_dir='{flags.out / 'run'}'",
        *more,
    ]
    config = igrpo_nemo.load_config(overrides)
    before = accuracy(flags.model, held_out, flags.out / "before", overrides)
    if igrpo_nemo.train(config) != 0:
        raise SystemExit("stopped with everything saved: run the same command again")
    newest = max((flags.out / "run" / "checkpoints").glob("step_*"))
    after = accuracy(newest, held_out, flags.out / f"after_{newest.name}", [])
    print(f"held-out accuracy: {before:.1f} % -> {after:.1f} %, {newest / 'model'}")


if __name__ == "__main__":
    main()
