"""Options of a run, each off by default and each by itself: what `DistillationTrainingArguments` turns on."""
