"""A world of drawn pictures with known answers and a tiny model that lives in it: the whole loop, offline."""
