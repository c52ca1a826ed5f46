"""Files that are whole or absent, without secrets, and where what is kept between runs lies."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest

from igrpo_nemo.errors import UserError
from igrpo_nemo.files import cache_folder
from igrpo_nemo.files.atomic import check_folder, write_atomic, write_or_refuse
from igrpo_nemo.files.scrub import scrub


def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    target = tmp_path / "out" / "file.json"
    write_or_refuse(target, "ü")
    assert target.read_bytes() == "ü".encode()

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(target, b"new")
    assert list(target.parent.iterdir()) == [target] and target.read_text() == "ü"


def test_two_writers_of_one_file_do_not_mix(tmp_path):
    target = tmp_path / "file"
    texts = [letter * 200_000 for letter in "abcd"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: write_atomic(target, text), texts * 5))
    assert target.read_text() in texts
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*/file/x: File exists"):
        write_or_refuse(tmp_path / "file" / "x", "text")


def test_a_folder_is_made_and_tried_before_the_work(tmp_path):
    check_folder(tmp_path / "a" / "b", "x")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write into .*/file/x: .*; choose another"):
        check_folder(tmp_path / "file" / "x", "choose another")


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("IGRPO_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "igrpo-nemo"
    monkeypatch.setenv("IGRPO_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


@pytest.mark.parametrize(
    "key",
    "token hf_token HF_TOKEN hfToken wandb_api_key WANDB_API_KEY apiKey apikey key secret "
    "client_secret aws_secret_access_key password db_password passwd auth_token credentials "
    "access_token_v2 private_key token_value wandbkey".split(),
)
def test_secrets_are_replaced_at_any_depth(key):
    config = {"a": [{key: "hunter2"}], key: {"x": ["hunter2"]}}
    assert "hunter2" not in json.dumps(scrub(config))


def test_numbers_under_strong_names_are_secrets_too():
    assert scrub({"password": 1234, "api_key": None, "secret": True}) == {
        "password": "<redacted>",
        "api_key": None,
        "secret": True,
    }


def test_what_a_run_is_reproduced_from_stays():
    config = {
        "policy": {
            "tokenizer": {"name": "gpt2", "pad_token": "<pad>", "eos_token": "</s>"},
            "generation": {"max_new_tokens": 64, "stop_token_ids": [1, 2]},
            "train_mb_tokens": 2048,
            "moe_token_dispatcher_type": "alltoall",
        },
        "loss_fn": {"token_level_loss": True},
        "data": {"input_key": "problem", "output_key": "expected_answer", "text_key": "text"},
        "keep_top_k": 3,
        "system_prompt": "Think in <think> tokens.",
    }
    assert scrub(config) == config


def test_secrets_inside_values_are_replaced():
    config = {
        "tracking_uri": "https://ann:hunter2@mlflow.example/x",
        "note": "uses hf_abcdefghijklmnopqrstuvwx and sk-abcdefghijklmnop1234",
    }
    text = json.dumps(scrub(config))
    assert "hunter2" not in text and "abcdefghijkl" not in text
    assert "mlflow.example/x" in text and "uses" in text
