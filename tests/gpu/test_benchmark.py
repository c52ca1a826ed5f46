"""The GPU benchmark at toy size: every part measures, tells as it goes, and ends at its limit."""

from __future__ import annotations

import importlib.util
import io
import json
import math

import gpu
import gpu_bench
import gpu_parts
import pytest

# Speaks a worker's protocol, without its imports.
WORKER = """\
import json, sys
if "hidden" in json.loads(sys.argv[1])["setting"]:
    sys.exit("no such size: hidden")
print('{"done": true}', flush=True)
for line in sys.stdin:
    part = json.loads(line)["part"]
    if part == "step":
        sys.exit("out of memory")
    print(json.dumps({"part": part, "failed": "cut off after 1 s"}))
    print('{"done": true}', flush=True)
"""


def measured(capsys, tmp_path, *words):
    """Exit code, results in the file by part, and what was printed."""
    file = tmp_path / "results.jsonl"
    code = gpu.main(["--json", str(file), "--repeats", "1", *words])
    results = [json.loads(line) for line in file.read_text().splitlines()]
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(results)
    return code, results, printed


@pytest.mark.slow
def test_every_part_measures(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    parts = "ceilings,step,update,decode"
    if importlib.util.find_spec("trl"):
        parts += ",trl"
    code, results, _ = measured(capsys, tmp_path, "--parts", parts)
    assert code == 0, results
    of = {part: [r for r in results if r["part"] == part] for part in gpu.PARTS}
    assert of["ceilings"][0]["machine"] and of["ceilings"][1]["flops_per_s"] > 0
    medians = [r for r in of["step"] if "steps" in r]
    assert [r["stages"] for r in medians] == ["two", "one"]
    for r in medians:
        assert r["steps"] == 1 and r["rollout_s"] + r["update_s"] == pytest.approx(r["step_s"])
    assert medians[0]["trained_prompt_tokens"] == 300
    assert [r["micro_batch_tokens"] for r in of["update"]] == [512, 1024, 2048, 4096]
    assert all(0 < r["share_of_matrix_rate"] < 2 for r in of["update"])
    (decoding,) = of["decode"]
    assert decoding["rows"] == 8 and math.isfinite(decoding["step_s"])
    assert decoding["bytes_per_step_prompts_once"] < decoding["bytes_per_step"]
    if "trl" in parts:
        found = {r["stages"]: r["speedup"] for r in results if r["part"] == "against TRL"}
        assert found.keys() == {"two", "one"} and min(found.values()) > 0


def test_a_part_is_left_at_its_limit_and_the_next_one_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_bench, "PROTOCOL", said := io.StringIO())
    setting = gpu_bench.setting_of("cpu", {"problems": "400", "matrix": "64", "copy_mb": "1"})
    bench = gpu_bench.Bench(tmp_path, "cpu", 1, setting)
    for part, limit_s in (("step", 1.0), ("ceilings", 60.0)):
        with bench.within(part, limit_s):
            gpu_parts.PARTS[part](bench)
    results = [json.loads(line) for line in said.getvalue().splitlines()]
    assert results[-3] == {"part": "step", "failed": "cut off after 1 s"}
    assert results[-1]["part"] == "ceilings" and results[-1]["matrix"] == 64


def test_what_fails_is_told_and_the_rest_measured(capsys, tmp_path, monkeypatch):
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(gpu, "WORKER", tmp_path / "worker.py")
    code, results, printed = measured(capsys, tmp_path, "--parts", "step,ceilings", "--limit", "1")
    assert code == 1
    assert results[0]["failed"] == "its process ended; out of memory"
    assert results[1] == {"part": "ceilings", "failed": "cut off after 1 s"}
    assert "FAILED: cut off after 1 s" in printed[1]
    for words, message in (
        (["--parts", "steps"], "unknown part steps: use ceilings, step, update, decode, trl"),
        (["problems"], "problems is no NAME=VALUE"),
    ):
        with pytest.raises(SystemExit):
            gpu.main(words)
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit, match="no such size: hidden"):
        gpu.main(["--parts", "ceilings", "hidden=3"])
    with pytest.raises(ValueError, match="no such size: hidden; there are hidden_size, "):
        gpu_bench.setting_of("cpu", {"hidden": "3"})
