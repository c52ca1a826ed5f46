"""NeMo-RL's own sections: names and meanings are NeMo-RL v0.7.0's.

A key without a default here has its value in `configs/config.yaml` or in a group; one with a
default is optional. `Only` are those that the embedded engine does not read: it says which of them
are set, and `checks` rejects a value that would change the method. Most of them stand in
`nemo_only.yaml`. NeMo-RL validates `Open`
mappings itself; `nemo_schema` has the names inside them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Discriminator, Field, Tag, create_model

from igrpo_nemo.config.section import (
    Derivable,
    HostSection,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Seconds,
    Section,
    Share,
    Text,
    TopP,
    key,
)
from igrpo_nemo.tasks import TASKS

T = TypeVar("T")
S = TypeVar("S", bound=Section)
NEMO_ONLY = object()
"""Marks a key that only NeMo-RL reads."""
Only = Annotated[T | None, NEMO_ONLY]
Open = dict[str, Any]
"""A mapping whose keys are NeMo-RL's business."""


def only(description: str) -> Any:
    """The field of a key that the embedded engine can do without, absent where nobody sets it."""
    return Field(default=None, description=description)


_TYPES = {"bool": bool, "float": float, "int": int, "mapping": Open, "str": str}
_NEMO_ONLY = yaml.safe_load(Path(__file__).with_name("nemo_only.yaml").read_text(encoding="utf-8"))


def with_nemo_only(section: type[S]) -> type[S]:
    """The section with its keys of `nemo_only.yaml`, which no code here reads."""
    fields: dict[str, Any] = {
        name: (Only[_TYPES[kind]], only(description))
        for name, (kind, description) in _NEMO_ONLY[section.__name__].items()
    }
    same = {"__base__": section, "__module__": section.__module__, "__doc__": section.__doc__}
    made: Any = create_model(section.__name__, **same, **fields)
    return made


class RewardShaping(HostSection):
    """`grpo.reward_shaping`: penalties on long completions (DAPO, arXiv 2503.14476)."""

    enabled: bool = key("Shapes the rewards of the trained rows.")
    overlong_buffer_length: NonNegative = 0
    """Tokens before `max_response_length` over which the penalty grows."""
    overlong_buffer_penalty: NonNegativeFloat = key("The penalty at `max_response_length`.", 1.0)
    max_response_length: Positive | None = None
    """The completion limit in tokens that the penalty counts from."""
    stop_properly_penalty_coef: Share | None = None
    """Factor on the reward of truncated completions, instead of the overlong penalty."""


class RewardScaling(HostSection):
    """`grpo.reward_scaling`: clamps rewards to the source range and maps it to the target's."""

    enabled: bool = key("Scales the rewards of the trained rows.")
    source_min: float = key("Lower end of the rewards.", 0.0)
    source_max: float = key("Upper end of the rewards: 2.0 with accuracy and format.", 1.0)
    target_min: float = key("What `source_min` becomes.", 0.0)
    target_max: float = key("What `source_max` becomes.", 1.0)


@with_nemo_only
class GRPO(HostSection):
    """`grpo.*`: the loop."""

    num_prompts_per_step: Positive = key("Problems per step (P).")
    num_generations_per_prompt: Derivable
    """Trained rows per problem; null derives it from the feedback and the budget."""
    max_num_epochs: Positive
    """Passes over the problems; the last partial batch of a pass is dropped."""
    max_num_steps: Positive = key("Steps at most.")
    normalize_rewards: bool
    """Divides advantages by the group's standard deviation (Eq. 4); Dr. GRPO does not."""
    use_leave_one_out_baseline: bool = key("Leaves a row out of its own baseline; not the paper's.")
    skip_reference_policy_logprobs_calculation: bool
    """No reference pass; needs `loss_fn.reference_policy_kl_penalty` 0."""
    val_period: NonNegative = key("Steps between validations; 0 is never.")
    val_at_start: bool = key("Validates before the first step.")
    val_at_end: bool = key("Validates after the last step.")
    max_val_samples: Positive | None = key("Validation problems at most; null takes all.")
    val_batch_size: Positive | None = key("Validation problems per batch; null takes them at once.")
    seed: NonNegative = key("Seed of everything random.")
    overlong_filtering: bool = key("Leaves truncated rows out of the loss.")
    use_dynamic_sampling: bool
    """Replaces problems whose trained rewards are all equal (DAPO)."""
    dynamic_sampling_max_gen_batches: Positive
    """Batches drawn for one step at most, under dynamic sampling."""
    batch_multiplier: Annotated[float, Field(ge=1)]
    """Problems sampled per batch, as a multiple of the step's, under dynamic sampling."""
    reward_shaping: RewardShaping = key("Penalties on long or truncated completions.")
    reward_scaling: RewardScaling = key("Linear map of the rewards.")

    async_grpo: Only[Open] = only("Asynchronous training: `enabled` and its options, ...")
    adv_estimator: Only[Open] = only("Advantage estimator: `name` and its options.")


@with_nemo_only
class Loss(HostSection):
    """`loss_fn.*`: the clipped surrogate (Eqs. 1 and 5)."""

    ratio_clip_min: Annotated[float, Field(ge=0, lt=1)]
    """The ratio's lower clip is 1 minus this."""
    ratio_clip_max: NonNegativeFloat = key("The ratio's upper clip is 1 plus this.")
    ratio_clip_c: Annotated[float, Field(gt=1)] | None
    """Dual clip for negative advantages; null is none."""
    token_level_loss: bool = key("Mean over tokens (DAPO) instead of sequences first (Eq. 5).")
    sequence_level_importance_ratios: bool = key("One ratio a sequence (GSPO, arXiv 2507.18071).")
    reference_policy_kl_penalty: NonNegativeFloat
    """Weight beta of the KL to the reference policy (Eq. 26)."""
    reference_policy_kl_type: Literal["k1", "k2", "k3"] = key("Estimator of that KL.", "k3")
    kl_input_clamp_value: PositiveFloat | None = None
    """Clamp of the log-ratio; null is none, as in Eq. 26."""
    kl_output_clamp_value: PositiveFloat | None = None
    """Clamp of the KL; null is none, as in Eq. 26."""

    force_on_policy_ratio: Only[bool] = only("Fixes the ratio to 1, for one update per rollout.")


@with_nemo_only
class Tokenizer(HostSection):
    """`policy.tokenizer`."""

    name: Text = key("Folder or name of the tokenizer.")
    chat_template: str | None = None
    """Jinja text or a `.jinja` file for models without a template."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Passed to the template, `enable_thinking` for instance."""


class OptimizerKwargs(Section):
    """`policy.optimizer.kwargs`: AdamW's."""

    lr: PositiveFloat = key("Peak learning rate.")
    weight_decay: NonNegativeFloat = key("Decoupled weight decay.", 0.0)
    betas: Annotated[list[float], Field(min_length=2, max_length=2)] = [0.9, 0.999]
    """Decay of the first and second moment."""
    eps: PositiveFloat = key("Added to the denominator.", 1e-8)
    foreach: bool | None = key("PyTorch's multi-tensor implementation.", None)
    fused: bool | None = key("PyTorch's fused implementation.", None)


class Optimizer(Section):
    """`policy.optimizer`."""

    name: Literal["torch.optim.AdamW"] = key("The optimizer's class.", "torch.optim.AdamW")
    kwargs: OptimizerKwargs = key("Its arguments.")


@with_nemo_only
class SequencePacking(HostSection):
    """`policy.sequence_packing`."""

    enabled: bool = key("Packs the rows of a prompt behind one copy of it.")
    train_mb_tokens: Positive = key("Tokens of a training micro-batch.")

    logprob_mb_tokens: Only[int] = only("Tokens of a log-prob micro-batch.")


@with_nemo_only
class Generation(HostSection):
    """`policy.generation`: sampling in training, both stages."""

    max_new_tokens: Positive = key("Tokens of a completion at most.")
    temperature: PositiveFloat = key("Divides the logits.")
    top_p: TopP = key("Share of the probability mass sampled from.")
    top_k: Positive | None = key("Number of tokens sampled from; null is all.")
    stop_strings: list[str] | None = key("Strings that end a completion.")
    stop_token_ids: list[int] | None = key("Tokens that end a completion.")

    backend: str | None = only(
        "`vllm`, `sglang` or `megatron`; the embedded engine knows `vllm`, and its own sampler."
    )
    model_name: Only[str] = only("Written by NeMo-RL.")
    use_async_rollouts: Only[bool] = only("Per-sample asynchronous rollouts.")
    colocated: Only[Open] = only("Whether generation shares the training GPUs, or its `resources`.")
    vllm_cfg: Only[Open] = only("vLLM: memory, context, graphs; NeMo-RL reads parallelism too.")
    vllm_kwargs: Only[Open] = only("Passed to vLLM as they are.")
    mcore_generation_config: Only[Open] = only("Megatron inference options.")

    @property
    def vllm(self) -> Open:
        """`vllm_cfg`, empty where it is not given."""
        return self.vllm_cfg or {}

    @property
    def is_colocated(self) -> bool:
        """Whether generation shares the training GPUs, as it does unless `colocated` says no."""
        return (self.colocated or {}).get("enabled", True)


@with_nemo_only
class Policy(HostSection):
    """`policy.*`: model, optimizer, sampling."""

    model_name: Text
    """Folder of a Hugging Face model; a label where `igrpo.model` describes a built-in one."""
    tokenizer: Tokenizer = key("The tokenizer, the model's own by default.")
    train_global_batch_size: Derivable
    """Rows per optimizer update; null derives it from `igrpo.updates_per_rollout`."""
    train_micro_batch_size: Positive
    """Rows of a micro-batch; `sequence_packing` counts tokens instead."""
    max_total_sequence_length: Positive
    """The context in tokens: prompt, draft and completion."""
    precision: Literal["bfloat16", "float32"]
    """Arithmetic on a GPU; master weights are float32."""
    max_grad_norm: PositiveFloat | None = key("Gradient clip; null is none.")
    optimizer: Optimizer = key("AdamW.")
    scheduler: list[dict[str, Any]] | None
    """PyTorch schedulers and milestones in steps; null derives them from `igrpo.schedule`."""
    sequence_packing: SequencePacking = key("Packing of the training rows.")
    generation: Generation = key("Sampling in training.")

    logprob_batch_size: Only[int] = only("Rows of a log-prob micro-batch.")
    logprob_chunk_size: Only[int] = only("Tokens per chunk of log-probs; null is all at once.")
    make_sequence_length_divisible_by: Only[int] = only("Row lengths are padded to its multiple.")
    hf_config_overrides: Only[Open] = only("Overrides of the Hugging Face model config.")
    dtensor_cfg: Open | None = only(
        "DTensor (FSDP2) training backend; the embedded engine reads `activation_checkpointing`."
    )
    megatron_cfg: Only[Open] = only("Megatron-Core training backend.")
    dynamic_batching: Only[Open] = only("Micro-batches of similar lengths.")
    draft: Only[Open] = only("Speculative-decoding draft model, unrelated to iGRPO's drafts.")

    @property
    def megatron(self) -> Open:
        """`megatron_cfg`, empty where it is not given."""
        return self.megatron_cfg or {}

    @property
    def dtensor(self) -> Open:
        """`dtensor_cfg`, empty where it is not given."""
        return self.dtensor_cfg or {}

    @property
    def dynamic(self) -> Open:
        """`dynamic_batching`, empty where it is not given."""
        return self.dynamic_batching or {}


@with_nemo_only
class Dataset(Section):
    """`data.train` and `data.validation`: one set of problems."""

    dataset_name: Text
    """`arithmetic`, `jsonl`, a named set, or a function of your own, `module:name`."""
    data_path: str | None = key("File of the problems, one JSON object a line.", None)
    input_key: str | None = key("Key of the question; null tries the usual names.", None)
    output_key: str | None = key("Key of the answer; null tries the usual names.", None)
    subset: str | None = key("Configuration of a Hugging Face data set.", None)
    split: str | None = key("Split of a Hugging Face data set.", None)
    split_validation_size: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Share of the training problems held out where there is no validation set."""
    seed: NonNegative | None = None
    """Seed of the held-out share, of a subset and of generated problems."""
    num_problems: Positive | None = None
    """Problems to take (a seeded subset) or to generate; null takes all."""
    weight: PositiveFloat | None = None
    """Share of a mixture's problems, relative to the other sets' weights; null takes all once."""
    drop_duplicates: bool = key("Leaves out questions that the set holds already.", False)
    drop_overlap: bool = key("Leaves out questions that stand in an evaluation set.", False)
    lengths: list[Positive] | None = key("Operations in a chain of the generated arithmetic.", None)


def _kind(train: Any) -> str:
    return TAGS[isinstance(train, list)]


TAGS = ("one set", "several sets")
Sets = Annotated[
    Annotated[Dataset, Tag(TAGS[0])] | Annotated[list[Dataset], Tag(TAGS[1])], Discriminator(_kind)
]
"""NeMo-RL's form: a set, or a list of them."""


@with_nemo_only
class Data(Section):
    """`data.*`: the problems."""

    max_input_seq_length: Positive = key("Tokens of q at most; q' is bounded by the context alone.")
    shuffle: bool = key("Shuffles the problems of each epoch.")
    train: Sets = key("Problems to train on; a list of sets is a mixture.")
    validation: Dataset | None = key("Held-out problems.", None)

    num_workers: Only[int] = only("Data loader workers.")
    default: Only[Open] = only("Settings that the data sets share.")

    @property
    def train_sets(self) -> list[Dataset]:
        """The sets of `train`, one of them or several."""
        return self.train if isinstance(self.train, list) else [self.train]

    @property
    def only_set(self) -> Dataset | None:
        """The set of `train` where it is no mixture."""
        return None if isinstance(self.train, list) else self.train

    @property
    def generated(self) -> Dataset | None:
        """The one set of generated problems, None where others are trained on."""
        train = self.only_set
        return train if train and train.dataset_name in TASKS else None


class MathEnv(Section):
    """`env.math`: the verifier."""

    num_workers: NonNegative
    """Processes that compare answers; 0 compares in the process itself, without a time limit."""
    item_timeout_s: Seconds = 5.0
    """Seconds for one answer; then its process is killed and the reason is `timeout`."""
    group_deadline_s: Seconds = 60.0
    """Seconds for one batch of answers; then what is missing is a `timeout`."""
    memory_limit_mb: Positive = key("Address space of a process, in MB.", 1024)
    verifier_type: str | None = key("NeMo-RL's verifier.", None)
    math_verify_impl: str | None = key("NeMo-RL's math-verify flavour.", None)
    stop_strings: list[str] | None = key("NeMo-RL's stop strings of the environment.", None)


class Env(Section):
    """`env.*`: environments."""

    math: MathEnv = key("The math verifier.")


@with_nemo_only
class Checkpointing(HostSection):
    """`checkpointing.*`."""

    enabled: bool = key("Saves checkpoints.")
    checkpoint_dir: Text = key("Folder of the checkpoints.")
    metric_name: str | None
    """`val:` or `train:` and a metric, by which checkpoints are ranked; null ranks by step."""
    higher_is_better: bool = key("Which end of the metric is best.")
    keep_top_k: Positive | None = key("Checkpoints kept, best first; null keeps all.")
    save_period: Positive = key("Steps between checkpoints.")
    checkpoint_must_save_by: Annotated[str, Field(pattern=r"^\d+:\d+:\d+:\d+$")] | None = None
    """Time of training, `DD:HH:MM:SS`, within which a run saves and stops; null is no limit."""

    save_optimizer: Only[bool] = only(
        "Keeps the optimizer state, as the embedded engine always does."
    )
    model_save_format: Only[str] = only("`safetensors` or `torch_save` with DTensor v2, else null.")
    save_consolidated: Only[bool] = only("One consolidated file for Hugging Face.")


class Wandb(HostSection):
    """`logger.wandb`."""

    project: str | None = key("Project.", None)
    name: str | None = key("Name of the run.", None)
    entity: str | None = key("Team or user.", None)


class MLflow(HostSection):
    """`logger.mlflow`."""

    experiment_name: str | None = key("Experiment.", None)
    run_name: str | None = key("Name of the run.", None)
    run_id: str | None = key("An existing run to continue.", None)
    tracking_uri: str | None = key("Server or folder; null is MLflow's own default.", None)
    artifact_location: str | None = key("Where artifacts go.", None)


@with_nemo_only
class Logger(HostSection):
    """`logger.*`."""

    log_dir: Text = key("The run folder.")
    tensorboard_enabled: bool = key("Writes TensorBoard events.")
    wandb_enabled: bool = key("Logs to Weights & Biases.")
    wandb: Wandb = key("Its project and name.")
    mlflow_enabled: bool = key("Logs to MLflow.")
    mlflow: MLflow = key("Its experiment and server.")
    num_val_samples_to_print: NonNegative = key("Validation samples shown on the terminal.")

    tensorboard: Only[Open] = only("TensorBoard's own `log_dir`.")


@with_nemo_only
class Cluster(HostSection):
    """`cluster.*`."""

    gpus_per_node: NonNegative = key("GPUs of a node.")
    num_nodes: Positive = key("Nodes.")
