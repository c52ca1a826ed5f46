"""What is optimised, as pure functions: nothing here knows a model, an engine or a prompt.

    rewards -> reward_shaping -> advantage -> surrogate <- entropy.token_logprobs <- logits

`reward_shaping` is plain Python; the others are tensors. Import from the module that has the name:
this package imports no torch, so that metrics can share the rule for "these rewards are equal".
"""
