"""The local policy behind NeMo-RL's data plane: rows are exchanged through TransferQueue.

    SyncRolloutActor ─ rows ─> TransferQueue <─ log-probs, advantages ─ DataPlanePolicy
    grpo_train_sync  ─ keys of rows (KVBatchMeta) ─────────────────────> reads, trains

What NeMo-RL's `TQPolicy` does in the driver is its own here too; what it spreads over its workers
this process does alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl.algorithms.loss.interfaces import LossFunction
from nemo_rl.data_plane import KVBatchMeta, build_data_plane_client
from nemo_rl.data_plane.schema import DP_TRAIN_FIELDS, LP_SEED_FIELDS
from nemo_rl.distributed.batched_data_dict import BatchedDataDict
from nemo_rl.models.policy.tq_policy import TQPolicy

from igrpo_nemo.nemo.cpu.policy import LocalPolicy

REFERENCE = "reference_policy_logprobs"


class DataPlanePolicy(LocalPolicy):
    """`LocalPolicy` with the methods of `TQPolicy`. `dp_cfg` is NeMo-RL's `data_plane` section."""

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
        self.write_to_dataplane(meta, {REFERENCE: found["reference_logprobs"]})

    def train_from_meta(
        self,
        meta: KVBatchMeta,
        loss_fn: LossFunction,
        *,
        train_fields: Sequence[str] = DP_TRAIN_FIELDS,
        **options: Any,
    ) -> dict[str, Any]:
        """`train`, with its options, on these columns of a step's rows."""
        fields = [f for f in train_fields if f != REFERENCE or self._reference is not None]
        return self.train(self._rows(meta, fields), loss_fn, **options)

    def _rows(self, meta: KVBatchMeta, fields: Any) -> BatchedDataDict:
        pads = {"input_ids": self.cfg["_pad_token_id"]}
        return self.read_from_dataplane(meta, select_fields=fields, pad_value_dict=pads)

    def shutdown(self) -> bool:
        self.dp_client.close()
        return super().shutdown()
