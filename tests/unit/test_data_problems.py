"""From rows to problems: references, dropped rows, subsets, duplicates, overlap, the real sets."""

import json

import pytest
from cases import cases
from shared_data import FOLDER, shared_file, shared_rows

from igrpo_nemo.data import DataSpec, golds, load_problems, load_with_report
from igrpo_nemo.data.catalog import local_folder
from igrpo_nemo.data.columns import Unusable, question_text, reference_answer
from igrpo_nemo.data.overlap import fingerprint
from igrpo_nemo.errors import UserError
from igrpo_nemo.files import cache_folder
from igrpo_nemo.rewards.accuracy import Reason

CASES = cases(__file__)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("IGRPO_CACHE_DIR", str(tmp_path / "cache"))


@pytest.fixture
def write(tmp_path):
    def write(rows, name="set.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def spec(path, **keys):
    return DataSpec(data_path=path, **keys)


@pytest.mark.parametrize(("value", "answer"), CASES["reference"])
def test_the_reference_is_cut_out_of_a_column(value, answer):
    assert reference_answer(value) == answer


@pytest.mark.parametrize(("value", "reason"), CASES["no_reference"])
def test_what_is_no_reference_has_a_reason(value, reason):
    with pytest.raises(Unusable) as unusable:
        reference_answer(value)
    assert unusable.value.reason == reason


def test_a_solution_without_a_box_has_no_answer():
    with pytest.raises(Unusable, match="no_answer"):
        reference_answer("it is 5", solution=True)


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize(("value", "reason"), CASES["question"])
def test_a_question_is_a_text_or_a_chat_of_one_message(value, reason):
    if reason is None:
        assert question_text(value) == "1+1?"
        return
    with pytest.raises(Unusable) as unusable:
        question_text(value)
    assert unusable.value.reason == reason


def test_unusable_rows_are_dropped_and_counted(write):
    path = write(
        [
            {"problem": "a", "answer": "5"},
            {"problem": "b", "answer": ""},
            {"problem": "c", "answer": "\\frac{}{}"},
            {"problem": "  ", "answer": "1"},
            {"problem": "d", "answer": "9" * 3_000},
            {"problem": "e", "answer": "\\frac{\\sqrt{3}}{2}"},
            {"problem": "f", "answer": ["1", "2"]},
        ]
    )
    problems, report = load_with_report(spec(path))
    assert [(p.id, p.answer) for p in problems] == [
        ("set/0", "5"),
        ("set/5", "\\frac{\\sqrt{3}}{2}"),
    ]
    assert report.dropped == {
        "answer_too_long": 1,
        "answer_unparseable": 1,
        "no_answer": 1,
        "no_question": 1,
        "several_answers": 1,
    }
    assert report.dropped_rows["answer_unparseable"] == (2,)
    assert (report.rows, report.kept) == (7, 2)
    assert report.loss == (
        f"{path}: 5 of 7 rows are left out: 1 answer_too_long, 1 answer_unparseable, 1 no_answer, "
        "1 no_question, 1 several_answers"
    )
    assert len(load_problems(spec(path, drop_unusable=False))) == 7


@pytest.mark.parametrize(("row", "message"), CASES["nothing_usable"])
def test_where_nothing_is_usable_it_says_what_is(write, row, message):
    with pytest.raises(UserError) as refused:
        load_problems(spec(write([row])))
    assert f"none of 1 rows is usable {message}" in str(refused.value)


def test_subsets_have_the_asked_size_and_depend_on_the_seed_alone(write):
    path = write([{"problem": f"q{i}", "answer": str(i)} for i in range(50)])

    def ids(size, seed):
        return [p.id for p in load_problems(spec(path, num_problems=size, seed=seed))]

    first = ids(20, 1)
    assert len(first) == 20 and first == ids(20, 1) != ids(20, 2)
    numbers = [int(i.partition("/")[2]) for i in first]
    assert numbers == sorted(numbers)
    with pytest.raises(UserError, match="51 problems were asked for .*, and 50 are usable"):
        ids(51, 1)


def test_any_object_with_the_keys_is_a_specification(write):
    class Section:
        dataset_name = "jsonl"
        data_path = write([{"q": "a", "s": "so \\boxed{5}"}])
        input_key = "q"
        output_key = "s"
        split_validation_size = None

    assert load_problems(Section())[0].answer == "5"


def test_local_files_lie_in_the_folder_of_one_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("IGRPO_DATA_DIR", str(tmp_path))
    assert local_folder() == tmp_path
    monkeypatch.delenv("IGRPO_DATA_DIR")
    without = local_folder()
    monkeypatch.setenv("IGRPO_SHARED_DATA", str(tmp_path))
    assert local_folder() == without


def test_duplicates_and_overlap_are_reported_and_removed_when_asked(write, monkeypatch, tmp_path):
    folder = tmp_path / "sets"
    folder.mkdir()
    row = {"problem": "Find $\\dfrac{1}{2}$ of 4.", "answer": "2"}
    (folder / "math500.jsonl").write_text(json.dumps(row) + "\n")
    monkeypatch.setenv("IGRPO_DATA_DIR", str(folder))
    path = write(
        [
            {"problem": "Find $ \\frac12 $ of 4?", "answer": "2"},
            {"problem": "Find 1+1.", "answer": "2"},
            {"problem": "find  1 + 1", "answer": "2"},
        ]
    )
    problems, report = load_with_report(spec(path), overlap=True)
    assert (len(problems), report.duplicates) == (3, 1)
    assert report.overlap["math500"] == 1 and report.overlap["aime25"] is None
    problems, report = load_with_report(spec(path, drop_duplicates=True, drop_overlap=True))
    assert [p.id for p in problems] == ["set/1"]
    assert report.dropped == {"duplicate": 1, "overlap": 1}


def test_a_fingerprint_keeps_what_distinguishes_problems():
    assert fingerprint("Find $x^2$") != fingerprint("Find $x^3$")
    assert fingerprint("Subproblem 0: Find it") == fingerprint("find it?")
    assert fingerprint("Find $1+2$") != fingerprint("Find $1-2$")
    assert fingerprint("Find 1.5") != fingerprint("Find 15")


def test_the_check_of_references_is_cached_whole_or_not_at_all(monkeypatch):
    formulas = ["\\sqrt{2}", "x + 1", "\\frac{}{}"]
    first = golds.check_golds(formulas)
    assert first == [Reason.MATCH, Reason.MATCH, Reason.UNPARSEABLE]
    folder = cache_folder() / "references"
    files = list(folder.iterdir())
    assert len(files) == 1

    def no_pool(*_, **__):
        raise AssertionError("the cache should have answered")

    with monkeypatch.context() as patch:
        patch.setattr("igrpo_nemo.rewards.pool.VerifierPool", no_pool)
        assert golds.check_golds(formulas) == first
    files[0].write_text('["match"')
    assert golds.check_golds(formulas) == first
    assert json.loads(files[0].read_text()) == [str(reason) for reason in first]


def test_a_cache_that_cannot_be_made_is_told_and_done_without(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("IGRPO_CACHE_DIR", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="cannot write .*IGRPO_CACHE_DIR names another folder"):
        assert golds.check_golds(["\\sqrt{2}"]) == [Reason.MATCH]


def test_math_train_keeps_what_can_be_recovered(monkeypatch):
    rows = shared_rows("math_train_7500.jsonl")
    # The verdicts on all references cost 15 CPU seconds; the damaged rows and a sample stand here.
    monkeypatch.setattr(
        "igrpo_nemo.data.problems.check_golds", lambda answers: [Reason.MATCH] * len(answers)
    )
    monkeypatch.setenv("IGRPO_DATA_DIR", str(FOLDER))
    problems, report = load_with_report(DataSpec(dataset_name="math"))
    assert (len(rows), report.rows) == (7_500, 7_500)
    assert report.dropped_rows == {"no_answer": (5341, 5343)}
    answers = {p.id: p.answer for p in problems}
    assert answers["math/6627"] == "\\mbox{four}"
    assert answers["math/7301"].startswith("\\begin{pmatrix} 0 & 3")
    again = load_problems(spec(str(shared_file("math_train_7500.jsonl"))))
    assert again[2].answer == problems[2].answer
    sample = [p.answer for p in problems[::60]]
    assert golds.check_golds(sample) == [Reason.MATCH] * len(sample)


@pytest.mark.parametrize(("name", "split", "count", "first"), CASES["named_sets"])
def test_named_sets_are_whole(name, split, count, first, monkeypatch):
    shared_file("math500.jsonl")
    monkeypatch.setenv("IGRPO_DATA_DIR", str(FOLDER))
    problems, report = load_with_report(DataSpec(dataset_name=name, split=split))
    assert (len(problems), dict(report.dropped), problems[0].answer) == (count, {}, first)
    assert len({problem.id for problem in problems}) == count
    assert all(problem.question and problem.answer for problem in problems)
