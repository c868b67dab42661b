"""Inference and evaluation of LLaVA-1.5 on multi-image prompts."""
