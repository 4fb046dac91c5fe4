"""The training loops, one readable function each, and their settings."""
