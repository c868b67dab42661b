"""Attention-aware DPO and SFT."""
