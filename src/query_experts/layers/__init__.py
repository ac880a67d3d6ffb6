"""The method: the attention layer with its router, masks and balance loss."""
