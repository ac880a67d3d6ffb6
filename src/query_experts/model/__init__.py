"""The language model: configuration, model, costs, and the arms of the study."""
