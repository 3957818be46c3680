"""Causal experiments: position erased, moved or exchanged in hidden states, and what the model does then."""
