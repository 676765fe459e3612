"""Numbers: how they are measured, and how they are shown. Nothing here knows a model or a command."""
