"""The OpenAI API: models, completions and chat completions."""
