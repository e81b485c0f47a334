"""Where tensors lie: the plan of a drawing, and memory of the host and of a GPU."""
