"""The local policy behind NeMo-RL's data plane: rows are exchanged through TransferQueue.

    SyncRolloutActor ─ rows ─> TransferQueue <─ log-probs, advantages ─ DataPlanePolicy
    grpo_train_sync  ─ keys of rows (KVBatchMeta) ─────────────────────> reads, trains

NeMo-RL's own `TQPolicy` spreads the same calls over its workers; here this process is the only one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_rl.algorithms.loss.interfaces import LossFunction
from nemo_rl.data_plane import KVBatchMeta, build_data_plane_client
from nemo_rl.data_plane.column_io import read_columns, round_up, write_columns
from nemo_rl.data_plane.schema import (
    DP_TRAIN_FIELDS,
    GLOBAL_FORWARD_PAD_SEQLEN,
    LP_SEED_FIELDS,
)
from nemo_rl.distributed.batched_data_dict import BatchedDataDict

from igrpo_nemo.nemo.cpu.policy import LocalPolicy

REFERENCE = "reference_policy_logprobs"


class DataPlanePolicy(LocalPolicy):
    """`LocalPolicy` with the methods of NeMo-RL's `TQPolicy`: same names, same contracts.

    `dp_cfg` is NeMo-RL's `data_plane` section.
    """

    def __init__(self, *args: Any, dp_cfg: Mapping[str, Any], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.dp_cfg = dp_cfg
        self.tq_partition_id = "train"
        self._client = build_data_plane_client(dp_cfg, bootstrap=True)  # type: ignore[arg-type]

    def prepare_step(self, num_samples: int, group_size: int | None = None) -> None:
        """Declares the rows of a step."""
        tasks = ["prev_lp", "ref_lp", "train"]
        self._register(self.tq_partition_id, num_samples, tasks, group_size)

    def prepare_val_partition(self, num_samples: int, *, partition_id: str = "val") -> None:
        """Declares the rows of a validation batch."""
        self._register(partition_id, num_samples, [partition_id], None)

    def _register(
        self, partition: str, num_samples: int, tasks: list[str], group_size: int | None
    ) -> None:
        self._client.register_partition(
            partition_id=partition,
            fields=list(DP_TRAIN_FIELDS),
            num_samples=num_samples,
            consumer_tasks=tasks,
            grpo_group_size=group_size,
        )

    def discard_samples(self, sample_ids: list[str], partition_id: str) -> None:
        self._client.clear_samples(sample_ids=sample_ids, partition_id=partition_id)

    def finish_step(self, meta: KVBatchMeta) -> None:
        self.discard_samples(meta.sample_ids, meta.partition_id)

    def read_from_dataplane(
        self,
        meta: KVBatchMeta,
        *,
        select_fields: Sequence[str],
        pad_value_dict: Mapping[str, Any] | None = None,
    ) -> BatchedDataDict:
        """The named columns of the rows, all padded to one length."""
        if meta.sequence_lengths:
            width = round_up(
                max(meta.sequence_lengths), int(meta.extra_info.get("pad_to_multiple", 1))
            )
            meta.extra_info.setdefault(GLOBAL_FORWARD_PAD_SEQLEN, width)
        pads = dict(pad_value_dict or {"input_ids": self.cfg["_pad_token_id"]})
        return read_columns(self._client, meta, select_fields=select_fields, pad_value_dict=pads)

    def write_to_dataplane(self, meta: KVBatchMeta, fields: dict[str, Any]) -> None:
        write_columns(self._client, meta, fields=fields)

    def get_logprobs_from_meta(
        self, meta: KVBatchMeta, micro_batch_size: int | None = None, timer: Any = None
    ) -> None:
        data = self.read_from_dataplane(meta, select_fields=LP_SEED_FIELDS)
        logprobs = self.get_logprobs(data)["logprobs"]
        self.write_to_dataplane(meta, {"prev_logprobs": logprobs})

    def get_reference_policy_logprobs_from_meta(
        self, meta: KVBatchMeta, micro_batch_size: int | None = None, timer: Any = None
    ) -> None:
        data = self.read_from_dataplane(meta, select_fields=LP_SEED_FIELDS)
        logprobs = self.get_reference_policy_logprobs(data)["reference_logprobs"]
        self.write_to_dataplane(meta, {REFERENCE: logprobs})

    def train_from_meta(
        self, meta: KVBatchMeta, loss_fn: LossFunction, **options: Any
    ) -> dict[str, Any]:
        """`train`, with its options, on the rows of a step."""
        fields = [f for f in DP_TRAIN_FIELDS if f != REFERENCE or self._reference is not None]
        return self.train(self.read_from_dataplane(meta, select_fields=fields), loss_fn, **options)

    def shutdown(self) -> bool:
        self._client.close()
        return super().shutdown()
