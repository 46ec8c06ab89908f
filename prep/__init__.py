"""Raw data to tile store: labels, statistics, folds and the commands that write `data/<name>/`."""
