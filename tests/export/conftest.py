"""Which exports there are to test in an environment."""

import transformers


# No release of optimum-onnx or optimum-intel admits transformers 5. Where one does, a missing backend is a failure.
collect_ignore = [] if transformers.__version__.startswith("4.") else ["test_optimum.py"]
