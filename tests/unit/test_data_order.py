"""The order of problems is the same for any number of readers, and goes on where it stopped."""

import pytest

from igrpo_nemo.data.order import EpochOrder, Position, shard


@pytest.mark.parametrize("readers", [1, 2, 3, 4, 6, 12])
def test_any_number_of_readers_sees_the_same_problems(readers):
    position = Position()
    for _ in range(5):
        batch, following = EpochOrder(40, batch_size=12, seed=7).take(position)
        # Each reader has an order of its own and knows nothing but seed and position.
        parts = []
        for rank in range(readers):
            own, after = EpochOrder(40, batch_size=12, seed=7).take(position)
            parts += shard(own, rank, readers)
            assert after == following
        assert parts == batch
        position = following
    assert position.epoch == 1


def test_a_batch_that_does_not_split_evenly_is_refused():
    for rank, readers, size in ((0, 5, 12), (2, 2, 12), (-1, 2, 12)):
        with pytest.raises(ValueError, match="of a batch of 12"):
            shard(list(range(size)), rank, readers)
