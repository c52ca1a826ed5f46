"""`igrpo data inspect`: what a data set holds and what of it can be used."""

from igrpo_nemo.cli.command import Command
from igrpo_nemo.data.inspect import add_flags, run

EXAMPLES = """\
  igrpo data inspect math
  igrpo data inspect my.jsonl --input-key problem --output-key answer --tokenizer PATH
"""

COMMAND = Command(
    name="data",
    help="describe a data set: drops, lengths, overlap",
    usage="inspect NAME [--split SPLIT] [--tokenizer PATH] [--json] ...",
    examples=EXAMPLES,
    add_flags=add_flags,
    run=run,
)
