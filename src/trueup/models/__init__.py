"""Loading models, the tree batch, the scorer that is trained, heads and adapters."""
