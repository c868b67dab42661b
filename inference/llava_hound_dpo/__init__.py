"""Inference and evaluation on multi-image prompts."""
