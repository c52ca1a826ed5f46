"""What `igrpo.draft_prefetch` and `igrpo.short_circuit` need, whatever the engine."""

from __future__ import annotations

from collections.abc import Iterator

from igrpo_nemo.config.schema import Config


def overlap_problems(config: Config) -> Iterator[str]:
    """One line for each contradiction. With feedback `none` both options are without effect."""
    igrpo = config.igrpo
    if not config.feedback.two_stage:
        return
    if igrpo.draft_prefetch != "off" and config.feedback.trains_drafts:
        yield (
            "igrpo.draft_prefetch=fused samples drafts one step early, too old to be trained on: "
            "igrpo.train_stages must be [refine]"
        )
    if igrpo.short_circuit == "off":
        return
    if igrpo.draft_prefetch != "off":
        yield "igrpo.short_circuit and igrpo.draft_prefetch exclude each other: set one to off"
    if igrpo.draft_choice != "best" or igrpo.tie_break != "first":
        yield "igrpo.short_circuit needs igrpo.draft_choice=best and igrpo.tie_break=first"
    if config.feedback.trains_drafts:
        yield "igrpo.short_circuit cancels drafts, so igrpo.train_stages must be [refine]"
