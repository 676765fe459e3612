"""The model, where its weights come from, and the prompt that a teacher reads."""
