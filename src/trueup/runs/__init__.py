"""The run folder: settings, metrics, checkpoints, seeds, progress."""
