"""GGUF files: their container, their block formats, and how they become checkpoints in Hugging Face terms."""
