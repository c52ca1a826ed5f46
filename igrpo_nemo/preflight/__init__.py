"""Whether a run fits its machines and what it costs, before anything is started.

preflight(config) -> Plan     .problems (empty: it fits), .text(), .to_dict()

Nothing here needs a GPU, weights or a network, or imports torch.
"""

from igrpo_nemo.preflight.estimate import preflight
from igrpo_nemo.preflight.plan import Plan

__all__ = ["Plan", "preflight"]
