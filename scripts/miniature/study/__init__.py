"""The whole experiment on the miniature world, by the entry points that a real model uses."""
