"""The model, where its weights come from, and the prompt that a teacher reads."""

# Decoder-only families whose block a student can hold.
SUPPORTED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3")
