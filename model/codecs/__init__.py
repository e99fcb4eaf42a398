"""How a teacher's distribution over the vocabulary becomes few bytes per token, and back."""
