"""What answers HTTP: the parts that every server shares, the OpenAI routes, and two servers to start by hand."""
