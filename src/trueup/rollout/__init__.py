"""What writes completions: one contract, several engines."""
