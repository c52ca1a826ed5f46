"""One GPU: what `cluster=one_gpu` and `lora=` compose to, whether it fits, what is refused."""

from __future__ import annotations

import pytest
from cases import cases
from composed import PLENTY, config_of

from igrpo_nemo.config.checks import launch_problems
from igrpo_nemo.config.machines import LowRank, low_rank, parallel
from igrpo_nemo.preflight import Plan, preflight
from igrpo_nemo.preflight.shape import adapter_parameters, shape_of

CASES = cases(__file__)

SMALL = ("engine=nemo_rl", "model=qwen2.5_1.5b", "data=gsm8k")
SEVEN = ("engine=nemo_rl", "model=openmath_nemotron_7b", "data=gsm8k")
SHORT = ("policy.max_total_sequence_length=3072", "policy.generation.max_new_tokens=1024")
V1 = "policy.dtensor_cfg._v2=false"


def plan(*overrides: str) -> Plan:
    return preflight(config_of(*overrides), environ={}, free=lambda folder: PLENTY)


@pytest.mark.parametrize("version", [(), (V1,)], ids=["v2", "v1"])
@pytest.mark.parametrize("cluster", ["one_gpu", "one_gpu_48gb", "one_gpu_24gb"])
def test_a_model_of_1_5_billion_fits_one_gpu(cluster, version):
    found = plan(*SMALL, f"cluster={cluster}", *version)
    assert found.problems == [] and found.text().endswith("it fits\n")
    assert parallel(found.config).backend == "dtensor" and found.config.cluster.gpus_per_node == 1
    saved = found.config.checkpointing
    assert saved.model_save_format == (None if version else "safetensors")
    assert saved.save_consolidated is not version


def test_the_weights_of_24_gb_are_trained_from_the_hosts_memory():
    [problem] = plan(
        *SMALL, "cluster=one_gpu_24gb", "policy.dtensor_cfg.cpu_offload=false"
    ).problems
    assert problem.endswith("set policy.dtensor_cfg.cpu_offload=true")


def test_seven_billion_fit_with_adapters_alone():
    assert plan(*SEVEN, *SHORT, "cluster=one_gpu").problems != []
    found = plan(*SEVEN, *SHORT, "cluster=one_gpu", "lora=dtensor")
    assert found.problems == []
    memory = found.training
    assert memory is not None and found.disk is not None
    # 28 layers, rank 32: q, o 2 x 7168; k, v 2 x 4096; gate, up, down 3 x 22528 channels.
    trained = 28 * 32 * (2 * 7168 + 2 * 4096 + 3 * 22528)
    assert (memory.gradients, memory.optimizer) == (4 * trained, 8 * trained)
    assert memory.weights > 4 * 7_615_616_512  # all of them in fp32
    assert found.disk.each == 12 * trained
    assert f"rank 32, {trained:,} parameters are trained" in found.text()


def test_megatrons_adapters_lie_on_its_fused_layers():
    words = (*SEVEN, *SHORT, "cluster=a100_1x8", "lora=megatron")
    found = plan(*words)
    assert found.problems == [] and found.shape is not None
    trained = 28 * 32 * ((3584 + 4608) + 7168 + (3584 + 2 * 18944) + 22528)
    adapters = low_rank(found.config)
    assert adapters is not None
    assert adapter_parameters(found.shape, adapters, "megatron") == trained
    assert found.disk is not None and found.disk.each == 14 * trained
    everything = plan(*words[:-1])
    assert found.cost is not None and everything.cost is not None
    assert found.cost.training == pytest.approx(everything.cost.training * 3 / 4)


def test_patterns_of_modules():
    def adapts(**section: object) -> list[str]:
        names = ("q_proj", "down_proj", "lm_head")
        return [each for each in names if LowRank("", section).adapts(each)]

    assert adapts(target_modules=["*_proj"]) == ["q_proj", "down_proj"]
    assert adapts(target_modules=["*.layers.0.*.q_proj"]) == ["q_proj"]
    assert adapts(match_all_linear=True) == ["q_proj", "down_proj", "lm_head"]
    assert adapts(exclude_modules=["lm_head"]) == ["q_proj", "down_proj"]


LORA = "policy.dtensor_cfg.lora_cfg"


@pytest.mark.parametrize(("overrides", "works"), CASES["refused"])
def test_adapters_that_would_not_do_what_they_say_are_refused(overrides, works):
    [problem] = plan(*SMALL, "cluster=one_gpu", *overrides).problems
    assert problem.endswith(f"set {works[0]}") and "\n" not in problem
    keys = {word.partition("=")[0] for word in works}
    kept = [word for word in overrides if word.partition("=")[0] not in keys]
    if works[0] != "lora=dtensor":
        assert launch_problems(config_of(*SMALL, "cluster=one_gpu", *kept, *works)) == []


def test_the_shape_is_the_models():
    shape = shape_of(config_of(*SMALL), {})
    assert shape is not None and shape.tied and shape.heads * shape.head_dim == shape.hidden
