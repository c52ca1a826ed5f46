"""q and q' as token ids: system prompt, chat template, and a draft fitted to the token budget.

    question -> q  = template(system, question)
    question + draft -> q' = template(system, question + <tag> draft </tag>)      (Eq. 3)

The chat template is rendered once, around a placeholder; questions and drafts are encoded apart
from it and joined as token ids. Whatever stands in them (control strings, braces, Jinja, a forged
delimiter) therefore stays plain text, and q is never cut to make room for a draft.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from jinja2 import TemplateError

from igrpo_nemo.errors import UserError
from igrpo_nemo.types import Problem, Prompt

PLACEHOLDER = "\ue000user\ue001"
"""Stands for the user's message while the template is rendered; private-use characters."""

CONTENT_TAGS = re.compile(r"</?(think|answer)>")
"""Added tokens that belong to what a policy writes, not to the structure of a conversation."""

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")

DraftContent = Literal["full", "answer", "reasoning"]
"""What of a draft q' shows: all, what follows the thinking, or all before the final answer."""

ELLIPSIS = "\n[...]\n"
"""Marks the gap of a draft that is shortened in its middle."""


@dataclass(frozen=True, slots=True)
class PromptProfile:
    """The fixed texts around the data.

    `system` is the system prompt of both stages and of GRPO (paper, appendix C); empty means none.
    q' appends `draft_intro` and the draft between `<draft_tag>` and `</draft_tag>` to the question.
    The paper gives the system prompt but not the template of Eq. 3: the delimiters are ours.
    """

    system: str
    draft_intro: str
    draft_tag: str

    @property
    def draft_open(self) -> str:
        return f"{self.draft_intro}<{self.draft_tag}>\n"

    @property
    def draft_close(self) -> str:
        return f"\n</{self.draft_tag}>"


@dataclass(frozen=True, slots=True)
class TokenBudget:
    """How many tokens a prompt may have: the context minus what is kept for the completion.

    `max_question_tokens` bounds q alone (the paper's 1,024); None leaves it to the context.
    """

    max_total_tokens: int
    max_new_tokens: int
    max_question_tokens: int | None = None

    @property
    def prompt_tokens(self) -> int:
        return self.max_total_tokens - self.max_new_tokens


class PlainEncoder:
    """Encodes data so that it never yields a control token of the tokenizer.

    Control tokens are all added tokens but the thinking and answer tags: some tokenizers (DeepSeek)
    do not mark their role tokens as special, so that flag is not enough.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        added = {str(token): index for token, index in tokenizer.get_added_vocab().items()}
        added.update(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        self.control_ids = {i for text, i in added.items() if not CONTENT_TAGS.fullmatch(text)}
        texts = sorted((t for t, i in added.items() if t and i in self.control_ids), key=len)
        self._control = re.compile("|".join(re.escape(t) for t in reversed(texts)) or r"(?!)")

    def __call__(self, text: str) -> list[int]:
        """Token ids of `text` as plain text; without control strings, the tokenizer's own ids."""
        ids = [i for piece in self.split(text) for i in self._encode(piece)]
        if not self.control_ids.isdisjoint(ids):
            # A normalising tokenizer can build a control string that the text does not spell.
            ids = [i for char in text for i in self._encode(char)]
            ids = [i for i in ids if i not in self.control_ids]
        return ids

    def split(self, text: str) -> list[str]:
        """Cuts each control string after its first character, so that no piece spells it."""
        pieces, start = [], 0
        while match := self._control.search(text, start):
            cut = match.start() + 1
            pieces.append(text[start:cut])
            start = cut
        return [*pieces, text[start:]]

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


class OverlongError(UserError):
    """A question whose q has more tokens than `limit`."""

    def __init__(self, message: str, limit: int) -> None:
        super().__init__(message)
        self.limit = limit


class PromptBuilder:
    """Builds q and q' for one tokenizer, profile and token budget.

    Raises `UserError` where the tokenizer has no chat template, one that cannot be rendered or one
    that drops the user's message, where the budget leaves no room for a prompt, and where a
    question does not fit.
    """

    def __init__(
        self,
        tokenizer: Any,
        profile: PromptProfile,
        budget: TokenBudget,
        *,
        draft_truncation: Literal["tail", "head_tail"] = "tail",
        draft_content: DraftContent = "full",
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if budget.prompt_tokens < 1:
            raise UserError(
                f"policy.max_total_sequence_length={budget.max_total_tokens} leaves no room for a "
                f"prompt beside policy.generation.max_new_tokens={budget.max_new_tokens}: raise "
                "the first or lower the second"
            )
        self.profile = profile
        self.budget = budget
        self._tokenizer = tokenizer
        self._plain = PlainEncoder(tokenizer)
        self._truncation = draft_truncation
        self._content = draft_content
        rendered = _render_template(tokenizer, profile.system, chat_template_kwargs or {})
        self._fixed_texts = rendered.split(PLACEHOLDER)
        self._fixed_ids = [_encode_template(tokenizer, text) for text in self._fixed_texts]
        self.thinking_open = opens_thinking(self._fixed_texts[-1])
        self._open_ids = self._plain(profile.draft_open)
        self._close_ids = self._plain(profile.draft_close)
        self._ellipsis_ids = self._plain(ELLIPSIS)
        tag = re.escape(profile.draft_tag)
        self._forged = re.compile(rf"<(\s*/?\s*{tag}\s*)>", re.IGNORECASE)

    def question(self, problem: Problem) -> Prompt:
        """q: the bare question, as at inference.

        Raises `OverlongError` where it does not fit, `UserError` where it is no text.
        """
        text = self._as_data(problem.question)
        if lone := _LONE_SURROGATE.search(text):
            raise UserError(
                f"problem {problem.id}: its question has {lone[0]!a} at character {lone.start()}, "
                "half of a surrogate pair, which no tokenizer takes: mend or remove it"
            )
        prompt = self._assemble(text, self._plain(text))
        limit = self.budget.max_question_tokens or self.budget.prompt_tokens
        limit = min(limit, self.budget.prompt_tokens)
        if len(prompt.token_ids) > limit:
            raise OverlongError(
                f"problem {problem.id}: its prompt has {len(prompt.token_ids)} tokens, the limit "
                f"is {limit} (policy.max_total_sequence_length={self.budget.max_total_tokens} "
                f"minus policy.generation.max_new_tokens={self.budget.max_new_tokens}, and at "
                f"most data.max_input_seq_length={self.budget.max_question_tokens}); raise it, or "
                "set igrpo.drop_overlong_prompts=true to leave such problems out",
                limit,
            )
        return prompt

    def refinement(self, problem: Problem, draft: str) -> Prompt:
        """q' = Concat(q, draft), Eq. 3: q whole, the draft shortened by tokens where it must be.

        With `tail` truncation the draft's end is kept, because the answer stands there; with
        `head_tail` a third of the room goes to its beginning. A q that leaves no room for even one
        draft token gives q' with an empty draft, and `draft_tokens_dropped` says so.
        """
        return self.showing(problem, draft)

    def showing(
        self,
        problem: Problem,
        text: str,
        *,
        intro: str | None = None,
        remark: str = "",
        content: DraftContent | None = None,
    ) -> Prompt:
        """q, then `text` between the draft's delimiters, then a remark about it.

        `intro` and `content` replace those of the draft (`draft_intro`, `draft_content`). What
        does not fit is cut from `text`, as in `refinement`; where q leaves no room for the texts
        around it, the prompt is q.
        """
        profile = self.profile
        question = self._as_data(problem.question)
        question_ids = self._plain(question)
        opening, open_ids = profile.draft_open, self._open_ids
        if intro is not None:
            opening = replace(profile, draft_intro=intro).draft_open
            open_ids = self._plain(opening)
        remark = self._as_data(remark)
        close_ids = [*self._close_ids, *self._plain(remark)]
        draft_ids = self._plain(self._as_data(_shown_part(text, content or self._content)))
        room = self._room(question_ids, open_ids, close_ids)
        if room < 0:
            return self._assemble(question, question_ids, dropped=len(draft_ids))
        kept_ids, dropped = self._fit(draft_ids, room)
        shown = self._tokenizer.decode(kept_ids, skip_special_tokens=False)
        return self._assemble(
            question + opening + shown + profile.draft_close + remark,
            [*question_ids, *open_ids, *kept_ids, *close_ids],
            shown=len(draft_ids) - dropped,
            dropped=dropped,
        )

    def draft_text(self, problem: Problem, draft: str) -> str:
        """What q' appends to the question, as a message to a server that renders it itself.

        It is `refinement`'s, but for a space within each control string: a server would read one.
        """
        open_ids, close_ids = self._open_ids, self._close_ids
        question_ids = self._plain(self._as_data(problem.question))
        draft_ids = self._plain(self._as_data(_shown_part(draft, self._content)))
        room = self._room(question_ids, open_ids, close_ids)
        if room < 0:
            return ""
        kept_ids, _ = self._fit(draft_ids, room)
        shown = self._tokenizer.decode(kept_ids, skip_special_tokens=False)
        shown = " ".join(self._plain.split(shown))
        return self.profile.draft_open + shown + self.profile.draft_close

    def _room(self, *around: Sequence[int]) -> int:
        """The tokens that the budget leaves beside these and the template's."""
        return self.budget.prompt_tokens - sum(map(len, [*around, *self._fixed_ids]))

    def _assemble(
        self, text: str, ids: Sequence[int], *, shown: int = 0, dropped: int = 0
    ) -> Prompt:
        token_ids = list(self._fixed_ids[0])
        for fixed in self._fixed_ids[1:]:
            token_ids += [*ids, *fixed]
        return Prompt(
            text=text.join(self._fixed_texts),
            token_ids=tuple(token_ids),
            thinking_open=self.thinking_open,
            draft_tokens=shown,
            draft_tokens_dropped=dropped,
        )

    def _as_data(self, text: str) -> str:
        """A forged delimiter becomes `[tag]`: it must neither open nor close the draft."""
        return self._forged.sub(r"[\1]", text)

    def _fit(self, draft_ids: list[int], room: int) -> tuple[list[int], int]:
        """The draft's tokens that fit into `room`, and how many of its tokens were dropped."""
        excess = len(draft_ids) - room
        if excess <= 0:
            return draft_ids, 0
        gap = len(self._ellipsis_ids)
        if self._truncation == "head_tail" and room >= 3 * (gap + 1):
            head = (room - gap) // 3
            tail = room - gap - head
            return [*draft_ids[:head], *self._ellipsis_ids, *draft_ids[-tail:]], excess + gap
        return draft_ids[len(draft_ids) - room :], excess


def _shown_part(text: str, content: str) -> str:
    if content == "answer":
        return text.rpartition("</think>")[2].strip()
    answer = max(text.rfind("<answer>"), text.rfind("\\boxed"))
    return text[:answer] if content == "reasoning" and answer >= 0 else text


def opens_thinking(question: str) -> bool:
    """Whether a templated prompt ends inside a thinking part, as R1's templates do."""
    return question.rstrip().endswith("<think>")


def _render_template(tokenizer: Any, system: str, kwargs: dict[str, Any]) -> str:
    if not tokenizer.chat_template:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path or 'the model'} has no chat template: set "
            "policy.tokenizer.chat_template to a Jinja text or to the path of a .jinja file"
        )
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": PLACEHOLDER})
    try:  # boundary: a template of others
        rendered = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **kwargs
        )
    except TemplateError as error:
        remedy = "set igrpo.prompt.system='' to send none, or " if system else ""
        raise UserError(
            f"the chat template of {tokenizer.name_or_path or 'the model'} refuses the messages "
            f"({' '.join(str(error).split())}): {remedy}set policy.tokenizer.chat_template to "
            "another one"
        ) from error
    if PLACEHOLDER not in rendered:
        raise UserError("the chat template drops or changes the user's message: use another one")
    return rendered


def _encode_template(tokenizer: Any, text: str) -> list[int]:
    # The template spells its own beginning-of-sequence token where the model wants one.
    return list(tokenizer(text, add_special_tokens=False).input_ids) if text else []
