"""Settings of every test."""

import torch

import blip2_export  # noqa: F401, for what it sets before ONNX Runtime is loaded

# Models in tests are tiny: threads cost more than they give, and the engine needs cores too.
torch.set_num_threads(1)
