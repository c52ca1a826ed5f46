"""Bad input: one line that names the thing, exit code 2, nothing lost, no traceback."""

from __future__ import annotations

import shutil

import pytest
from command_line import QUICK, SMALL


def refused(igrpo, *words):
    done = igrpo(*words, code=2)
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1 and lines[0].startswith("error: "), done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


def test_a_process_ends_with_code_2_and_one_line(process):
    assert "igrpo.num_drafts" in refused(process.fresh, "train", *SMALL, "igrpo.num_draft=4")


def test_data_files_are_named_with_the_line(igrpo):
    data = ("data=jsonl", "data.max_input_seq_length=64", "data.train.num_problems=null")
    words = ("train", *QUICK, *data, "logger.log_dir=run")
    (igrpo.folder / "empty.jsonl").write_text("")
    (igrpo.folder / "broken.jsonl").write_text(
        '{"problem": "1+1=", "answer": "2"}\n{"problem": "1+\n'
    )
    both = "data.train.data_path={0} data.validation.data_path={0}"
    for name, expected in (("empty", "empty.jsonl"), ("broken", "broken.jsonl, line 2")):
        path = str(igrpo.folder / f"{name}.jsonl")
        message = refused(igrpo, *words, *both.format(path).split())
        assert expected in message


def test_a_prompt_that_is_too_long_is_named(igrpo):
    words = (*QUICK, "data.max_input_seq_length=20")
    message = refused(igrpo, "train", *words, "logger.log_dir=run")
    assert "64 of 64 problems are left out" in message and "data.max_input_seq_length" in message
    words = (*words, "igrpo.drop_overlong_prompts=false")
    message = refused(igrpo, "train", *words, "logger.log_dir=run")
    assert "problem train-" in message and "limit is 20" in message


@pytest.mark.skipif(shutil.which("mount") is None, reason="a full disk needs mount")
def test_a_full_disk_while_saving_loses_nothing(igrpo):
    import os
    import subprocess

    disk = igrpo.folder / "disk"
    disk.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=5m", "tmpfs", str(disk)], capture_output=True
        ).returncode
    ):
        pytest.skip("a full disk is made by mounting a small tmpfs, which needs root")
    try:
        words = (*QUICK, "logger.log_dir=run", f"checkpointing.checkpoint_dir={disk}/checkpoints")
        message = refused(igrpo, "train", *words, "checkpointing.keep_top_k=9")
        assert "checkpoints" in message and "space" in message
        kept = sorted(p.name for p in (disk / "checkpoints").glob("step_*"))
        assert kept and not list((disk / "checkpoints").glob(".saving*"))
        roomy = f"checkpointing.checkpoint_dir={igrpo.folder}/roomy"
        shutil.copytree(disk / "checkpoints", igrpo.folder / "roomy")
        done = igrpo("train", *QUICK, "logger.log_dir=run", roomy)
        assert f"resuming after step {int(kept[-1][5:])}" in done.stdout
    finally:
        subprocess.run(["umount", str(disk)], check=True)
