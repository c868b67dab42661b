"""A world of drawn pictures with known answers and a tiny LLaVA that lives in it: the whole loop, offline."""
