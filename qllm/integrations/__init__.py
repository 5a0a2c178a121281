"""Beside other libraries. Each module here needs one of them, and is imported by whoever names it;
`import qllm` needs none."""
