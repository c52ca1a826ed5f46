import pytest
import yaml
from composed import load_config

from igrpo_nemo.config import with_problems
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.scrub import scrub
from igrpo_nemo.run.identity import check_same_inputs, check_same_run
from igrpo_nemo.types import Problem

CONFIG = {"grpo": {"seed": 1, "max_num_steps": 5}, "logger": {"log_dir": "a"}, "x": {"y": [1, 2]}}


def test_an_empty_folder_takes_any_config(tmp_path):
    check_same_run(tmp_path, CONFIG)


def test_free_keys_may_change_and_others_are_named(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    check_same_run(tmp_path, CONFIG | {"logger": {"log_dir": "b"}})
    check_same_run(tmp_path, CONFIG | {"grpo": {"seed": 1, "max_num_steps": 9}})
    check_same_run(tmp_path, CONFIG | {"igrpo": {"sample_table_period": 1, "row_dump_period": 5}})
    with pytest.raises(UserError, match=r"grpo.seed=1, this one has 2"):
        check_same_run(tmp_path, CONFIG | {"grpo": {"seed": 2, "max_num_steps": 5}})
    with pytest.raises(UserError, match=r"x.y=\[1, 2\], this one has \[1\]"):
        check_same_run(tmp_path, CONFIG | {"x": {"y": [1]}})
    with pytest.raises(UserError, match="holds a run with z=None, this one has 3"):
        check_same_run(tmp_path, CONFIG | {"z": 3})


def test_a_key_that_is_gone_and_changed_nothing_makes_no_other_run(tmp_path):
    for value in ("off", "first"):
        old = CONFIG | {"igrpo": {"short_circuit": value}}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(old))
        if value == "off":
            check_same_run(tmp_path, CONFIG)
        else:
            with pytest.raises(UserError, match="holds a run with igrpo.short_circuit='first'"):
                check_same_run(tmp_path, CONFIG)


def test_a_run_on_megatron_may_be_made_longer_but_not_change_its_schedule(tmp_path):
    """`lr_decay_iters` and its like follow from the number of steps."""

    def config(*overrides):
        base = ["engine=nemo_rl", "cluster=a100_2x8", "policy.model_name=/models/7b"]
        return with_problems(load_config([*base, *overrides]), 7_500).to_dict()

    (tmp_path / "config.yaml").write_text(yaml.safe_dump(scrub(config("grpo.max_num_steps=20"))))
    check_same_run(tmp_path, config("grpo.max_num_steps=50"))
    check_same_run(tmp_path, config("grpo.max_num_epochs=3", "grpo.max_num_steps=999"))
    with pytest.raises(UserError, match=r"igrpo.schedule.warmup_ratio=0.1, this one has 0.3"):
        check_same_run(tmp_path, config("igrpo.schedule.warmup_ratio=0.3"))


def test_edited_problems_and_a_replaced_base_model_make_another_run(tmp_path):
    model, run = tmp_path / "model", tmp_path / "run"
    model.mkdir()
    run.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    config = load_config([f"policy.model_name={model}"])
    train = [Problem(str(i), f"{i}+1", str(i + 1)) for i in range(4)]
    held_out = [Problem("v", "1+1", "2"), Problem("w", "1+2", "3")]
    for _ in range(2):
        check_same_inputs(run, config, train, held_out)
    check_same_inputs(run, config, train, held_out[:1])  # grpo.max_val_samples is free
    edited = [*train[:2], Problem("2", "2+1", "4"), train[3]]
    for problems, validation, name in (
        (edited, held_out, "data.train"),
        (train[::-1], held_out, "data.train"),
        (train, held_out[::-1], "data.validation"),
        (train, held_out[1:], "data.validation"),
    ):
        with pytest.raises(UserError, match=rf"another content of {name}.*put them back"):
            check_same_inputs(run, config, problems, validation)
    (model / "model.safetensors").write_bytes(b"heavier")
    with pytest.raises(UserError, match=r"another content of policy.model_name: the weights have"):
        check_same_inputs(run, config, train, held_out)
