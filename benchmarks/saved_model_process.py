"""Memory and times of SavedModels in TensorFlow's C library, without TensorFlow in Python.

    python benchmarks/saved_model_process.py ORDER.json

`saved_model.py` starts it as a process, whose memory is that of the models alone. The order is
`{"inputs": FILE.npz, "batch": rows, "rounds": n, "models": {name: {"path", "copies",
"adapters"}}}`; each model is loaded in that number of copies, and the models answer the same batch
in turn. If a model has an input `adapter`, the rows get the names in turn. The last line printed is
JSON: the bytes that each model took, its first answer included, and the seconds of each of its
rounds, in which every copy answers once.
"""

from __future__ import annotations

import ctypes
import json
import runpy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from timing import Step, interleaved

EXAMPLE = Path(__file__).parent.parent / "examples/run_saved_model.py"


def resident() -> int:
    """Bytes of this process in memory, without what it has freed."""
    ctypes.CDLL(None).malloc_trim(0)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def asking(copies: Sequence[Any], feeds: Mapping[str, Any], adapters: Sequence[str]) -> Step:
    given = {name: feeds[name] for name in feeds if name in _inputs(copies[0])}
    if "adapter" in _inputs(copies[0]):
        given["adapter"] = np.resize(np.array(adapters), len(next(iter(feeds.values()))))

    def step() -> None:
        for model in copies:
            model.run(given)

    return step


def _inputs(model: Any) -> Mapping[str, Any]:
    return model.signatures["serving_default"].inputs


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text())
    saved_model: Any = runpy.run_path(str(EXAMPLE))["SavedModel"]
    feeds = {name: values[: order["batch"]] for name, values in np.load(order["inputs"]).items()}
    memory, steps = {}, {}
    # The library's own memory counts for no model. `first` stays: freed memory would be reused.
    first = saved_model(next(iter(order["models"].values()))["path"])
    asking([first], feeds, [""])()
    for name, model in order["models"].items():
        before = resident()
        copies = [saved_model(model["path"]) for _ in range(model["copies"])]
        steps[name] = asking(copies, feeds, model["adapters"])
        steps[name]()
        memory[name] = resident() - before
    times = interleaved(steps, order["rounds"])
    print(json.dumps({"memory": memory, "times": times}))


if __name__ == "__main__":
    main()
