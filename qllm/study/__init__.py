"""Temperature studies of quantized models: design, run, measures, statistics, report."""
