"""What a run leaves behind: its folder, its checkpoints, its metrics, and how they are written."""
