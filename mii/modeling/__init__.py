"""Models: their checkpoints, tokenizers, layers and families."""
