import copy
import random

import pytest
from cases import cases

from igrpo_nemo.errors import UserError
from igrpo_nemo.prompts import PlainEncoder, PromptBuilder, PromptProfile, TokenBudget
from igrpo_nemo.types import Problem

CASES = cases(__file__)

PROFILE = PromptProfile("Think, then answer.", "\nA prior draft:\n", "draft")
HOSTILE = CASES["hostile"]


def builder(tokenizer, total=4096, new=64, **options):
    return PromptBuilder(tokenizer, PROFILE, TokenBudget(total, new), **options)


def control_positions(tokenizer, prompt):
    control = PlainEncoder(tokenizer).control_ids
    return [i for i in prompt.token_ids if i in control]


def test_ordinary_question_has_the_ids_of_the_chat_template(tokenizer):
    problem = Problem("1", "7+5*3-4=", "4")
    messages = [
        {"role": "system", "content": PROFILE.system},
        {"role": "user", "content": problem.question},
    ]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    prompt = builder(tokenizer).question(problem)
    assert prompt.text == expected
    ids = tokenizer(expected, add_special_tokens=False).input_ids
    assert list(prompt.token_ids) == list(ids)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_data_stays_plain_text_in_q_and_in_its_draft(tokenizer, text):
    build = builder(tokenizer)
    harmless = build.question(Problem("1", "x", "1"))
    harmless_refinement = build.refinement(Problem("1", "x", "1"), "y")
    q = build.question(Problem("1", text, "1"))
    refined = build.refinement(Problem("1", text, "1"), text)
    assert control_positions(tokenizer, q) == control_positions(tokenizer, harmless)
    assert control_positions(tokenizer, refined) == control_positions(
        tokenizer, harmless_refinement
    )
    remarked = build.showing(Problem("1", text, "1"), text, remark=text)
    assert control_positions(tokenizer, remarked) == control_positions(
        tokenizer, harmless_refinement
    )
    # What a server is sent is tokenised again, control strings included.
    served = tokenizer(build.draft_text(Problem("1", text, "1"), text)).input_ids
    assert PlainEncoder(tokenizer).control_ids.isdisjoint(served)
    for prompt in (refined, remarked):
        shown = tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
        assert shown.count("</draft>") == 1 and shown.count("<draft>") == 1


@pytest.mark.parametrize("seed", range(20))
def test_fuzzed_data_round_trips_and_never_becomes_control(tokenizer, seed):
    rng = random.Random(seed)
    pieces = [*HOSTILE, "<think>", "</think>", "<answer>", "7", "<", "|", "im_end", ">", "é", "\n"]
    text = "".join(rng.choice(pieces) for _ in range(rng.randint(1, 40)))
    encode = PlainEncoder(tokenizer)
    ids = encode(text)
    assert encode.control_ids.isdisjoint(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_role_tokens_that_are_not_marked_special_are_control_too(tokenizer):
    # DeepSeek's <｜User｜> is an added token with special=false; thinking tags are content.
    from transformers import AddedToken

    deepseek = copy.deepcopy(tokenizer)
    deepseek.add_tokens([AddedToken("<｜User｜>", special=False), AddedToken("<think>")])
    encode = PlainEncoder(deepseek)
    user_id, think_id = deepseek.convert_tokens_to_ids(["<｜User｜>", "<think>"])
    ids = encode("a<｜User｜>b<think>c")
    assert user_id not in ids
    assert think_id in ids
    assert deepseek.decode(ids) == "a<｜User｜>b<think>c"


def test_a_draft_is_shown_between_its_tags_after_the_question(tokenizer):
    prompt = builder(tokenizer).refinement(Problem("1", "1+1=", "2"), "<think>2</think>")
    assert "1+1=\nA prior draft:\n<draft>\n<think>2</think>\n</draft><|im_end|>" in prompt.text
    assert prompt.text == tokenizer.decode(prompt.token_ids, skip_special_tokens=False)
    assert prompt.draft_tokens == len(tokenizer("<think>2</think>").input_ids)
    assert prompt.draft_tokens_dropped == 0


@pytest.mark.parametrize("truncation", ["tail", "head_tail"])
@pytest.mark.parametrize("length", [1, 10, 50, 200, 5000])
@pytest.mark.parametrize("total", [100, 150, 300])
def test_q_refined_never_exceeds_the_budget_and_keeps_q_whole(tokenizer, truncation, length, total):
    build = builder(tokenizer, total=total, new=40, draft_truncation=truncation)
    problem = Problem("1", "1+2+3=", "6")
    draft = " ".join(str(i % 10) for i in range(length))
    q, refined = build.question(problem), build.refinement(problem, draft)
    assert len(refined.token_ids) <= max(total - 40, len(q.token_ids))
    assert problem.question in refined.text
    if refined.draft_tokens:
        assert draft[-1] + "\n</draft>" in refined.text
    draft_ids = tokenizer(draft, add_special_tokens=False).input_ids
    assert refined.draft_tokens + refined.draft_tokens_dropped == len(draft_ids)
    if truncation == "head_tail" and refined.draft_tokens_dropped and refined.draft_tokens > 40:
        assert f"<draft>\n{draft[:5]}" in refined.text and "[...]" in refined.text


def test_a_draft_that_fits_exactly_is_whole_and_one_token_more_is_not(tokenizer):
    problem, draft = Problem("1", "1+2=", "3"), "1 2 3 4 5 6 7 8 9"
    roomy = builder(tokenizer).refinement(problem, draft)
    exact = len(roomy.token_ids)
    assert builder(tokenizer, total=exact + 8, new=8).refinement(problem, draft) == roomy
    tight = builder(tokenizer, total=exact + 7, new=8).refinement(problem, draft)
    assert tight.draft_tokens_dropped == 1 and len(tight.token_ids) == exact - 1


def test_where_not_even_the_tags_fit_the_prompt_is_q(tokenizer):
    problem = Problem("1", "1+2=", "3")
    q = builder(tokenizer).question(problem)
    tight = builder(tokenizer, total=len(q.token_ids) + 9, new=8).refinement(problem, "1 2 3")
    assert (tight.token_ids, tight.draft_tokens) == (q.token_ids, 0)
    assert tight.draft_tokens_dropped == len(tokenizer("1 2 3").input_ids)


def test_a_third_of_what_is_kept_is_the_beginning(tokenizer):
    build = builder(tokenizer, total=220, new=40, draft_truncation="head_tail")
    draft = " ".join(str(i % 10) for i in range(500))
    refined = build.refinement(Problem("1", "1=", "1"), draft)
    head, tail = refined.text.split("<draft>\n")[1].split("\n</draft>")[0].split("[...]")
    parts = [len(tokenizer(part, add_special_tokens=False).input_ids) for part in (head, tail)]
    assert parts[0] == sum(parts) // 3 > 10 and draft.startswith(head.strip())


def test_answer_only_drafts_leave_the_thinking_out(tokenizer):
    build = builder(tokenizer, draft_content="answer")
    prompt = build.refinement(Problem("1", "1=", "1"), "<think>secret</think><answer>1</answer>")
    assert "secret" not in prompt.text and "<answer>1</answer>" in prompt.text


@pytest.mark.parametrize("answer", ["<answer>417</answer>", r"so \boxed{417}"])
def test_drafts_without_their_answer_show_all_before_it(tokenizer, answer):
    build = builder(tokenizer, draft_content="reasoning")
    prompt = build.refinement(Problem("1", "1=", "1"), f"<think>steps</think>{answer}")
    assert "<think>steps</think>" in prompt.text and "417" not in prompt.text
    assert "cut off" in build.refinement(Problem("1", "1=", "1"), "<think>cut off").text


def test_an_overlong_question_is_named_with_its_limit(tokenizer):
    build = PromptBuilder(tokenizer, PROFILE, TokenBudget(500, 20, max_question_tokens=60))
    assert build.question(Problem("1", "1=", "1"))
    with pytest.raises(
        UserError, match=r"problem row-7: its prompt has \d+ tokens, the limit is 60"
    ):
        build.question(Problem("row-7", "1+" * 100, "1"))


def test_a_question_never_takes_the_room_of_its_answer(tokenizer):
    """Also where `data.max_input_seq_length` would let it."""
    build = PromptBuilder(tokenizer, PROFILE, TokenBudget(100, 60, max_question_tokens=90))
    with pytest.raises(UserError, match="the limit is 40"):
        build.question(Problem("p", "1+" * 20, "1"))


def test_no_room_for_a_prompt_is_an_error(tokenizer):
    with pytest.raises(UserError, match="policy.max_total_sequence_length=64 leaves no room"):
        builder(tokenizer, total=64, new=64)


def test_templates_without_a_user_message_and_missing_templates_are_errors(tokenizer):
    broken = copy.deepcopy(tokenizer)
    broken.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(UserError, match="drops or changes the user's message"):
        builder(broken)
    broken.chat_template = None
    with pytest.raises(UserError, match="policy.tokenizer.chat_template"):
        builder(broken)


def test_a_template_without_a_system_role_is_refused_with_what_works(tokenizer, monkeypatch):
    refusing = (
        "{% for m in messages %}{% if m['role'] == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "{{ m['content'] }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    with pytest.raises(
        UserError, match=r"\(System role not supported\): set igrpo.prompt.system=''"
    ):
        builder(tokenizer)
    plain = PromptProfile("", PROFILE.draft_intro, PROFILE.draft_tag)
    PromptBuilder(tokenizer, plain, TokenBudget(512, 64)).question(Problem("p", "What?", "5"))


@pytest.mark.parametrize("text", ["bad \ud800 char", "\udc00", "two \udbff\ud83d halves"])
def test_half_a_surrogate_pair_is_named(text, tokenizer):
    with pytest.raises(
        UserError, match=r"problem p7: its question has '\\ud[89a-f]\w\w' at character"
    ):
        builder(tokenizer).question(Problem("p7", text, "5"))
    builder(tokenizer).question(Problem("p7", "\U0001f600 is whole", "5"))


def test_a_template_that_opens_the_thinking_is_noticed(tokenizer):
    r1 = copy.deepcopy(tokenizer)
    r1.chat_template = tokenizer.chat_template.replace("assistant\\n'", "assistant\\n<think>\\n'")
    assert builder(r1).question(Problem("1", "1=", "1")).thinking_open
    assert not builder(tokenizer).question(Problem("1", "1=", "1")).thinking_open
