"""`igrpo score`: verdicts on a file of completions."""

from igrpo_nemo.cli.command import Command
from igrpo_nemo.rewards.score_file import add_flags, run

EXAMPLES = """\
  igrpo score samples.jsonl --answer-key answer --completion-key completions
  igrpo score samples.jsonl --answer-key gold --completion-key text --answer-format boxed
"""

COMMAND = Command(
    name="score",
    help="score a file of completions against reference answers",
    usage="FILE --answer-key KEY --completion-key KEY [--answer-format FORMAT] [--out FILE]",
    examples=EXAMPLES,
    add_flags=add_flags,
    run=run,
)
