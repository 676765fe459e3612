"""The page of `hf-encdec-distill demo` as a Space: set the variables STUDENT and, for the second side, TEACHER."""

import os
import sys

from hf_encdec_distill.cli.main import main


if "STUDENT" not in os.environ:
    sys.exit("set the variable STUDENT, in the Space's settings, to the Hub id of a student")
command = ["demo", os.environ["STUDENT"], "--host", "0.0.0.0"]
if "TEACHER" in os.environ:
    command += ["--teacher", os.environ["TEACHER"]]
sys.exit(main([*command, *sys.argv[1:]]))
