"""Training: tile store -> fold checkpoints -> weights/model.pth. Commands: `python -m train`."""
