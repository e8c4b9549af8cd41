"""Floor 0: what every other package may use: logging, the environment, timers."""
