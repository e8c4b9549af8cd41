"""Native kernels against their references, bit for bit, on the CPU."""
