"""The cluster profile: who wins over whom, and what a person may write."""

from __future__ import annotations

from pathlib import Path

import pytest
from cases import cases
from composed import load_config

from igrpo_nemo.cluster.site import LOCAL_PROFILE, VARIABLES, slurm_time, with_site
from igrpo_nemo.config.igrpo_keys import SECRET_NAMES, time_in_seconds
from igrpo_nemo.errors import UserError

CASES = cases(__file__)


def profile(folder: Path, local: str = "", environ: dict[str, str] | None = None, *overrides: str):
    if local:
        (folder / LOCAL_PROFILE).write_text(local)
    words = ["experiment=demo", *overrides]
    return with_site(load_config(words), folder, environ or {}, words).igrpo.site


def refusal(folder: Path, local: str = "", environ: dict[str, str] | None = None) -> str:
    with pytest.raises(UserError) as raised:
        profile(folder, local, environ)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_without_anything_it_is_the_configs(tmp_path):
    assert profile(tmp_path) == load_config(["experiment=demo"]).igrpo.site


def test_each_source_wins_over_the_one_before(tmp_path):
    local = "gpu: a100_40gb\naccount: mine\npartition: short\nqos: low\n"
    environ = {"SBATCH_PARTITION": "long", "SBATCH_QOS": "high"}
    site = profile(tmp_path, local, environ, "cluster=a100_2x8", "engine=nemo_rl", "model=hf",
                   "policy.model_name=x", "igrpo.warmup.enabled=false",
                   "igrpo.site.qos=urgent")  # fmt: skip
    assert (site.gpu, site.account, site.partition, site.qos) == (
        "a100_40gb", "mine", "long", "urgent",
    )  # fmt: skip


def test_null_on_the_command_line_takes_a_value_back(tmp_path):
    environ = {"SBATCH_ACCOUNT": "a"}
    assert profile(tmp_path, "", environ, "igrpo.site.account=null").account is None
    assert profile(tmp_path, "account: b", {}, "++igrpo.site={account: c}").account == "c"


def test_an_empty_variable_is_no_value(tmp_path):
    assert profile(tmp_path, "account: mine", {"SBATCH_ACCOUNT": ""}).account == "mine"


def test_every_variable_reaches_its_key(tmp_path):
    values = {
        "account": "a", "partition": "p", "qos": "q", "constraint": "c", "reservation": "r",
        "time": "90", "container": "nvcr.io#nvidia/nemo-rl:v0.7.0", "mounts": "/a:/b,/c:/d:ro",
        "venv": "/v", "hf_home": "/h", "interface": "ib0", "offline": "0",
        "cpus_per_node": "64",
    }  # fmt: skip
    assert values.keys() == VARIABLES.keys()
    site = profile(tmp_path, "", {VARIABLES[key]: text for key, text in values.items()})
    assert site.model_dump(include=set(values)) == {
        **values,
        "time": "01:30:00",
        "mounts": ["/a:/b", "/c:/d:ro"],
        "offline": False,
        "cpus_per_node": 64,
    }


def test_env_is_merged_name_by_name(tmp_path):
    local = "env: {NCCL_DEBUG: INFO, NCCL_IB_DISABLE: 1, VERBOSE: true}"
    site = profile(tmp_path, local, {}, "+igrpo.site.env.NCCL_DEBUG=WARN", "+igrpo.site.env.A=b")
    assert site.env == {"NCCL_DEBUG": "WARN", "NCCL_IB_DISABLE": "1", "VERBOSE": "1", "A": "b"}
    assert profile(tmp_path, local, {}, "igrpo.site.env={B: c}").env == {"B": "c"}


@pytest.mark.parametrize(("written", "meant"), CASES["time_limits"])
def test_a_time_limit_in_each_of_slurms_forms(tmp_path, written, meant):
    assert slurm_time(written) == meant
    # YAML 1.1 reads 12:00:00 as a number of base 60.
    assert profile(tmp_path, f"time: {written}").time == meant
    assert profile(tmp_path, "", {"SBATCH_TIMELIMIT": written}).time == meant


def test_seconds_of_a_time_limit():
    assert time_in_seconds("01:02:03") == 3723
    assert time_in_seconds("2-00:00:10") == 2 * 86400 + 10


@pytest.mark.parametrize(("local", "environ", "expected"), CASES["refused"])
def test_what_cannot_be_used_is_named_in_one_line(tmp_path, local, environ, expected):
    assert expected in refusal(tmp_path, local, environ)


def test_a_refused_secret_is_not_shown(tmp_path):
    message = refusal(tmp_path, "env: {HF_TOKEN: hunter2-hunter2}")
    assert "names HF_TOKEN, which looks like a secret" in message and "hunter2" not in message
    with pytest.raises(UserError) as raised:
        load_config(["experiment=demo", "igrpo.site.env={HF_TOKEN: hunter2}"])
    assert "HF_TOKEN" in str(raised.value) and "hunter2" not in str(raised.value)


def test_names_of_secrets_and_names_that_only_sound_alike():
    for name in ("HF_TOKEN", "WANDB_API_KEY", "MY_SECRET", "KEY", "DB_PASSWORD"):
        assert SECRET_NAMES.search(name), name
    for name in ("TOKENIZERS_PARALLELISM", "MAX_TOKENS", "KEYBOARD", "NCCL_DEBUG"):
        assert not SECRET_NAMES.search(name), name


def test_an_unreadable_file_is_a_clear_error(tmp_path):
    (tmp_path / LOCAL_PROFILE).mkdir()
    assert "cannot read" in refusal(tmp_path)


def test_the_example_profile_can_be_used(tmp_path):
    example = Path(__file__).parents[2] / "slurm" / "cluster.local.example.yaml"
    site = profile(tmp_path, example.read_text())
    assert (site.account, site.time, site.mounts) == (
        "my_account", "04:00:00", ["/lustre:/lustre"],
    )  # fmt: skip
    assert site.env == {"NCCL_SOCKET_IFNAME": "ib0"}
