"""`igrpo export`: a model folder with a card, here or on the hub, and no secret in either."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import yaml
from cases import cases
from composed import load_config

from igrpo_nemo.cli import main
from igrpo_nemo.run.folder import RunFolder

CASES = cases(__file__)

CITATION = Path(__file__).parents[2] / "CITATION.cff"
TOKEN = "hf_planted0123456789abcdef"


@pytest.fixture
def run(tmp_path: Path, monkeypatch) -> Path:
    config = load_config(["experiment=demo", "igrpo.prompt.system='a `b` | c: {{ d }}'"])
    monkeypatch.setenv("MY_API_KEY", "long-hunter2-value")
    with RunFolder(tmp_path / "run") as folder:
        folder.write_config({**config.to_dict(), "hf_token": TOKEN, "note": "long-hunter2-value"})
        folder.append_metrics("val", 0, 0.0, {"val/accuracy": 0.25})
        folder.append_metrics("train", 1, 0.0, {"entropy/exact": 0.5, "igrpo/copy_rate": 0.125})
        folder.append_metrics("val", 1, 0.0, {"val/accuracy": 0.5})
        model = folder.path / "checkpoints" / "step_00000001" / "model"
        model.mkdir(parents=True)
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            (model / name).write_text("{}")
        (folder.path / "comparison").mkdir()
        (folder.path / "comparison" / "comparison.md").write_text("| system | aime24 |\n")
        return folder.path


def parts(card: str) -> tuple[dict, str]:
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_a_folder_has_the_model_its_card_and_its_config(run, tmp_path, capsys):
    out = tmp_path / "models" / "mine"
    assert main(["export", str(run), "--to", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    names = {path.name for path in out.iterdir()}
    assert names == {
        "config.json", "model.safetensors", "tokenizer.json", "README.md", "igrpo_config.yaml",
    }  # fmt: skip
    assert yaml.safe_load((out / "igrpo_config.yaml").read_text())["igrpo"]["num_drafts"] == 4
    front, body = parts((out / "README.md").read_text())
    assert front["library_name"] == "transformers" and "base_model" not in front
    assert front["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.5
    assert "| Held-out accuracy | 25.0 → 50.0 % (+25.0 points) |" in body
    assert "| Copies of the draft | 12.5 % (mean of the last tenth) |" in body
    assert "| system | aime24 |" in body and "@article{hatamizadeh2026igrpo" in body
    code = body.split("```python\n")[1].split("```")[0]
    (line,) = [line for line in code.splitlines() if line.startswith("messages = ")]
    assert eval(line.removeprefix("messages = "))[0]["content"] == "a `b` | c: {{ d }}"
    for path in out.iterdir():
        assert TOKEN not in path.read_text() and "hunter2" not in path.read_text()
    assert {path.name for path in out.parent.iterdir()} == {"mine"}, "no half-made folder is left"


def test_a_model_of_the_hub_is_the_base_and_a_folder_only_its_name(run, tmp_path):
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["igrpo"]["model"] = None
    for number, (name, told) in enumerate((("Qwen/Qwen2.5-7B", "Qwen/Qwen2.5-7B"),
                                           ("/home/me/secret place/base", "base"))):  # fmt: skip
        values["policy"]["model_name"] = name
        (run / "config.yaml").write_text(yaml.safe_dump(values))
        out = tmp_path / str(number)
        assert main(["export", str(run), "--to", str(out)]) == 0
        front, body = parts((out / "README.md").read_text())
        assert front.get("base_model") == (name if name == told else None)
        assert f"`{told}` trained with iGRPO, two" in body and "secret place" not in body


def test_what_is_no_hugging_face_folder_is_converted_first(run, tmp_path, monkeypatch):
    from igrpo_nemo.chain import export
    from igrpo_nemo.chain.experiment import model_folder

    (run / "checkpoints" / "step_2" / "policy" / "weights" / "iter_0000000").mkdir(parents=True)

    def convert(run: Path, which: str) -> None:
        model_folder(run, which).mkdir(parents=True)
        (model_folder(run, which) / "config.json").write_text("{}")

    monkeypatch.setattr(export, "convert", convert)
    assert main(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    assert {"config.json", "README.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.fixture
def hub(monkeypatch) -> list:
    """A hub that keeps what it is given; its calls."""
    calls: list = []

    class HfApi:
        def __init__(self, token: str) -> None:
            self.token = token

        def create_repo(self, name: str, **options):
            calls.append((self.token, name, options))
            if name == "me/refused":
                raise RuntimeError(f"401 for token {self.token}\nmore")
            return types.SimpleNamespace(repo_id=name)

        def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
            folder = Path(folder_path)
            calls.append((repo_id, {p.name: p.read_text() for p in folder.iterdir()}))

    module = types.ModuleType("huggingface_hub")
    module.HfApi = HfApi  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)
    return calls


def test_the_hub_gets_the_folder_with_the_environments_token(run, hub, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert main(["export", str(run), "--to", "hub:me/mine", "--private"]) == 0
    made, (name, files) = hub
    assert made == (TOKEN, "me/mine", {"private": True, "exist_ok": True})
    assert name == "me/mine" and "# mine\n" in files["README.md"]
    assert not any(TOKEN in text for text in files.values())
    assert main(["export", str(run), "--to", "hub:me/refused"]) == 2
    error = capsys.readouterr().err
    assert "the hub refused me/refused: 401" in error and TOKEN not in error
    monkeypatch.delenv("HF_TOKEN")
    assert main(["export", str(run), "--to", "hub:me/mine"]) == 2
    assert "HF_TOKEN is not set" in capsys.readouterr().err and len(hub) == 3


def test_the_real_hub_client_has_what_is_called():
    import inspect

    from huggingface_hub import HfApi

    inspect.signature(HfApi).bind(token="t")
    inspect.signature(HfApi.create_repo).bind(None, "a/b", private=True, exist_ok=True)
    call = {"repo_id": "a/b", "folder_path": "f", "commit_message": "m"}
    inspect.signature(HfApi.upload_folder).bind(None, **call)


@pytest.mark.parametrize(("words", "message"), CASES["refused"])
def test_what_cannot_be_exported_is_one_line(run, words, message, monkeypatch, capsys):
    monkeypatch.chdir(run.parent)
    words = [word.replace("RUN", str(run)) for word in words]
    assert main(["export", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_citation_names_the_paper_and_the_version():
    from igrpo_nemo import __version__

    citation = yaml.safe_load(CITATION.read_text())
    assert citation["version"] == __version__ and citation["cff-version"] == "1.2.0"
    (paper,) = citation["references"]
    assert paper["url"].endswith("/2602.09000") and len(paper["authors"]) == 8
    assert json.dumps(citation)
