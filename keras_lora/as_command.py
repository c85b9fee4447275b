"""The first step of `python -m keras_lora`, for which Python imports the package before `__main__`.

It imports Keras and its backend as the command does: without the lines that are no news.
"""

import importlib
import sys

# Python's name of a program that it is still looking for.
if sys.argv[:1] == ["-m"] and "keras_lora" in sys.orig_argv:
    from keras_lora_cli.quiet import lower_log_level, silenced

    lower_log_level()
    with silenced():
        importlib.import_module("keras")
