"""The teacher's distributions: from a model here or on a server, or from a record of one. `signal` has what the
trainer asks of each."""
