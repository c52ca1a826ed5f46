"""The CPU double: the embedded engine's model behind NeMo-RL's policy and generation interfaces.

    NeMo-RL's loop, loss and checkpoints ─> policy ─> generation, in this process or in an actor

For laptops and tests (`engine=nemo_rl_local`); nothing of it runs on a cluster.
"""
