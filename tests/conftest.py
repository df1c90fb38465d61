"""What holds for the whole suite."""

import torch

torch.set_num_threads(1)  # tiny networks gain nothing from more, and xdist brings its own processes
