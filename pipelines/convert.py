"""Makes a trained checkpoint a Hugging Face folder: RUN/hf/last.

    python pipelines/convert.py experiment=demo
    python pipelines/convert.py experiment=table1_openmath_nemotron_14b_igrpo --checkpoint best

The words are those that the run was trained with. The embedded engine's checkpoints are such
folders already and are linked; NeMo-RL's go through its own converter, where NeMo-RL is installed
(its container). What is converted already is left alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from igrpo_nemo.chain.checkpoints import find_checkpoint
from igrpo_nemo.chain.conversion import convert
from igrpo_nemo.chain.experiment import is_trained, model_folder
from igrpo_nemo.chain.script import DONE, ScriptParser, exit_code, overrides_of
from igrpo_nemo.cli.command import at_least
from igrpo_nemo.config import load_config


def main(words: Sequence[str]) -> int:
    parser = ScriptParser(__doc__, "convert.py [flags] key=value ...")
    add = parser.add_argument
    add("--checkpoint", default="last", metavar="last|best|N", help="which checkpoint (last)")
    add(
        "--gpus", type=at_least(1), metavar="N", help="shard the model over N GPUs while converting"
    )
    add("--python", metavar="COMMAND", help="NeMo-RL's Python: 'uv run --extra mcore python'")
    add("--dry-run", action="store_true", help="say what would be converted")
    flags, rest = parser.parse_known_args(list(words))
    config = load_config(overrides_of(rest))
    run = Path(config.logger.log_dir)
    if flags.dry_run:
        checkpoint = find_checkpoint(run, flags.checkpoint)
        target = model_folder(run, flags.checkpoint)
        print(f"{checkpoint.weights} ({checkpoint.form.value}) -> {target}")
        return DONE
    is_trained(config)  # raises for the words of another run
    made = convert(run, flags.checkpoint, gpus=flags.gpus, python=flags.python)
    target = model_folder(run, flags.checkpoint)
    print(f"convert: step {made['step']} ({made['form']}) is {target}")
    return DONE


if __name__ == "__main__":
    sys.exit(exit_code(main))
