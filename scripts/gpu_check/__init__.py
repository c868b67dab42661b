"""What a machine with GPUs does right, does wrong and how fast it is, in five minutes, on random weights."""
