"""Statistics and fits of attention at lengths at which no pattern fits into memory."""
