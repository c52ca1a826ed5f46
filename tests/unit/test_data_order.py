"""The order of problems: each once an epoch, and resumable from a position alone."""

import pytest

from igrpo_nemo.data.order import EpochOrder, Position


def test_an_epoch_hands_out_each_problem_once_and_drops_the_rest():
    order, position, seen = EpochOrder(10, batch_size=3, seed=1), Position(), []
    for _ in range(3):
        batch, position = order.take(position)
        seen += batch
    assert len(set(seen)) == 9
    _, position = order.take(position)
    assert position == Position(1, 3)


def test_a_position_is_enough_to_go_on():
    order, position = EpochOrder(7, batch_size=2, seed=4), Position()
    batches, positions = [], []
    for _ in range(10):
        positions.append(position)
        batch, position = order.take(position)
        batches.append(batch)
    for batch, position in zip(batches, positions, strict=True):
        assert EpochOrder(7, batch_size=2, seed=4).take(position)[0] == batch


def test_epochs_differ_unless_the_order_is_kept():
    order = EpochOrder(50, batch_size=5, seed=0)
    assert order.order(0) != order.order(1)
    assert EpochOrder(5, batch_size=5, seed=0, shuffle=False).order(3) == [0, 1, 2, 3, 4]


def test_too_few_problems_for_a_batch():
    with pytest.raises(ValueError, match="do not make a batch"):
        EpochOrder(3, batch_size=4, seed=0)
