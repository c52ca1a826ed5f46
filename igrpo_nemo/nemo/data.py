"""Problems for NeMo-RL: a data set class, given by its dotted path, and a processor.

    problems --write_problems--> JSONL <--data.train.data_path-- ProblemDataset
    row --problem_processor--> DatumSpec: q as one templated user message, the raw problem beside it

NeMo-RL's own math processor keeps only the templated text; Stage 2 needs the problem itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from nemo_rl.data.datasets.raw_dataset import RawDataset
from nemo_rl.data.interfaces import DatumSpec, TaskDataSpec

from igrpo_nemo.config.schema import Config
from igrpo_nemo.data.order import Curriculum, Position
from igrpo_nemo.prompts import PromptBuilder
from igrpo_nemo.run.core import prompt_builder
from igrpo_nemo.types import Problem

DATASET_PATH = "igrpo_nemo.nemo.data.ProblemDataset"
PROCESSOR = "igrpo_problem"
TASK = "igrpo"
VALIDATION_SPLIT = "validation"

CUT_TOKENS = 4
"""NeMo-RL's convention for a prompt that is too long: this many tokens, and weight 0."""

_config: Config | None = None


class ProblemDataset(RawDataset):
    """The problems that `write_problems` wrote.

    `split="validation"` marks rows whose reward is their accuracy. Other keys of a NeMo-RL data set
    section are accepted and ignored.
    """

    def __init__(self, data_path: str, split: str = "train", **_: Any) -> None:
        self.task_name = TASK
        self.val_dataset = None
        more = {"validation": split == VALIDATION_SPLIT, "task_name": TASK}
        # str.splitlines would also cut at separators inside a question.
        lines = Path(data_path).read_text(encoding="utf-8").split("\n")
        self.dataset = Dataset.from_list([json.loads(line) | more for line in lines if line])


class CurriculumLoader:
    """NeMo-RL's data loader, a `StatefulDataLoader`, in the order of a `Curriculum`, which is the
    embedded engine's. Its state is the place in the data and what was measured so far.

    An epoch's order is decided where it begins; its length is that of this epoch.
    """

    def __init__(self, inner: Any, config: Config) -> None:
        self._dataset, self._collate = inner.dataset, inner.collate_fn
        assert config.igrpo.curriculum_keep is not None
        self.order = Curriculum(
            self._dataset.dataset["id"],
            keep=config.igrpo.curriculum_keep,
            batch_size=inner.batch_size,
            seed=config.grpo.seed,
            shuffle=config.data.shuffle,
        )
        self._position = Position()

    def resume(self, checkpoint: str | None) -> None:
        """Goes on where a checkpoint's folder says, if there is one."""
        if checkpoint is not None:
            state = torch.load(Path(checkpoint) / "train_dataloader.pt")
            self._position = Position(**state["position"])
            self.order.load_state_dict(state["curriculum"])

    def state_dict(self) -> dict[str, Any]:
        return {"position": asdict(self._position), "curriculum": self.order.state_dict()}

    def __len__(self) -> int:
        return len(self.order.order(self._position.epoch)) // self.order.batch_size

    def __iter__(self) -> Iterator[Any]:
        """What is left of the epoch, batch by batch."""
        epoch, size = self._position.epoch, self.order.batch_size
        numbers = self.order.order(epoch)
        for end in range(self._position.index + size, len(numbers) + 1, size):
            self._position = Position(epoch, end)
            yield self._collate([self._dataset[number] for number in numbers[end - size : end]])
        self._position = Position(epoch + 1, 0)


def write_problems(problems: Sequence[Problem], path: Path) -> None:
    """Writes problems in the form that `ProblemDataset` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for problem in problems:
            file.write(json.dumps(asdict(problem), ensure_ascii=False) + "\n")


def problem_processor(
    datum_dict: Mapping[str, Any],
    task_data_spec: TaskDataSpec,
    tokenizer: Any,
    max_seq_length: int | None,
    idx: int,
) -> DatumSpec:
    """A problem as NeMo-RL's `DatumSpec`; `configure` must have named the config.

    A prompt above `max_seq_length` is cut to a few tokens and gets weight 0, as NeMo-RL does.
    """
    columns = datum_dict.get("columns", "")
    problem = Problem(datum_dict["id"], datum_dict["question"], datum_dict["answer"], columns)
    prompt = _builder(tokenizer).question(problem)
    assert _config is not None
    limit = _config.policy.max_total_sequence_length - _config.policy.generation.max_new_tokens
    fits = len(prompt.token_ids) <= min(limit, max_seq_length or limit)
    token_ids = torch.tensor(prompt.token_ids[: None if fits else CUT_TOKENS], dtype=torch.int64)
    return DatumSpec(
        message_log=[{"role": "user", "content": prompt.text, "token_ids": token_ids}],
        length=len(token_ids),
        extra_env_info={
            "problem": asdict(problem),
            "thinking_open": prompt.thinking_open,
            "validation": bool(datum_dict.get("validation", False)),
        },
        loss_multiplier=1.0 if fits else 0.0,
        idx=idx,
        task_name=datum_dict["task_name"],
    )


def configure(config: Config) -> None:
    """Names the config whose prompts the processor makes, and registers the processor."""
    from nemo_rl.data.processors import PROCESSOR_REGISTRY, register_processor

    global _config
    _config = config
    _builder.cache_clear()
    if PROCESSOR not in PROCESSOR_REGISTRY:
        register_processor(PROCESSOR, problem_processor)


@lru_cache(maxsize=2)
def _builder(tokenizer: Any) -> PromptBuilder:
    """Without limits: what is too long is marked here, not refused."""
    assert _config is not None, f"the processor {PROCESSOR} needs data.configure(config)"
    widened = _config.replaced("policy", max_total_sequence_length=10**9)
    return prompt_builder(widened.replaced("data", max_input_seq_length=10**9), tokenizer)
