import math
import warnings

import pytest
import torch

from igrpo_nemo.errors import UserError
from igrpo_nemo.local.optimizer import build_optimizer, build_scheduler, restore_training


def parameters():
    return [torch.nn.Parameter(torch.ones(2))]


def test_a_schedule_of_stages_follows_its_milestones():
    optimizer = build_optimizer(parameters(), {"lr": 1.0, "betas": [0.9, 0.99]})
    scheduler = build_scheduler(
        optimizer,
        [
            {
                "name": "torch.optim.lr_scheduler.LinearLR",
                "kwargs": {"start_factor": 0.5, "total_iters": 2},
            },
            {
                "name": "torch.optim.lr_scheduler.CosineAnnealingLR",
                "kwargs": {"T_max": 4, "eta_min": 0.1},
            },
            {"milestones": [2]},
        ],
    )
    rates = []
    for _ in range(7):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    assert rates[:3] == pytest.approx([0.5, 0.75, 1.0])
    assert rates[4] == pytest.approx(0.55) and rates[6] == pytest.approx(0.1)


@pytest.mark.parametrize("name", ["os.system", "torch.optim.lr_scheduler.Nothing", "torch.load"])
def test_only_schedulers_of_torch_are_built(name):
    optimizer = build_optimizer(parameters(), {"lr": 1.0})
    with pytest.raises(UserError, match="policy.scheduler: .* is not a class"):
        build_scheduler(optimizer, [{"name": name}])


def test_wrong_arguments_and_milestones_are_named():
    optimizer = build_optimizer(parameters(), {"lr": 1.0})
    stage = {"name": "torch.optim.lr_scheduler.ConstantLR", "kwargs": {"factor": 1.0}}
    with pytest.raises(UserError, match="does not accept .*rate"):
        build_scheduler(optimizer, [{**stage, "kwargs": {"rate": 1.0}}])
    with pytest.raises(UserError, match="2 stages and 0 milestones"):
        build_scheduler(optimizer, [stage, stage])


def test_a_longer_schedule_is_taken_up_at_its_place_without_a_warning():
    def built(steps):
        cosine = {"T_max": steps, "eta_min": 0.0}
        stage = {"name": "torch.optim.lr_scheduler.CosineAnnealingLR", "kwargs": cosine}
        optimizer = build_optimizer(parameters(), {"lr": 1.0})
        return optimizer, build_scheduler(optimizer, [stage, {"milestones": []}])

    optimizer, scheduler = built(4)
    for _ in range(4):
        optimizer.step()
        scheduler.step()
    state = {"optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    optimizer, scheduler = built(8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_training(optimizer, scheduler, state, with_schedule=False)
        optimizer.step()
        scheduler.step()
    assert scheduler.last_epoch == 5
    assert scheduler.get_last_lr()[0] == pytest.approx((1 + math.cos(math.pi * 5 / 8)) / 2)
