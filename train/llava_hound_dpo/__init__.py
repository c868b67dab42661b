"""Attention-aware DPO and SFT of LLaVA-1.5."""
