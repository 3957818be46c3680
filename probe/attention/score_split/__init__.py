"""Scores of attention split into parts by key, by query, by distance, and content: theorem 2 in a trained head."""
