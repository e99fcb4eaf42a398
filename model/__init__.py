"""The language model: sizes, network, targets, losses, tokenizer and shardings. Knows no Ray."""
