"""The model families that the engine's tests run over."""

FAMILIES = ("qwen2", "llama", "qwen3", "nemotron_h", "gemma2", "granite")
# gemma2 caps and granite scales the logits behind the head.
