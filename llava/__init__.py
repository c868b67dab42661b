"""What every stage shares: records, conversation, images, layout, attention, checkpoints, generation, runtime."""
