"""Floor 4: the training core, the engines over it, and what they report."""
