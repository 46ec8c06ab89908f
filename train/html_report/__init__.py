"""One self-contained HTML page on out-of-fold predictions: scores, curves, pictures of every tile."""
