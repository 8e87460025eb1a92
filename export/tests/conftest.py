"""Settings of every test."""

import torch

# Models in tests are tiny: threads cost more than they give, and the engine needs cores too.
torch.set_num_threads(1)
