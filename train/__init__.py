"""Training: tile store -> fold checkpoints -> weights/model.pth. Commands: `python -m train`."""

import prep  # noqa: F401  # first: it sees to the environment of libraries
