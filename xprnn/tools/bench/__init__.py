"""`xprnn bench`: the speed of a layer beside torch and ONNX Runtime."""
