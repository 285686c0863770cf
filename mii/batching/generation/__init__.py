"""What shapes the text of an answer: generation parameters, detokenisation and stop strings."""
