"""Low-rank adapters of DTensor merged into the model that they were trained on.

    BASE/*.safetensors + (alpha / r) B A   --> TARGET/*.safetensors, the other files copied

NeMo-RL merges them likewise on the way to vLLM (`_maybe_merge_lora_weight` of its DTensor v2
worker), and has no converter for the folder that Automodel saves: adapter_model.safetensors and
adapter_config.json, in the form of the package peft.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from igrpo_nemo.errors import UserError
from igrpo_nemo.files import model_folder

WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


def merge_adapters(adapters: Path, base: str, target: Path) -> None:
    """Writes the merged model to the folder `target`, in the types of `base`, shard by shard.

    `base` is a folder, or a name in Hugging Face's cache. Raises `UserError` where it is not there,
    and where an adapter belongs to no tensor of it.
    """
    import torch
    from safetensors.torch import load_file, save_file

    settings = json.loads((adapters / SETTINGS).read_text(encoding="utf-8"))
    if settings.get("use_dora"):
        raise UserError(f"{adapters} holds DoRA adapters, which cannot be merged here: use LoRA")
    scale = settings["lora_alpha"] / settings["r"]
    parts = load_file(adapters / WEIGHTS)
    left = {
        name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        for name in parts
        if name.endswith(".lora_A.weight")
    }
    source = model_folder(base)
    if source is None or not any(source.glob("*.safetensors")):
        raise UserError(
            f"{base} is no folder with *.safetensors, nor in Hugging Face's cache here: adapters "
            "are merged into the model that they were trained on"
        )
    target.mkdir(parents=True)
    for file in sorted(path for path in source.iterdir() if path.is_file()):
        if file.suffix != ".safetensors":
            shutil.copy(file, target / file.name)
            continue
        tensors = load_file(file)
        for name in left & {name.removesuffix(".weight") for name in tensors}:
            a, b = (parts[f"{_PREFIX}{name}.lora_{part}.weight"].float() for part in "AB")
            weight = tensors[f"{name}.weight"]
            tensors[f"{name}.weight"] = torch.addmm(weight.float(), b, a, alpha=scale).to(
                weight.dtype
            )
            left.remove(name)
        save_file(tensors, target / file.name, {"format": "pt"})
    if left:
        raise UserError(
            f"{base} has no {sorted(left)[0]}.weight, which {adapters} changes: put the model back "
            "that they were trained on"
        )
