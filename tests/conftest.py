"""One thread: with tiny models on a busy machine, two threads mostly wait for each other."""

import torch

torch.set_num_threads(1)
