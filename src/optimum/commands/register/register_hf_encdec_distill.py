"""Found and imported by each call of `optimum-cli`, like all files of this namespace; has no commands of its own.

What exports or loads our model is registered by importing our package, which imports nothing until Optimum does.
"""

import logging


REGISTER_COMMANDS = []

try:
    import hf_encdec_distill  # noqa: F401
except Exception as error:  # whatever it is, the command line has to go on working for all other models
    logging.getLogger(__name__).warning("Models of type rope_encdec cannot be exported: %r", error)
