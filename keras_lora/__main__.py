"""`python -m keras_lora`: the command `keras-lora`."""

import sys

from keras_lora_cli import main

sys.exit(main())
