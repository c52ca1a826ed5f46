"""What a config describes, ready for an engine: problems, prompts, rewards, feedback, tokenizer."""
