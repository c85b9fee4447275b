"""Start the stand-in for TensorFlow Serving, with the flags of `tensorflow_model_server`.

    python tests/support/standin.py --model_name=classifier \\
        --model_base_path=$PWD/models/classifier --port=8500 --rest_api_port=8501

`serving_standin/__init__.py` says what it is and what it is not.
"""

from __future__ import annotations

import argparse
import sys
import threading
from pathlib import Path

from google.protobuf import text_format
from tensorflow_serving.config.model_server_config_pb2 import ModelServerConfig

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
sys.path.insert(0, str(Path(__file__).parents[1]))

from support.serving_standin import rest, rpc
from support.serving_standin.versions import Catalog


def flags() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    port = "0 is any free port, which is printed (the real server: not served)"
    parser.add_argument("--port", type=int, default=8500, help=f"gRPC; {port}")
    parser.add_argument("--rest_api_port", type=int, default=8501, help=f"REST; {port}")
    parser.add_argument("--model_name", default="default")
    parser.add_argument("--model_base_path", type=Path, help="the directory of the versions")
    parser.add_argument("--model_config_file", type=Path, help="a ModelServerConfig, as text")
    parser.add_argument("--file_system_poll_wait_seconds", type=float, default=1.0)
    return parser.parse_args()


def models(options: argparse.Namespace) -> dict[str, Path]:
    if options.model_config_file is not None:
        text = options.model_config_file.read_text()
        return rpc.paths(text_format.Parse(text, ModelServerConfig()))
    if options.model_base_path is None:
        sys.exit("Expected --model_base_path or --model_config_file.")
    return {options.model_name: options.model_base_path}


def main() -> None:
    options = flags()
    catalog = Catalog()
    catalog.configure(models(options))
    _, grpc_port = rpc.serve(catalog, options.port)
    print(f"Running gRPC ModelServer at 127.0.0.1:{grpc_port} ...", flush=True)
    http = rest.serve(catalog, options.rest_api_port)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    print(f"Exporting HTTP/REST API at:127.0.0.1:{http.server_port} ...", flush=True)
    never = threading.Event()
    while not never.wait(options.file_system_poll_wait_seconds):
        catalog.load_new()


if __name__ == "__main__":
    main()
