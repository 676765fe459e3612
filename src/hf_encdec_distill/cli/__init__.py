"""The command line, `hf-encdec-distill`: one module a command, and nothing heavy imported before a command runs."""
