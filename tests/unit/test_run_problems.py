import json

from igrpo_nemo.config import load_config
from igrpo_nemo.run.problems import training_problems, validation_problems


def test_a_share_of_the_training_problems_stands_in_for_a_validation_set(tmp_path):
    rows = [{"problem": f"{i}+1=", "answer": str(i + 1)} for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = load_config(
        [
            "policy.model_name=x",
            "data=jsonl",
            f"data.train.data_path={file}",
            "data.validation=null",
            "data.train.split_validation_size=0.25",
        ]
    )
    train, held_out = training_problems(config), validation_problems(config)
    assert len(train) == 30 and len(held_out) == 10
    assert not {p.id for p in train} & {p.id for p in held_out}
    assert held_out == validation_problems(config)
