"""The quickstart: `command` is the command line, `pipeline` its stages, `state` what a run remembers."""
