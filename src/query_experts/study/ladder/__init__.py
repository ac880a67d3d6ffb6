"""The ladder: arms trained at several model sizes, and what their losses say about larger ones."""
