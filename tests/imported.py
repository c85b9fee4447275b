"""What each process of tests finds imported: `run.py` forks them from one that imports this.

None of it may be a module that pytest rewrites when it is imported, but for `anyio`, a plugin that
no test uses. PEFT imports torch and transformers.
"""

import gc
import importlib

for package in ("tensorflow", "keras_hub", "keras_lora", "peft"):
    importlib.import_module(package)
# Collections of garbage in the processes of tests visit none of it.
gc.collect()
gc.freeze()
