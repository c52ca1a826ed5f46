"""The section `igrpo.*`: what this project adds to NeMo-RL's keys.

A new key is one line here; with a default it needs no line elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from igrpo_nemo.by_path import function_at
from igrpo_nemo.config.section import (
    Derivable,
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
from igrpo_nemo.errors import UserError
from igrpo_nemo.feedback import feedback_class
from igrpo_nemo.rewards.custom import component_name

LOCAL_ONLY = object()
"""Marks a key that only the embedded engine reads."""


class PromptTexts(Section):
    """`igrpo.prompt`: the fixed texts around problem and draft."""

    system: str = key("System prompt of both stages; empty is none.")
    draft_intro: str = key("What stands between the problem and the draft in q'.")
    draft_tag: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
    """Tag around the draft in q'."""


def _known_functions(weights: dict[str, float]) -> dict[str, float]:
    names: list[str] = []
    for path in weights:
        try:
            function_at(path)
        except UserError as error:
            raise ValueError(f"has {path}, which {error}") from error
        names.append(component_name(path))
    taken = ("accuracy", "format", "judge", "reason", "verifier")
    if twice := [name for name in names if name in taken or names.count(name) > 1]:
        raise ValueError(f"has a function {twice[0]}, a name that is taken: give it another")
    return weights


class RewardWeights(Section):
    """`igrpo.reward`: a weight for each part of the reward, for selection and advantage alike."""

    accuracy: NonNegativeFloat = key("Weight of a correct answer.")
    format: NonNegativeFloat = key("Weight of `<think>...</think><answer>...</answer>`.")

    judge: NonNegativeFloat = 0.0
    """Weight of the generative judge's score (Table 3), described in `igrpo.judge`."""

    custom: Annotated[dict[str, NonNegativeFloat], AfterValidator(_known_functions)] | None = None
    """Weights of functions of your own, `{module:function: 1.0}`; docs/rewards.md."""

    @property
    def functions(self) -> tuple[str, ...]:
        """The paths in `custom` that have a weight."""
        return tuple(path for path, weight in (self.custom or {}).items() if weight)

    @property
    def weights(self) -> dict[str, float]:
        """The components that have a weight; a function's is known by the function's name."""
        own = {component_name(path): weight for path, weight in (self.custom or {}).items()}
        every = {"accuracy": self.accuracy, "format": self.format, "judge": self.judge, **own}
        return {name: weight for name, weight in every.items() if weight}

    @property
    def best(self) -> float:
        """The reward of a completion that has 1 in every part."""
        return sum(self.weights.values())


class JudgeKeys(Section):
    """`igrpo.judge`: a model behind an OpenAI-compatible endpoint; the key is never in a config."""

    model: str = key("The judge's name at its endpoint.")
    base_url: str | None = key("The endpoint; null is the client's default.", None)
    api_key_env: Annotated[str, Field(pattern=r"^[A-Z][A-Z0-9_]*$")] = "OPENAI_API_KEY"
    """The environment variable that holds the key."""
    cache_path: str | None = None
    """File of the scores that are kept between runs; null keeps them in the run folder."""
    concurrency: Positive = key("Requests at a time.", 16)
    attempts: Positive = key("Requests for one completion at most.", 8)
    attempt_timeout_s: PositiveFloat = key("Seconds for one request.", 30.0)
    item_deadline_s: Seconds = key("Seconds for one completion, retries included.", 120.0)
    group_deadline_s: Seconds = 300.0
    """Seconds for one batch; then the rule-based verdict stands in, and is counted."""
    temperature: NonNegativeFloat | None = 0.0
    """Temperature; null is not sent, for models that refuse it."""
    max_tokens: Positive | None = 1024
    """Tokens of a reply at most; null is not sent, for models that refuse it."""
    max_completion_tokens: Positive | None = None
    """The same for a reasoning model, whose reasoning counts; null is not sent."""
    reasoning_effort: str | None = None
    """How long a reasoning model thinks, such as `low`; null is not sent."""
    check: bool = True
    """Asks the judge once in `igrpo preflight` and before a job is submitted."""
    response_format: Literal["json_schema", "json_object", "none"] = "json_schema"
    """Structured output of the endpoint."""
    prompt_price: NonNegativeFloat = 0.0
    """Price of a million prompt tokens, for the cost counter."""
    completion_price: NonNegativeFloat = 0.0
    """Price of a million completion tokens, for the cost counter."""


class Schedule(Section):
    """`igrpo.schedule`: the learning rate over the steps, where `policy.scheduler` is null."""

    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the steps over which the rate rises."""
    min_lr_ratio: Share = key("The last rate as a share of the peak.", 0.1)
    decay: Literal["cosine", "linear", "constant"] = key("How it falls.", "cosine")


class Validation(Section):
    """`igrpo.validation`: answers to the bare prompt, during training."""

    samples: Positive = 1
    """Answers a problem (k); above 1 the logs also have `val/avg_at_k` and `val/pass_at_k`."""
    temperature: Annotated[NonNegativeFloat, LOCAL_ONLY] = 0.6
    """Temperature; 0 is greedy. NeMo-RL takes 0 alone, and samples as in training otherwise."""
    top_p: Annotated[TopP, LOCAL_ONLY] = 0.95
    """Top-p; NeMo-RL's is that of training."""


class Entropy(Section):
    """`igrpo.entropy`."""

    exact: bool = True
    """Logs the exact entropy over the vocabulary (Eq. 7) beside the sampled estimate."""


class Warmup(Section):
    """`igrpo.warmup`: supervised warm-up of the small built-in model."""

    enabled: bool = key("Warms the built-in model up before training; cached between runs.", False)
    steps: Positive = key("Optimizer steps.", 400)
    batch_size: Positive = key("Demonstrations per step.", 128)
    lr: PositiveFloat = key("Peak learning rate.", 4e-3)
    seed: NonNegative = key("Seed of model, demonstrator and demonstrations.", 0)
    bare_share: Share = 0.5
    """Share of the steps, at the beginning, that show bare problems alone; then half are drafts."""
    shows: Literal["draft", "feedback"] = "draft"
    """What is shown then: the draft, or what `igrpo.feedback` makes of it."""
    broken_format: Share = key("Share of solutions in a broken format.", 0.05)


class SmallModel(Section):
    """`igrpo.model`: the shape of the small built-in model."""

    hidden_size: Positive = key("Width.")
    num_layers: Positive = key("Layers.")
    num_heads: Positive = key("Attention heads.")
    num_kv_heads: Positive = key("Key and value heads; divides `num_heads`.")
    intermediate_size: Positive = key("Width of the feed-forward part.")
    vocab_size: Positive = key("Tokens of its tokenizer.")
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary frequencies; small for short sequences."""
    initializer_range: PositiveFloat = key("Standard deviation of the initial weights.", 0.02)


class Architecture(Section):
    """`igrpo.architecture`: what preflight and evaluation know of a model without its weights."""

    model_type: Literal["qwen2", "llama", "nemotron_h"] = key("Family.")
    hidden_size: Positive = key("Width.")
    num_hidden_layers: Positive = key("Layers of any kind.")
    num_attention_heads: Positive = key("Attention heads.")
    num_key_value_heads: Positive = key("Key and value heads.")
    head_dim: Positive | None = None
    """Width of a head; null is hidden_size / num_attention_heads."""
    intermediate_size: Positive = key("Width of a feed-forward layer.")
    vocab_size: Positive = key("Rows of the embedding.")
    max_position_embeddings: Positive = key("Context in tokens.")
    tie_word_embeddings: bool = key("Embedding and output projection are one matrix.", False)
    attention_bias: bool = key("Query, key and value projections have a bias.", False)
    rope_theta: PositiveFloat | None = key("Base of the rotary frequencies.", None)
    hybrid_override_pattern: Annotated[str, Field(pattern=r"^[-M*E]+$")] | None = None
    """Nemotron-H: a letter a layer, M for Mamba-2, * for attention, - for feed-forward."""
    mamba_num_heads: Positive | None = key("Nemotron-H: heads of a Mamba-2 layer.", None)
    mamba_head_dim: Positive | None = key("Nemotron-H: width of such a head.", None)
    n_groups: Positive | None = key("Nemotron-H: groups of B and C.", None)
    ssm_state_size: Positive | None = key("Nemotron-H: state per channel.", None)
    conv_kernel: Positive | None = key("Nemotron-H: width of the causal convolution.", None)


BenchmarkName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]*$")]


class Evaluation(Section):
    """`igrpo.evaluation`: read by the pipelines and the preflight."""

    benchmarks: Annotated[dict[BenchmarkName, Positive], Field(min_length=1)] = {
        "aime24": 64,
        "aime25": 64,
        "math-500": 8,
        "amc23": 8,
        "gsm8k": 8,
        "minerva_math": 8,
    }
    """Samples per problem by benchmark, under NeMo-Skills' names."""
    temperature: NonNegativeFloat = key("Temperature; 0 is greedy.", 0.6)
    top_p: TopP = key("Top-p.", 0.95)
    max_tokens: Positive = 65_000
    """Tokens of a reply at most; a model whose context is smaller gets context minus prompt."""
    profile: Literal["answer_tags", "boxed"] = "answer_tags"
    """Where the answer stands: `<answer>` tags (models trained here) or `\\boxed{}` (baselines)."""
    server_gpus: Positive = key("GPUs of the inference server.", 8)


Fraction = Annotated[float, Field(gt=0, le=1)]


class Preflight(Section):
    """`igrpo.preflight`: read by `igrpo preflight` alone.

    The shares and the overhead are those with which the roofline comes within 15 % of every dense
    bf16 run on NeMo-RL's performance page (`docs/about/performance-summary.md` of v0.5.0, H100).
    """

    response_share: Fraction = 0.4
    """Mean tokens of a completion, as a share of `policy.generation.max_new_tokens`."""
    response_sigma: NonNegativeFloat = 0.8
    """Spread of the log-normal lengths of completions, before they are cut at the limit."""
    train_mfu: Fraction = 0.4
    """Share of the GPU's bf16 peak that training reaches, recomputation counted as work."""
    prefill_mfu: Fraction = 0.5
    """Share of the GPU's bf16 peak that prefill and log-prob passes reach."""
    decode_bandwidth: Fraction = 0.5
    """Share of the GPU's memory bandwidth that decoding reaches."""
    decode_overhead_ms: NonNegativeFloat = 3.0
    """Milliseconds of a decoding step beside its memory traffic: scheduling, sampling, launches."""
    memory_reserve: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of a GPU's memory that is kept free for the allocator's fragmentation."""
    refit_gb_per_s: PositiveFloat = 10.0
    """Gigabytes of weights a second from the trainer to the inference engine."""


def _known(find: Callable[[str], object]) -> AfterValidator:
    """Of a name that `find` finds; its `UserError` goes on from the value."""

    def check(name: str | None) -> str | None:
        try:
            if name is not None:
                find(name)
        except UserError as error:
            raise ValueError(str(error)) from error
        return name

    return AfterValidator(check)


SECRET_NAMES = re.compile(
    r"TOKEN(?!S|IZ)|SECRET|PASSWORD|CREDENTIAL|(^|_)KEY($|_)|API_?KEY", re.IGNORECASE
)
"""Environment variables with such a name are handed on by the shell, never by a config."""

TimeLimit = Annotated[
    str, Field(pattern=r"^(\d+-)?\d{1,2}:\d{2}:\d{2}$", description="HH:MM:SS or D-HH:MM:SS")
]
Mount = Annotated[str, Field(pattern=r"^[^:,\s]+:[^:,\s]+(:(ro|rw))?$")]
"""SOURCE:DESTINATION, or SOURCE:DESTINATION:ro."""
SbatchOption = Annotated[str, Field(pattern=r"^-[^\n\r]*$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


def _without_secrets(variables: dict[str, str]) -> dict[str, str]:
    for name in variables:
        if SECRET_NAMES.search(name):
            raise ValueError(
                f"names {name}, which looks like a secret: export it in the shell, it is handed on"
            )
    return variables


def time_in_seconds(text: str) -> int:
    """Seconds of a time limit in the form HH:MM:SS or D-HH:MM:SS."""
    days, _, clock = text.rpartition("-")
    hours, minutes, seconds = (int(part) for part in clock.split(":"))
    return 86400 * int(days or 0) + 3600 * hours + 60 * minutes + seconds


class Site(Section):
    """`igrpo.site`: read by `igrpo launch`, `igrpo preflight` and the pipelines."""

    gpu: Literal["cpu", "rtx_4090_24gb", "l40s_48gb", "a100_40gb", "a100_80gb", "h100_80gb"] = "cpu"
    """The kind of GPU, for memory and speed estimates and TORCH_CUDA_ARCH_LIST."""
    account: Text | None = key("Slurm account.", None)
    partition: Text | None = key("Slurm partition.", None)
    qos: Text | None = key("Slurm quality of service.", None)
    constraint: Text | None = key("Slurm node features.", None)
    reservation: Text | None = key("Slurm reservation.", None)
    time: TimeLimit | None = None
    """Time limit of a job, HH:MM:SS or D-HH:MM:SS; null is the script's own."""
    save_margin_s: Positive = 900
    """Seconds before the time limit at which a run saves and stops."""
    cpus_per_node: Positive | None = key("CPU cores of a node; null detects them.", None)
    container: Text | None = key("Container image for pyxis; null runs on bare metal.", None)
    mounts: list[Mount] = key("Container mounts, SOURCE:DESTINATION[:ro].", [])
    venv: Text | None = None
    """Virtual environment for bare metal; null is the checkout's .venv."""
    hf_home: Text | None = key("Hugging Face's folder of models and data sets (HF_HOME).", None)
    interface: Text | None = None
    """Network interface of Ray's addresses, such as ib0; null: the one that reaches the head."""
    offline: bool = True
    """Compute nodes do not ask the hub (HF_HUB_OFFLINE, TRANSFORMERS_OFFLINE, WANDB_MODE)."""
    env: Annotated[dict[VariableName, str], AfterValidator(_without_secrets)] = {}
    """Further environment variables, such as NCCL_SOCKET_IFNAME; no secrets."""
    max_restarts: NonNegative = key("A job that was requeued this often is not requeued again.", 50)
    sbatch: list[SbatchOption] = []
    """Further options of sbatch, which win over all others, such as `--gres=gpu:8`."""


class IGRPO(Section):
    """`igrpo.*`: the two stages."""

    engine: Literal["local", "nemo_rl", "nemo_rl_local"]
    """What runs the training: the embedded engine, NeMo-RL, or NeMo-RL's loop on this machine."""
    feedback: Annotated[str, _known(feedback_class)]
    """What Stage 2 sees and what is trained: one of configs/feedback, or `module:Class`."""
    feedback_options: dict[str, Any] = {}
    """Options of that feedback; docs/method.md has those of each."""
    num_drafts: Positive = key("Drafts per problem in Stage 1 (N).")
    num_refinements: Positive = key("Refinements per problem in Stage 2 (G).")
    budget: Derivable
    """Completions per problem: N + G, GRPO's group with feedback `none`; null adds N and G."""
    train_stages: Annotated[list[Literal["draft", "refine"]], Field(min_length=1)]
    """Which stages' rows are trained; [refine] is the paper's."""
    updates_per_rollout: Derivable
    """Optimizer updates per step; null is 1, or follows `policy.train_global_batch_size`."""
    draft_choice: Literal["best", "random", "worst", "none"]
    """Which draft is shown: the best (Eq. 2) or a control."""
    tie_break: Literal["first", "random"] = key("Which of several best drafts.")
    on_all_zero: Literal["condition", "skip", "no_draft"]
    """Where every draft earned 0: show one all the same, skip the problem, show none."""
    draft_content: Literal["full", "answer", "reasoning"]
    """What of the draft is shown: all, what follows its thinking, all before its final answer."""
    draft_truncation: Literal["tail", "head_tail"]
    """What is kept of a draft that is too long."""
    draft_dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of Stage 2 prompts that show no draft."""
    rank_truncated_last: bool = key("Ranks truncated drafts below finished ones of equal reward.")
    advantage_delta: NonNegativeFloat = key("Added to the standard deviation in Eq. 4.")
    constant_length_divisor: Positive | None
    """Divides the summed token losses of a row instead of its length (Dr. GRPO)."""
    objective: Annotated[str | None, _known(function_at)] = None
    """An objective of your own, `module:function`, in the place of the clipped ratio."""
    shaping_gamma: PositiveFloat | None = None
    """gamma of p / (p + gamma), the objective of rows trained outside the context that they were
    sampled under (Critique-GRPO); null gives them the ratio of all others."""
    curriculum_keep: Share | None = None
    """Share that an epoch keeps of the problems which were always or never solved when they were
    last sampled; 0 drops them, null keeps all."""
    drop_overlong_prompts: bool = True
    """Leaves problems out whose q is longer than `data.max_input_seq_length`."""
    prompt: PromptTexts = key("The fixed texts.")
    reward: RewardWeights = key("Weights of the reward's parts.")
    judge: JudgeKeys | None = None
    """The generative judge; needed where `igrpo.reward.judge` is above 0."""
    schedule: Schedule = key("The learning rate over the steps.", Schedule())
    entropy: Entropy = key("Entropy logging.", Entropy())
    draft_prefetch: Literal["off", "fused"] = "off"
    """Samples the next step's drafts beside this step's refinements, one update behind."""
    validation: Validation = key("How answers are sampled in validation.", Validation())
    val_draft_conditioned: bool = key("Also validates on q' and logs the gap to q.", False)
    stall_alarm_s: NonNegativeFloat = 600.0
    """Seconds after which a warning names what a rollout waits for, and again after as many; 0 is
    never."""
    sample_table_period: NonNegative = key("Steps between sample tables; 0 is never.", 10)
    row_dump_period: NonNegative = 0
    """Steps between NeMo-RL's dumps of all trained rows; 0 is never."""
    threads: Positive | None = key("CPU threads; null leaves it to PyTorch.", None)
    model: SmallModel | None = key("A small built-in model instead of a Hugging Face folder.", None)
    warmup: Warmup = key("Warm-up of the built-in model.", Warmup())
    architecture: Architecture | None = None
    """The model's shape, for preflight and evaluation; null reads it from the model's folder."""
    evaluation: Evaluation = key("How the trained model is measured.", Evaluation())
    preflight: Preflight = key("What the preflight assumes.", Preflight())
    site: Site = key("The machines and the account.", Site())
