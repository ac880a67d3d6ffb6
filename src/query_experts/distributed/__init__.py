"""Several processes: who speaks and writes, whole checkpoints, and models that Transformers shards."""
