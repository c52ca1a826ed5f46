"""The notebook runs from top to bottom, with smaller settings, and leaves what its text says."""

from __future__ import annotations

import json
from pathlib import Path

from command_line import QUICK

NOTEBOOK = Path(__file__).parents[2] / "examples" / "walkthrough.ipynb"


def test_the_notebook_runs_from_top_to_bottom(igrpo, capfd):
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4 and all("id" in cell for cell in notebook["cells"])
    codes = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    assert [cell for cell in notebook["cells"] if cell.get("outputs")] == [], (
        "saved without outputs"
    )
    small = f"OVERRIDES += {[*QUICK[1:], 'grpo.max_num_steps=2']}\nconfig ="
    assert codes[0].count("config =") == 1
    names: dict = {}
    for code in (codes[0].replace("config =", small), *codes[1:]):
        exec(compile(code, str(NOTEBOOK), "exec"), names)
    shown = capfd.readouterr().out
    assert "pass@1[avg-of-2]" in shown and "igrpo/lift" in shown
    assert names["scores"].summary["reasons"] == {"match": 1, "mismatch": 1, "no_answer": 1}
    run = igrpo.folder / "runs" / "walkthrough"
    assert (run / "report.html").exists() and (run / "published" / "README.md").exists()
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(run / "published")
    tokenizer = AutoTokenizer.from_pretrained(run / "published")
    assert model.num_parameters() > 0 and tokenizer.chat_template
