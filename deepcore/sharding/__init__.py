"""Floor 2: layouts, flat groups, gradients and the arena: where parameters and their state live."""
