"""iGRPO inside NeMo-RL: the only package that imports `nemo_rl`.

    launch ─ setup() ─> grpo_train ─ seam ─> rollout ─ stages ─> engines     (generation)
                                                     └────────> environment (Ray actor)

`stages` is plain data and knows neither NeMo-RL nor Ray; the other modules are adapters around it.
`trainers/` has NeMo-RL's other two trainers, `cpu/` the double for laptops and tests.
"""
