"""A stand-in for TensorFlow Serving, in Python over TensorFlow's C library; not the real server.

It answers what an unmodified client of TensorFlow Serving asks: gRPC with the official protos
(`PredictionService.Predict` and `.GetModelMetadata`, `ModelService.GetModelStatus` and
`.HandleReloadConfigRequest`) and REST (`:predict` by rows and by columns, status, metadata). Models
run in `examples/run_saved_model.py`, with XLA off. The forms, messages and status codes follow
`json_tensor.cc`, `http_rest_api_handler.cc`, `http_server.cc` and `predict_util.cc` of TensorFlow
Serving. It has no batching, warmup, version labels, classify or regress, and only the
default version policy: the highest version is served, and the one before it until it is loaded.
"""
