"""Checkpoints in and out: Hugging Face models and adapters, and the training state."""
