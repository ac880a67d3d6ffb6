"""`query-experts plan`: what a training run will need before it is begun. No GPU is used, and no data."""
