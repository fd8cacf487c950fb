"""Visual signals: what the trainer reads from a forward pass, and the factors that it becomes."""
