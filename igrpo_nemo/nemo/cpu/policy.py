"""The embedded engine's model behind NeMo-RL's policy interface: the real loop on one machine.

    grpo_train ─ get_logprobs, train(data, loss_fn) ─> padded forward passes, NeMo-RL's loss
               ─ generate, generate_async ───────────> generation
    grpo_train_sync ─ keys of rows (KVBatchMeta) ────> DataPlanePolicy reads them, trains

Policy and generation are one object with one set of weights, so a refit has nothing to move; where
generation runs in a process of its own (`remote`), a refit sends the weights there.
Shape legend: R rows, T tokens (prompt and completion, padded on the right), V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from nemo_rl.algorithms.loss.interfaces import LossFunction, LossInputType
from nemo_rl.data_plane import KVBatchMeta, build_data_plane_client
from nemo_rl.data_plane.schema import DP_TRAIN_FIELDS, LP_SEED_FIELDS
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.distributed.named_sharding import NamedSharding
from nemo_rl.models.generation.interfaces import GenerationInterface
from nemo_rl.models.policy.interfaces import ColocatablePolicyInterface
from nemo_rl.models.policy.tq_policy import TQPolicy
from torch import Tensor

from igrpo_nemo.local.model import load_weights, reference_of, save_pretrained_folder
from igrpo_nemo.local.optimizer import build_optimizer, build_scheduler, restore_training
from igrpo_nemo.nemo.cpu.generation import LocalGeneration, OneMachine, RemoteGeneration, policy_of
from igrpo_nemo.nemo.loss import next_token_logprobs

_STATE_FILE = "state.pt"
_REFERENCE = "reference_policy_logprobs"
_WHOLE = ("lr", "wd", "global_valid_seqs", "global_valid_toks")


class LocalPolicy(OneMachine, ColocatablePolicyInterface, GenerationInterface):
    """A Hugging Face model in this process, trained by NeMo-RL's loop with NeMo-RL's loss.

    `config` is NeMo-RL's `policy` section. A micro-batch has as many padded rows as
    `sequence_packing.train_mb_tokens` allow.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        *,
        seed: int,
        init_reference_model: bool = False,
        remote: RemoteGeneration | None = None,
    ) -> None:
        self.config = config
        self.cfg = config["generation"]
        self._policy = policy_of(config)
        self.model = self._policy.model
        self._reference = reference_of(self._policy) if init_reference_model else None
        kwargs = config["optimizer"]["kwargs"]
        self.optimizer = build_optimizer(self.model.parameters(), kwargs)
        self.scheduler = build_scheduler(self.optimizer, config.get("scheduler") or ())
        self._remote = remote
        self.generation = remote or LocalGeneration(self._policy, config, seed)
        # NeMo-RL asks how many replicas share a batch: one.
        self.sharding_annotations = NamedSharding(layout=[0], names=["data_parallel"])

    def restore(self, weights_path: Path | str, optimizer_path: Path | str | None) -> None:
        """Continues from what `save_checkpoint` wrote. A schedule that has changed since, because
        the run is to be longer, is stepped to where it would be by now."""
        load_weights(self.model, weights_path)
        if optimizer_path is not None:
            state = torch.load(Path(optimizer_path) / _STATE_FILE, weights_only=False)
            same = state.get("stages") == self.config.get("scheduler")
            restore_training(self.optimizer, self.scheduler, state, with_schedule=same)
            self.generation.version = state["version"]

    def train(
        self,
        data: BatchedDataDict,
        loss_fn: LossFunction,
        *,
        gbs: int | None = None,
        mbs: int | None = None,
        timer: Any = None,
    ) -> dict[str, Any]:
        """One optimizer step per global batch, in order; NeMo-RL's normalisation and metrics."""
        size = gbs or self.config["train_global_batch_size"]
        updates = data.size // size
        losses: list[float] = []
        metrics: dict[str, list[Any]] = defaultdict(list)
        grad_norm = torch.zeros(())
        for start in range(0, updates * size, size):
            loss, found, grad_norm = self._update(data.slice(start, start + size), loss_fn)
            losses.append(loss)
            for micro_batch in found:
                for name, value in micro_batch.items():
                    # As NeMo-RL's workers return them: its loop adds up over the micro-batches of
                    # all updates of a step, or takes the mean or the extreme of a few.
                    whole = name in _WHOLE or "_min" in name or "_max" in name
                    metrics[name].append(value if whole else value / updates)
        # NeMo-RL's workers advance the schedule once per call, not per global batch.
        self.scheduler.step()
        self.generation.change_version(self.generation.version + 1)
        return {
            "loss": torch.tensor(losses),
            "grad_norm": grad_norm,
            "all_mb_metrics": dict(metrics),
        }

    def _update(
        self, batch: Any, loss_fn: LossFunction
    ) -> tuple[float, list[dict[str, Any]], Tensor]:
        """One optimizer step: its loss, the metrics of its micro-batches, its gradient norm."""
        sequences = batch["sample_mask"].sum()
        tokens = (batch["token_mask"][:, 1:] * batch["sample_mask"][:, None]).sum()
        of_all = {
            "lr": self.scheduler.get_last_lr()[0],
            "wd": self.optimizer.param_groups[0].get("weight_decay", 0.0),
            "global_valid_seqs": float(sequences),
            "global_valid_toks": float(tokens),
        }
        self.optimizer.zero_grad(set_to_none=True)
        metrics, total = [], 0.0
        for part in self._micro_batches(batch):
            given = self._loss_input(part, loss_fn)
            loss, found = loss_fn(
                data=part, global_valid_seqs=sequences, global_valid_toks=tokens, **given
            )
            loss.backward()
            total += float(loss.detach())
            metrics.append(found | of_all)
        limit = self.config.get("max_grad_norm")
        grad_norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), float("inf") if limit is None else limit
        )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return total, metrics, grad_norm.detach().cpu()

    def _loss_input(self, part: Any, loss_fn: LossFunction) -> dict[str, Tensor]:
        logits_RTV = self._logits(self.model, part["input_ids"], part["input_lengths"])
        if loss_fn.input_type is LossInputType.LOGIT:
            return {"logits": logits_RTV}
        return {"next_token_logprobs": next_token_logprobs(logits_RTV, part["input_ids"])}

    def _logits(self, model: Any, input_ids_RT: Tensor, lengths_R: Tensor) -> Tensor:
        """Logits under the sampling temperature, [R, T, V] in fp32."""
        device = model.device
        positions_T = torch.arange(input_ids_RT.shape[1], device=device)
        mask_RT = (positions_T < lengths_R.to(device)[:, None]).long()
        with self._policy.autocast():
            logits_RTV = model(
                input_ids=input_ids_RT.to(device), attention_mask=mask_RT, use_cache=False
            ).logits
        return (logits_RTV.float() / self.cfg["temperature"]).to(input_ids_RT.device)

    def _micro_batches(self, data: Any) -> Iterator[Any]:
        width = data["input_ids"].shape[1]
        rows = max(1, self.config["sequence_packing"]["train_mb_tokens"] // width)
        for start in range(0, data.size, rows):
            yield data.slice(start, min(start + rows, data.size))

    @torch.no_grad()
    def _logprobs(self, model: Any, data: Any) -> Tensor:
        """[R, T]: the log-prob of each token, 0 for the first."""
        parts = []
        for part in self._micro_batches(data):
            logits_RTV = self._logits(model, part["input_ids"], part["input_lengths"])
            logprobs_RT = next_token_logprobs(logits_RTV, part["input_ids"])
            parts.append(torch.nn.functional.pad(logprobs_RT, (1, 0)))
        return torch.cat(parts)

    def get_logprobs(self, data: Any, timer: Any = None) -> BatchedDataDict:
        return BatchedDataDict({"logprobs": self._logprobs(self.model, data)})

    def get_reference_policy_logprobs(
        self, data: Any, micro_batch_size: int | None = None, timer: Any = None
    ) -> BatchedDataDict:
        if self._reference is None:
            raise RuntimeError("the reference policy is loaded only where a KL penalty is set")
        return BatchedDataDict({"reference_logprobs": self._logprobs(self._reference, data)})

    def generate(self, data: Any, greedy: bool = False) -> BatchedDataDict:
        return self.generation.generate(data, greedy)

    def _refit(self, *args: Any, **kwargs: Any) -> list[ray.ObjectRef]:
        """Sends the weights to where they are sampled from, if that is elsewhere."""
        return [] if self._remote is None else self._remote.receive(self.model.state_dict())

    stream_weights_via_ipc_zmq = broadcast_weights_for_collective = _refit

    async def generate_async(
        self, data: Any, greedy: bool = False
    ) -> AsyncGenerator[tuple[int, BatchedDataDict], None]:
        async for result in self.generation.generate_async(data, greedy):
            yield result

    def save_checkpoint(
        self,
        weights_path: str,
        optimizer_path: str | None = None,
        tokenizer_path: str | None = None,
        checkpointing_cfg: Any = None,
    ) -> None:
        """A Hugging Face folder at `weights_path`, optimizer and schedule beside it."""
        save_pretrained_folder(self.model, self._policy.tokenizer, weights_path)
        if tokenizer_path is not None:
            self._policy.tokenizer.save_pretrained(tokenizer_path)
        if optimizer_path is not None:
            state = {
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "stages": self.config.get("scheduler"),
                "version": self.generation.version,
            }
            Path(optimizer_path).mkdir(parents=True, exist_ok=True)
            torch.save(state, Path(optimizer_path) / _STATE_FILE)

    def get_free_memory_bytes(self) -> int:
        return 2**30

    def shutdown(self) -> bool:
        return True

    finalize_async_save = OneMachine._nothing

    def _absent(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("distillation and FP8 need NeMo-RL's own policy")

    get_topk_logits = calibrate_qkv_fp8_scales = _absent


class DataPlanePolicy(LocalPolicy):
    """`LocalPolicy` with the methods of `TQPolicy`. `dp_cfg` is NeMo-RL's `data_plane` section.

    What NeMo-RL's does in the driver is its own here too; what it spreads over its workers this
    process does alone.
    """

    _router_replay_enabled = False
    tq_partition_id = "train"

    prepare_step = TQPolicy.prepare_step
    prepare_val_partition = TQPolicy.prepare_val_partition
    discard_samples = TQPolicy.discard_samples
    finish_step = TQPolicy.finish_step
    read_from_dataplane = TQPolicy.read_from_dataplane
    write_to_dataplane = TQPolicy.write_to_dataplane
    _stamp_pad_seqlen = TQPolicy._stamp_pad_seqlen

    def __init__(self, *args: Any, dp_cfg: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dp_cfg = dp_cfg
        self.dp_client = build_data_plane_client(dp_cfg, bootstrap=True)  # type: ignore[arg-type]

    def _packing_args(self, mb_tokens_key: str) -> tuple[None, None]:
        """No sequence is packed."""
        return None, None

    def get_logprobs_from_meta(
        self, meta: KVBatchMeta, micro_batch_size: int | None = None, timer: Any = None
    ) -> None:
        logprobs = self.get_logprobs(self._rows(meta, LP_SEED_FIELDS))["logprobs"]
        self.write_to_dataplane(meta, {"prev_logprobs": logprobs})

    def get_reference_policy_logprobs_from_meta(
        self, meta: KVBatchMeta, micro_batch_size: int | None = None, timer: Any = None
    ) -> None:
        found = self.get_reference_policy_logprobs(self._rows(meta, LP_SEED_FIELDS))
        self.write_to_dataplane(meta, {_REFERENCE: found["reference_logprobs"]})

    def train_from_meta(
        self,
        meta: KVBatchMeta,
        loss_fn: LossFunction,
        *,
        train_fields: Sequence[str] = DP_TRAIN_FIELDS,
        **options: Any,
    ) -> dict[str, Any]:
        """`train`, with its options, on these columns of a step's rows."""
        fields = [f for f in train_fields if f != _REFERENCE or self._reference is not None]
        return self.train(self._rows(meta, fields), loss_fn, **options)

    def _rows(self, meta: KVBatchMeta, fields: Any) -> BatchedDataDict:
        pads = {"input_ids": self.cfg["_pad_token_id"]}
        return self.read_from_dataplane(meta, select_fields=fields, pad_value_dict=pads)

    def shutdown(self) -> bool:
        self.dp_client.close()
        return super().shutdown()
