"""The study: arms trained head to head on the same tokens, and the report of what came out."""
