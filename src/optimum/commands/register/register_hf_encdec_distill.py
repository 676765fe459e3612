"""Found and imported by each call of `optimum-cli`, like all files of this namespace; has no commands of its own.

What exports or loads our model is registered by importing our package, which costs an import of torch. So it waits for
a command that has arguments: such a command loads a model, and torch with it. Help and `optimum-cli env` do neither.
"""

import logging
import sys


REGISTER_COMMANDS = []

if len(sys.argv) > 2 and not {"-h", "--help"}.intersection(sys.argv):
    try:
        import hf_encdec_distill  # noqa: F401
    except Exception as error:  # whatever it is, the command line has to go on working for all other models
        logging.getLogger(__name__).warning("Models of type rope_encdec cannot be exported: %r", error)
