"""The speed of GQE against stock Llama: each arm's outputs are checked first, then all arms are timed in turn."""
