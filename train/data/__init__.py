"""Reading and writing data: a dataset's files as training samples, the inputs of commands, videos and predictions."""
