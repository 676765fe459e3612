"""`python -m hf_encdec_distill` is the command `hf-encdec-distill`, where that is not on the path."""

import sys

from .cli.main import main


if __name__ == "__main__":
    sys.exit(main())
