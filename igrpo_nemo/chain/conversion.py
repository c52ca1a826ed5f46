"""A checkpoint as a Hugging Face folder, which evaluation and vLLM load.

    Hugging Face already       --> RUN/hf/NAME, a link: nothing is converted
    Megatron-Core, DTensor     --> NeMo-RL's converter in its own environment --> RUN/hf/NAME
    DTensor's adapters         --> merged into the model that they were trained on --> RUN/hf/NAME

The folder appears under its name once it is whole. Its stamp lies in RUN/stages.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from igrpo_nemo.chain.adapters import merge_adapters
from igrpo_nemo.chain.checkpoints import (
    Checkpoint,
    Form,
    find_checkpoint,
    is_hugging_face,
)
from igrpo_nemo.chain.experiment import model_folder, training_inputs
from igrpo_nemo.chain.script import run_to_its_end
from igrpo_nemo.config.compose import written_values
from igrpo_nemo.config.section import at
from igrpo_nemo.errors import UserError
from igrpo_nemo.files.atomic import write_or_refuse
from igrpo_nemo.nemo.converted_model import FIRST, VARIABLE, converted_folder, is_whole
from igrpo_nemo.nemo.processes import MEGATRON_WORKER, environments_of, source_tree
from igrpo_nemo.run.folder import FINISHED, stored_config
from igrpo_nemo.run.lock import alone_in
from igrpo_nemo.run.tokenizer import (
    chat_template_text,
    stored_chat_template,
    write_chat_template,
)

IMAGE_ROOT = Path("/opt/nemo-rl")
"""Where NVIDIA's image has NeMo-RL's source."""
CONVERTERS = Path("examples", "converters")


def convert(
    run: Path,
    which: str,
    *,
    gpus: int | None = None,
    python: str | None = None,
) -> Mapping[str, Any]:
    """Makes `model_folder(run, which)` unless it is there already; the `step` and `form` that it
    was made of.

    `gpus` shards the model over so many GPUs while it is converted. Raises `UserError` for a run
    that is not finished (but for a step that is named), for a model of another training or step
    (never a silent reuse), for a conversion that fails, and while another one is at work here.
    """
    if not which.isdecimal() and not (run / FINISHED).exists():
        raise UserError(
            f"{run} is not finished: train on, or convert a step as it is with --checkpoint N"
        )
    checkpoint, target = find_checkpoint(run, which), model_folder(run, which)
    step = checkpoint.step
    if made := _made_before(run, which, step):
        return made
    with alone_in(target.parent, "wait until that conversion ends"):
        if made := _made_before(run, which, step):  # another process was faster
            return made
        if target.is_symlink() or target.exists():
            raise UserError(f"{target} is there without a stamp: remove it to convert again")
        _make(checkpoint, target, gpus, python)
        made = {"step": step, "form": checkpoint.form.value}
        stamp = {"stage": "convert", "inputs": _inputs(run, which, step), "outputs": made}
        text = json.dumps(stamp, indent=1, sort_keys=True, default=str)
        write_or_refuse(_stamp(run, which), text)
    return made


def is_converted(run: Path, which: str) -> bool:
    """Whether `model_folder` is there, made from the run as it is, whatever step that was.

    Raises `UserError` where it was made from another training.
    """
    return _made_before(run, which, None) is not None


def _inputs(run: Path, which: str, step: int | None) -> dict[str, Any]:
    """What a model is made of, as JSON would be read back: the run's config says what shaped its
    weights, whoever asks for them."""
    inputs = {**training_inputs(stored_config(run)), "checkpoint": which, "checkpoint.step": step}
    return json.loads(json.dumps(inputs, default=str))


def _stamp(run: Path, which: str) -> Path:
    return run / "stages" / f"convert-{which}.json"


def _made_before(run: Path, which: str, step: int | None) -> Mapping[str, Any] | None:
    """What the stamp tells of a model that is there; None where it is to be made.

    Raises `UserError` for a broken stamp, and naming the first input that is another one now; with
    None for `step` any will do.
    """
    path, result = _stamp(run, which), model_folder(run, which)
    try:
        stamp = json.loads(path.read_text(encoding="utf-8"))
        before, made = dict(stamp["inputs"]), stamp["outputs"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is no stamp of a stage ({error}): remove it") from error
    if not result.exists():
        return None
    now = _inputs(run, which, before.get("checkpoint.step") if step is None else step)
    for name in sorted({*before, *now}):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{result} was made with {name}={before.get(name)!r}, now it is "
                f"{now.get(name)!r}: remove {result} to make it again, or choose another "
                "logger.log_dir"
            )
    return made


def find_converter(form: Form, python: str | None = None) -> tuple[Path, tuple[str, ...]]:
    """NeMo-RL's source tree, and the command of an interpreter that has its packages, with
    Megatron-Core's where they are needed. Raises `UserError` saying what is missing."""
    named = [Path(os.environ["NEMO_RL_SRC"]).expanduser()] if os.environ.get("NEMO_RL_SRC") else []
    named += filter(None, [source_tree()])
    roots = [each.resolve() for each in [*named, IMAGE_ROOT] if (each / CONVERTERS).is_dir()]
    if not roots:
        raise UserError(
            "NeMo-RL's examples/converters are not found: run this where NeMo-RL is installed "
            "(its container), or set NEMO_RL_SRC to its source tree"
        )
    root = roots[0]
    if python is not None:
        return root, tuple(shlex.split(python))
    needed = "megatron.bridge" if form is Form.MEGATRON else "nemo_rl"
    # Of a module inside a package, the package is asked for first: it would be imported.
    if all(importlib.util.find_spec(name) for name in (needed.partition(".")[0], needed)):
        return root, (sys.executable,)
    # The environment with Megatron-Core that NeMo-RL makes for its workers, and its image carries.
    folder = environments_of(root, os.environ)
    if folder and (worker := folder / MEGATRON_WORKER / "bin" / "python").is_file():
        return root, (str(worker),)
    if shutil.which("uv"):
        return root, ("uv", "run", *(["--extra", "mcore"] * (form is Form.MEGATRON)), "python")
    raise UserError(
        f"no Python with {needed} is found to convert with: give its command with --python"
    )


def conversion_command(
    checkpoint: Checkpoint, target: Path, root: Path, gpus: int | None = None
) -> list[str]:
    """The words behind `python` that run NeMo-RL's converter (examples/converters, v0.7.0)."""
    scripts = root / CONVERTERS
    config = ["--config", str(checkpoint.folder.resolve() / "config.yaml")]
    weights, out = str(checkpoint.weights.resolve()), ["--hf-ckpt-path", str(target.absolute())]
    if checkpoint.form is Form.DCP:
        return [str(scripts / "convert_dcp_to_hf.py"), *config, "--dcp-ckpt-path", weights, *out]
    policy = _policy(checkpoint)
    if at(policy, "megatron_cfg.peft.enabled"):
        model = ["--hf-model-name", policy["model_name"]]
        paths = ["--base-ckpt", _base_checkpoint(policy, gpus), "--adapter-ckpt", weights]
        return [str(scripts / "convert_lora_to_hf.py"), *paths, *model, *out]
    paths = [*config, "--megatron-ckpt-path", weights, *out]
    if gpus is None:
        return [str(scripts / "convert_megatron_to_hf.py"), *paths]
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={gpus}"]
    return [*torchrun, str(scripts / "convert_megatron_to_hf_gpu.py"), *paths, "--tp", str(gpus)]


def _base_checkpoint(policy: Mapping[str, Any], gpus: int | None) -> str:
    """The model that Megatron-Core's adapters were trained on, in its own form. Raises `UserError`
    where this machine has none, or where it is to be sharded."""
    if gpus is not None:
        raise UserError(
            "NeMo-RL merges Megatron-Core's adapters in one process on the CPU: leave --gpus out"
        )
    converted = converted_folder(policy)
    if not is_whole(converted):
        raise UserError(
            f"{converted / FIRST} is not here, into which NeMo-RL merges Megatron-Core's adapters: "
            f"convert where the run was trained, or set {VARIABLE}"
        )
    return str(converted / FIRST)


def check_convertible(config: Any) -> None:
    """Refuses, before anything is trained, checkpoints that nothing can convert afterwards.

    NeMo-RL's DTensor v2 policy writes safetensors shards by default, without the .metadata file
    that its converter reads.
    """
    dtensor = config.policy.dtensor_cfg or {}
    if config.igrpo.engine != "nemo_rl" or not (dtensor.get("enabled") and dtensor.get("_v2")):
        return
    saved = config.checkpointing
    if at(dtensor, "lora_cfg.enabled"):
        return
    if (saved.model_save_format or "safetensors") == "safetensors" and not saved.save_consolidated:
        raise UserError(
            "checkpointing.save_consolidated is false: DTensor's safetensors shards cannot be "
            "converted for evaluation, set checkpointing.save_consolidated=true"
        )


def _make(checkpoint: Checkpoint, target: Path, gpus: int | None, python: str | None) -> None:
    """The folder: a link to the weights, or made beside it and renamed once it is whole.

    A made one gets the tokenizer that was trained with, over the base model's, and its chat
    template. One that stands in the config alone is in no tokenizer that a converter writes:
    NeMo-RL's Megatron-Core worker saves none, and the converters take the base model's.
    """
    partial, weights = target.with_name(f".{target.name}.partial"), checkpoint.weights.resolve()
    saved = checkpoint.folder / "policy" / "tokenizer"
    has_tokenizer = not saved.is_dir() or (
        (weights / "tokenizer_config.json").is_file()
        and stored_chat_template(weights) == stored_chat_template(saved)
    )
    try:
        if checkpoint.form is Form.HUGGING_FACE and has_tokenizer:
            target.symlink_to(os.path.relpath(weights, target.parent.resolve()))
            return
        shutil.rmtree(partial, ignore_errors=True)
        if checkpoint.form is Form.HUGGING_FACE:
            # File by file: DTensor's consolidated folders have no tokenizer.
            partial.mkdir()
            for file in weights.iterdir():
                if not (saved / file.name).exists():
                    (partial / file.name).symlink_to(os.path.relpath(file, partial.resolve()))
        elif checkpoint.form is Form.ADAPTERS:
            merge_adapters(weights, _policy(checkpoint)["model_name"], partial)
        else:
            _run_converter(checkpoint, partial, gpus, python)
        if saved.is_dir():
            shutil.copytree(saved, partial, dirs_exist_ok=True)
        configured = at(_policy(checkpoint), "tokenizer.chat_template")
        if template := stored_chat_template(saved) or chat_template_text(configured):
            write_chat_template(partial, template)
        if missing := missing_files(partial):
            raise UserError(f"the converter left {partial} without {', '.join(missing)}")
        partial.rename(target)
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


def _run_converter(
    checkpoint: Checkpoint, folder: Path, gpus: int | None, python: str | None
) -> None:
    root, interpreter = find_converter(checkpoint.form, python)
    command = [*interpreter, *conversion_command(checkpoint, folder, root, gpus)]
    print(f"convert: {shlex.join(command)}", flush=True)
    paths = [str(root), os.environ.get("PYTHONPATH")]
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if code := run_to_its_end(command, cwd=root, environ=environ):
        raise UserError(f"NeMo-RL's converter ended with exit code {code}: see its lines above")


def _policy(checkpoint: Checkpoint) -> dict[str, Any]:
    """The section `policy` of the checkpoint's config; empty where it has none."""
    config = checkpoint.folder / "config.yaml"
    return (written_values(config) if config.is_file() else {}).get("policy") or {}


def missing_files(folder: Path) -> list[str]:
    """What a Hugging Face folder lacks to be loaded: config, weights, or shards of its index."""
    if not is_hugging_face(folder):
        return ["config.json or weights"]
    named: set[str] = set()
    for index in folder.glob("*.index.json"):
        named |= set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return sorted(name for name in named if not (folder / name).is_file())
