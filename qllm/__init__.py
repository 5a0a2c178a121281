"""qllm: the instrument for asking what quantization does to a language model."""
