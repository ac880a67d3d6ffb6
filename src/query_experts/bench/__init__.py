"""Owns the benchmark of speed: GQE against stock Llama, measured in turn, checked for correctness before any number."""
